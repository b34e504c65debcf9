"""Dropout of an adapter's input: the draw, and what it leaves."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# up to this chance the numbers of the zeroed elements take a CPU less time, and hardly more memory, than a mask
_FEW = 0.25


class Dropout(NamedTuple):
    """One draw of dropout."""

    drawn: Tensor
    """bool, the shape of x: false where the adapter's input is zeroed; or int64, (K,), ascending: the numbers of those
    elements, row by row."""
    p: float
    exact: bool
    """Drop the input of the whole weight change (the paper's code, PEFT), not of the low-rank path alone."""


def draw(x: Tensor, p: float, *, exact: bool) -> Dropout:
    """A fresh draw for x, from torch's generator of its device: each element is zeroed with chance p."""
    if x.device.type == "cpu" and p <= _FEW and not torch.compiler.is_compiling():
        return Dropout(_few(x.numel(), p), p, exact)
    return Dropout(torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p), p, exact)


def _few(num: int, p: float) -> Tensor:
    """Which of so many elements are zeroed, from one random number for each of these, where a mask takes one for each.

    The steps from one to the next are geometric: ``1 + floor(log(1 - u) / log(1 - p))``.
    """
    parts, last = [torch.empty(0, dtype=torch.int64)], -1
    while last < num - 1:
        expected = (num - 1 - last) * p
        u = torch.rand(int(expected + 6 * math.sqrt(expected)) + 16, dtype=torch.float64)
        steps = u.neg_().log1p_().div_(math.log1p(-p)).clamp_max_(num).to(torch.int64).add_(1)
        parts.append(steps.cumsum_(0).add_(last))
        last = int(parts[-1][-1])
    numbers = torch.cat(parts)
    return numbers[: int(torch.searchsorted(numbers, num))].clone()


def boost(dropout: Dropout | None) -> float:
    """What a kept element is multiplied by, ``1 / (1 - p)``."""
    return 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x as the adapter reads it, scaled."""
    return x if dropout is None else zeroed(x, dropout.drawn) * boost(dropout)


def zeroed(x: Tensor, drawn: Tensor) -> Tensor:
    """x with zeros where a draw has them, not scaled; a new tensor."""
    if drawn.dtype == torch.bool:
        # a product of two dtypes takes longer
        return x * drawn.view_as(x).to(x.dtype)
    return x.flatten().index_fill(0, drawn, 0).view_as(x)


def zero_(x: Tensor, drawn: Tensor) -> Tensor:
    """`zeroed`, in place: x is in one piece."""
    if drawn.dtype == torch.bool:
        return x.mul_(drawn.view_as(x).to(x.dtype))
    x.view(-1).index_fill_(0, drawn, 0)
    return x
