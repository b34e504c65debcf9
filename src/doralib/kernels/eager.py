"""The adapted linear layer as autograd functions in plain torch, for every device and dtype.

A step keeps its input x, the product with A (N, R) and, for the gain, the layer's own output, which its consumer often
keeps anyway; under dropout also one byte an input element. Nothing else of size (N, I) or (N, O).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

from ..functional import row_blocks, sum_dtype

# below this gain the product is not read back from the output: the output may have underflowed
_TINY_GAIN = 1e-12
# elements of one block of a pass over (N, O) on a CPU: a third less time than whole passes at 1024 x 576, float32
_CACHED_ELEMENTS = 1 << 17


class Dropout(NamedTuple):
    """One draw of dropout."""

    keep: Tensor
    """bool, the shape of x: false where the adapter's input is zeroed."""
    p: float
    exact: bool
    """Drop the input of the whole weight change (the paper's code, PEFT), not of the low-rank path alone."""


def dora_linear(
    x: Tensor,
    W_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    s: float,
    bias_O: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """``g ∘ (x Wᵀ + s x~ Aᵀ Bᵀ) + bias``, (..., O) in x's dtype; with exact dropout `functional.compose_exact`.

    Args:
        x: (..., I), of W's dtype.
        W_OI: Frozen, gets no gradient; a transposed view will do.
        a_RI: Any float dtype; cast to x's dtype for its products, and so is B.
        gain_O: magnitude / norm; both get their gradients through it. None for LoRA.

    Raises:
        RuntimeError: from torch, on shapes or dtypes that do not fit, and on a second derivative.
    """
    function = _ExactDropout if dropout is not None and dropout.exact and gain_O is not None else _DoraLinear
    # reshape(-1) cannot tell how many rows an empty input has
    x_NI = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y_NO: Tensor = function.apply(x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout)
    return y_NO.view(*x.shape[:-1], W_OI.shape[0])


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout):
        dtype = x_NI.dtype
        y_NO = nnf.linear(x_NI, W_OI, _cast(bias_O, dtype))
        if gain_O is not None:
            _scale_product(y_NO, gain_O, bias_O)
        xa_NR = _dropped(x_NI, dropout) @ a_RI.to(dtype).T
        y_NO.addmm_(xa_NR, scaled(b_OR, gain_O, s * _boost(dropout)).to(dtype).T)
        kept = None if gain_O is None else y_NO.data
        keep = None if dropout is None else dropout.keep
        ctx.save_for_backward(x_NI, xa_NR, kept, keep, W_OI, bias_O, a_RI, b_OR, gain_O)
        ctx.s, ctx.dropout = s, dropout and dropout._replace(keep=None)
        ctx.watch = None if gain_O is None or y_NO.is_inference() else Watch(y_NO)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        x_NI, xa_NR, y_NO, keep, W_OI, bias_O, a_RI, b_OR, gain_O = ctx.saved_tensors
        dropout = ctx.dropout and ctx.dropout._replace(keep=keep)
        needs, s = _Needs(*ctx.needs_input_grad), ctx.s * _boost(dropout)
        dx, da_RI, db_OR = _low_rank_backward(needs, dy_NO, x_NI, xa_NR, (a_RI, b_OR, gain_O), s, dropout)
        dz_NO, dots_O, dgain_O = dy_NO, None, None
        if gain_O is not None:
            dz_NO, dots_O = _split(dy_NO, y_NO, gain_O, bias_O)
        if needs.x:
            dx.addmm_(dz_NO, W_OI)  # onto the small product: out of place it would cost a copy of (N, I)
        if needs.gain:
            product = _Product(x_NI, xa_NR, W_OI, b_OR, s)
            if ctx.watch.changed():
                dgain_O = _column_dots(dy_NO, product.columns(slice(None)))
            else:
                dgain_O = _gain_gradient(dots_O, dy_NO, gain_O, product)
        dbias_O = _bias_gradient(dy_NO, bias_O) if needs.bias else None
        return dx, None, dbias_O, da_RI, db_OR, dgain_O, None, None


class _ExactDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout):
        dtype = x_NI.dtype
        dropped_NI = _dropped(x_NI, dropout).mul_(_boost(dropout))
        y_NO = nnf.linear(x_NI, W_OI, _cast(bias_O, dtype))
        z_NO = dropped_NI @ W_OI.T
        y_NO.addcmul_(z_NO, (gain_O - 1).to(dtype))
        xa_NR = dropped_NI @ a_RI.to(dtype).T
        y_NO.addmm_(xa_NR, scaled(b_OR, gain_O, s).to(dtype).T)
        z_NO.addmm_(xa_NR, (b_OR * s).to(dtype).T)
        ctx.save_for_backward(x_NI, xa_NR, z_NO, dropout.keep, W_OI, bias_O, a_RI, b_OR, gain_O)
        ctx.s, ctx.p = s, dropout.p
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        x_NI, xa_NR, z_NO, keep, W_OI, bias_O, a_RI, b_OR, gain_O = ctx.saved_tensors
        dropout = Dropout(keep, ctx.p, exact=True)
        needs = _Needs(*ctx.needs_input_grad)
        dx = da_RI = db_OR = None
        dxa_NR = dy_NO @ scaled(b_OR, gain_O, ctx.s).to(dy_NO.dtype)
        if needs.x:
            change_NI = (dxa_NR @ a_RI.to(dy_NO.dtype)).addmm_(dy_NO * (gain_O - 1).to(dy_NO.dtype), W_OI)
            change_NI.mul_(keep.view_as(change_NI))
            dx = change_NI.mul_(_boost(dropout)).addmm_(dy_NO, W_OI)
        if needs.a:
            da_RI = (dxa_NR.T @ _dropped(x_NI, dropout)).to(a_RI.dtype).mul_(_boost(dropout))
        if needs.b:
            db_OR = scaled((xa_NR.T @ dy_NO).T.to(b_OR.dtype), gain_O, ctx.s)
        dgain_O = _column_dots(dy_NO, z_NO) if needs.gain else None
        dbias_O = _bias_gradient(dy_NO, bias_O) if needs.bias else None
        return dx, None, dbias_O, da_RI, db_OR, dgain_O, None, None


class _Needs(NamedTuple):
    x: bool
    W: bool
    bias: bool
    a: bool
    b: bool
    gain: bool
    s: bool
    dropout: bool


class Watch:
    """Tells whether an output was changed in place after it was returned, without keeping its memory."""

    def __init__(self, y: Tensor) -> None:
        self._alias = y.detach()  # shares y's version counter
        self._version = y._version
        self._alias.data = y.new_empty(0)  # keeps the counter, lets the memory go

    def changed(self) -> bool:
        return self._alias._version != self._version


class _Product(NamedTuple):
    """``x Wᵀ + s x~ Aᵀ Bᵀ``, computed again for some output columns only."""

    x_NI: Tensor
    xa_NR: Tensor
    W_OI: Tensor
    b_OR: Tensor
    s: float

    def columns(self, index: Tensor | slice) -> Tensor:
        z_NK = self.x_NI @ self.W_OI[index].T
        return z_NK.addmm_(self.xa_NR, (self.b_OR[index] * self.s).to(z_NK.dtype).T)


def _low_rank_backward(needs, dy_NO, x_NI, xa_NR, factors, s, dropout):
    """The low-rank path's part of dx, (N, I), and the gradients of A and B."""
    a_RI, b_OR, gain_O = factors
    dx = da_RI = db_OR = None
    if needs.x or needs.a:
        dxa_NR = dy_NO @ scaled(b_OR, gain_O, s).to(dy_NO.dtype)
    if needs.x:
        dx = dxa_NR @ a_RI.to(dy_NO.dtype)
        if dropout is not None:
            dx.mul_(dropout.keep.view_as(dx))
    if needs.a:
        da_RI = (dxa_NR.T @ _dropped(x_NI, dropout)).to(a_RI.dtype)
    if needs.b:
        db_OR = scaled((xa_NR.T @ dy_NO).T.to(b_OR.dtype), gain_O, s)
    return dx, da_RI, db_OR


def _split(dy_NO, y_NO, gain_O, bias_O):
    """``dz = g ∘ dy`` and ``Σ_N dy ∘ (y - bias)``, (O,), in one pass by blocks that stay in a core's cache."""
    rest_O, dtype = (gain_O - 1).to(dy_NO.dtype), sum_dtype(dy_NO.dtype)
    dz_NO, dots_O = torch.empty_like(dy_NO), dy_NO.new_zeros(dy_NO.shape[1], dtype=dtype)
    bias = None if bias_O is None else bias_O.to(dtype)
    for rows in _passes(dy_NO):
        dy, y = dy_NO[rows], y_NO[rows].to(dtype)
        torch.addcmul(dy, dy, rest_O, out=dz_NO[rows])
        dots_O += (dy * (y if bias is None else y - bias)).sum(0)
    return dz_NO, dots_O


def _gain_gradient(dots_O, dy_NO, gain_O, product):
    """``Σ_N dy ∘ z``, (O,), with z read back from the kept output as (y - bias) / g; tiny gains computed again."""
    tiny = gain_O.abs() < _TINY_GAIN
    dgain_O = dots_O / torch.where(tiny, 1, gain_O)
    if tiny.any():
        index = tiny.nonzero().flatten()
        dgain_O[index] = _column_dots(dy_NO[:, index], product.columns(index))
    return dgain_O


def _column_dots(a_NO, b_NO):
    """``Σ_N a ∘ b``, (O,), in `sum_dtype`, a cache-sized block of rows at a time."""
    dtype = sum_dtype(a_NO.dtype)
    dots_O = a_NO.new_zeros(a_NO.shape[1], dtype=dtype)
    for rows in _passes(a_NO):
        dots_O += (a_NO[rows] * b_NO[rows].to(dtype)).sum(0)
    return dots_O


def _passes(tensor_NO):
    """Blocks of rows; a GPU takes all at once, where a block would be a launch."""
    N, O = tensor_NO.shape
    return row_blocks(N, O, _CACHED_ELEMENTS if tensor_NO.device.type == "cpu" else N * O)


def _bias_gradient(dy_NO, bias_O):
    return dy_NO.sum(0, dtype=sum_dtype(dy_NO.dtype)).to(bias_O.dtype)


def _scale_product(y_NO, gain_O, bias_O):
    """Turn ``z + bias`` into ``g ∘ z + bias`` in place; g - 1 keeps what g would lose in bfloat16."""
    rest_O = (gain_O - 1).to(y_NO.dtype)
    y_NO.addcmul_(y_NO, rest_O)
    if bias_O is not None:
        y_NO.sub_(rest_O * bias_O.to(y_NO.dtype))


def scaled(b_OR, gain_O, s):
    """``s g ∘ B``, a rank-sized product that saves one over (N, O)."""
    return b_OR * s if gain_O is None else b_OR * (gain_O * s)[:, None]


def _dropped(x_NI, dropout):
    """x with zeros where dropout says, not yet divided by 1 - p (`_boost` does that in a smaller tensor)."""
    return x_NI if dropout is None else x_NI * dropout.keep.view_as(x_NI)


def _boost(dropout):
    return 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)


def _cast(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)
