"""Dropout of an adapter's input: the draw, and the product with the mask."""

from typing import NamedTuple

import torch
from torch import Tensor

# a chance is a whole number of these
_STEPS = 1 << 16


class Dropout(NamedTuple):
    """One draw of dropout."""

    keep: Tensor
    """bool, the shape of x: false where the adapter's input is zeroed."""
    p: float
    exact: bool
    """Drop the input of the whole weight change (the paper's code, PEFT), not of the low-rank path alone."""


def draw(x: Tensor, p: float, *, exact: bool) -> Dropout:
    """A fresh mask for x, from torch's generator of its device.

    On a CPU each element takes 16 random bits, so that the chance is p rounded to a multiple of 2^-16, and
    `Dropout.p` says which; torch's own `bernoulli_` takes far longer there.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return Dropout(torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p), p, exact)
    dropped = min(round(p * _STEPS), _STEPS - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()] >= dropped - _STEPS // 2
    return Dropout(keep.view(x.shape), dropped / _STEPS, exact)


def boost(dropout: Dropout | None) -> float:
    """What a kept element is multiplied by, ``1 / (1 - p)``."""
    return 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x as the adapter reads it, scaled."""
    return x if dropout is None else x * mask(dropout.keep, x) * boost(dropout)


def mask(keep: Tensor, x: Tensor) -> Tensor:
    """Zeros and ones in x's dtype and shape: a product of two dtypes takes longer than this and a product."""
    return keep.view_as(x).to(x.dtype)
