"""Sums over the rows of an input, a number for each output column, without a temporary of that size.

On a CPU both are what the backward pass of batch normalization in evaluation computes. torch has that in one fused
sweep for every dtype, summed in float32 or better, where plain operators make a second tensor of the output's size:
with weight g, mean b and variance 1 its input's gradient is g ∘ dy and its weight's ``Σ_N dy ∘ (y - b)``.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional import row_blocks, sum_dtype

# rows of one sweep: bounds the temporary and the length of float32 sums
_SWEEP_ROWS = 2048


def column_dots(dy_NO: Tensor, y_NO: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """``Σ_N dy ∘ (y - shift)``, (O,), in `sum_dtype`; both tensors contiguous."""
    return _total([_sweep(dy, y, None, shift_O)[1] for dy, y in _sweeps(dy_NO, y_NO)], dy_NO)


def scaled_and_dots(dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """``g ∘ dy``, (N, O) in dy's dtype, and `column_dots` on the way."""
    parts = [_sweep(dy, y, gain_O, None) for dy, y in _sweeps(dy_NO, y_NO)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([dy_NO[:0], *(dz for dz, _ in parts)]), _total([dots for _, dots in parts], dy_NO)


def scaled_product_and_dots(
    out_NI: Tensor | None, dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor, W_OI: Tensor, shift_O: Tensor | None = None
) -> Tensor:
    """`column_dots`, and ``(g ∘ dy) W`` added to `out_NI` on the way."""
    if out_NI is None:
        return column_dots(dy_NO, y_NO, shift_O)
    dots = []
    for dy, y, out in _sweeps(dy_NO, y_NO, out_NI):
        dz, dots_O = _sweep(dy, y, gain_O, shift_O)
        # onto what is there: out of place it would cost a copy
        out.addmm_(dz, W_OI)
        dots.append(dots_O)
    return _total(dots, dy_NO)


def _total(parts: list[Tensor], dy_NO: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return sum(parts, dy_NO.new_zeros(dy_NO.shape[1], dtype=sum_dtype(dy_NO.dtype)))


def _sweeps(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of the tensors' rows; a GPU takes all at once, where a block would be a launch."""
    N, O = tensors[0].shape
    # torch's kernel divides by the sizes
    if N * O == 0:
        return
    if tensors[0].device.type != "cpu" or N <= _SWEEP_ROWS:
        yield tensors
        return
    for rows in row_blocks(N, 1, _SWEEP_ROWS):
        yield tuple(t[rows] for t in tensors)


def _sweep(dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor | None, shift_O: Tensor | None) -> Any:
    """``g ∘ dy`` (with a gain, else None) and the dots of one block."""
    dtype = sum_dtype(dy_NO.dtype)
    if dy_NO.device.type != "cpu":
        return plain_sweep(dy_NO, y_NO, gain_O, shift_O)
    zero_O, one_O = _constants(dy_NO.shape[1], dtype)
    shift_O = zero_O if shift_O is None else shift_O.to(dtype)
    weight_O = one_O if gain_O is None else gain_O.to(dtype)
    wanted = [gain_O is not None, True, False]
    dz_NO, dots_O, _ = torch.ops.aten.native_batch_norm_backward(
        dy_NO, y_NO, weight_O, shift_O, one_O, None, None, False, 0.0, wanted
    )
    return dz_NO, dots_O


def plain_sweep(
    dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor | None, shift_O: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The same in operators that every device has."""
    dtype = sum_dtype(dy_NO.dtype)
    y_NO = y_NO.to(dtype) if shift_O is None else y_NO.to(dtype) - shift_O
    # the gain in its own dtype: cast, one near 1 would lose what it has learnt, and g - 1 for one near 0 everything
    dz_NO = None if gain_O is None else (dy_NO * gain_O).to(dy_NO.dtype)
    return dz_NO, (dy_NO * y_NO).sum(0)


@functools.lru_cache(maxsize=256)
def _constants(O: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.zeros(O, dtype=dtype), torch.ones(O, dtype=dtype)
