"""Sums over the rows of an input, a number for each output column, without a temporary of that size.

On a CPU both are what the backward pass of batch normalisation in evaluation computes, and torch has that in one fused
sweep for every dtype, summed in float32 or better: with weight g, mean b and variance 1 its input's gradient is g ∘ dy
and its weight's ``Σ_N dy ∘ (y - b)``.
"""

import torch
from torch import Tensor

from ..functional import row_blocks, sum_dtype

# rows of one sweep: bounds the temporary and the length of float32 sums
_SWEEP_ROWS = 2048


def column_dots(dy_NO: Tensor, y_NO: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """``Σ_N dy ∘ (y - shift)``, (O,), in `sum_dtype`; both tensors contiguous."""
    dots_O = dy_NO.new_zeros(dy_NO.shape[1], dtype=sum_dtype(dy_NO.dtype))
    for rows in _sweeps(dy_NO):
        dots_O += _sweep(dy_NO[rows], y_NO[rows], None, shift_O)[1]
    return dots_O


def scaled_product_and_dots(
    out_NI: Tensor | None, dy_NO: Tensor, y_NO: Tensor, gain_O: Tensor, W_OI: Tensor, shift_O: Tensor | None = None
) -> Tensor:
    """`column_dots`, and ``(g ∘ dy) W`` added to `out_NI` on the way."""
    if out_NI is None:
        return column_dots(dy_NO, y_NO, shift_O)
    dots_O = dy_NO.new_zeros(dy_NO.shape[1], dtype=sum_dtype(dy_NO.dtype))
    for rows in _sweeps(dy_NO):
        dz, dots = _sweep(dy_NO[rows], y_NO[rows], gain_O, shift_O)
        # onto what is there: out of place it would cost a copy
        out_NI[rows].addmm_(dz, W_OI)
        dots_O += dots
    return dots_O


def _sweeps(tensor_NO):
    """Blocks of rows; a GPU takes all at once, where a block would be a launch."""
    N = tensor_NO.shape[0]
    return row_blocks(N, 1, _SWEEP_ROWS if tensor_NO.device.type == "cpu" else N)


def _sweep(dy_NO, y_NO, gain_O, shift_O):
    """``g ∘ dy`` (with a gain) and the dots of one block."""
    dtype = sum_dtype(dy_NO.dtype)
    shift_O = dy_NO.new_zeros(dy_NO.shape[1], dtype=dtype) if shift_O is None else shift_O.to(dtype)
    if dy_NO.device.type == "cpu":
        one_O = torch.ones_like(shift_O)
        weight_O = one_O if gain_O is None else gain_O.to(dtype)
        wanted = [gain_O is not None, True, False]
        return torch.ops.aten.native_batch_norm_backward(
            dy_NO, y_NO, weight_O, shift_O, one_O, None, None, False, 0.0, wanted
        )[:2]
    dz_NO = None if gain_O is None else torch.addcmul(dy_NO, dy_NO, (gain_O - 1).to(dy_NO.dtype))
    return dz_NO, (dy_NO * (y_NO.to(dtype) - shift_O)).sum(0)
