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

from ..functional import effective_weight, sum_dtype
from .columns import column_dots, scaled_product_and_dots
from .dropout import Dropout, boost, mask

# below this gain the product is not read back from the output: the output may have underflowed
_TINY_GAIN = 1e-12
# from this many input rows for each input feature on, a weight that is made twice costs less than the passes it saves
_ROWS_PER_FEATURE = 1.25


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
    # reshape(-1) cannot tell how many rows an empty input has
    x_NI = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    function: type[torch.autograd.Function] = _DoraLinear
    if dropout is not None and dropout.exact and gain_O is not None:
        function = _ExactDropout
    elif dropout is None and weight_is_cheaper(x_NI):
        function = _Effective
    y_NO: Tensor = function.apply(x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout)
    return y_NO.view(*x.shape[:-1], W_OI.shape[0])


def weight_is_cheaper(x_NI: Tensor) -> bool:
    """Whether the effective weight costs less; never where casting it could swallow a small change."""
    N, I = x_NI.shape
    return x_NI.device.type == "cpu" and x_NI.dtype in (torch.float32, torch.float64) and N > _ROWS_PER_FEATURE * I


class _DoraLinear(torch.autograd.Function):
    """Base product, one pass for the gain, the low-rank product onto it."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout):
        dtype = x_NI.dtype
        a, gsb_OR = a_RI.to(dtype), scaled(b_OR, gain_O, s * boost(dropout)).to(dtype)
        y_NO = nnf.linear(x_NI, W_OI, _cast(bias_O, dtype))
        if gain_O is not None:
            scale_product(y_NO, gain_O, *rest_and_shift(gain_O, bias_O, dtype))
        xa_NR = _masked(x_NI, dropout) @ a.T
        y_NO.addmm_(xa_NR, gsb_OR.T)
        _keep(ctx, y_NO, (a, gsb_OR), dropout, x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, gain_O)
        ctx.s = s
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        (x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, gain_O), y_NO, (a, gsb_OR), dropout = _kept(ctx)
        needs, s, dy_NO = _Needs(*ctx.needs_input_grad), ctx.s * boost(dropout), dy_NO.contiguous()
        mask_NI = None if dropout is None else mask(dropout, x_NI)
        dxa_NR = dy_NO @ gsb_OR if needs.x or needs.a else None
        dx = dxa_NR @ a if needs.x else None
        if dx is not None and mask_NI is not None:
            dx.mul_(mask_NI)
        dgain_O = None
        if gain_O is not None:
            dots_O = scaled_product_and_dots(dx, dy_NO, y_NO, gain_O, W_OI, bias_O)
            if needs.gain:
                product = _Product(x_NI, xa_NR, W_OI, b_OR, s)
                dgain_O = _gain_gradient(ctx.watch, dots_O, dy_NO, gain_O, product)
        elif dx is not None:
            dx.addmm_(dy_NO, W_OI)
        dropped_NI = x_NI if mask_NI is None else mask_NI.mul_(x_NI)
        da, db = _factor_gradients(needs, dy_NO, dropped_NI, dxa_NR, xa_NR, (a_RI, b_OR, gain_O), s)
        return dx, None, _bias_gradient(needs, dy_NO, bias_O), da, db, dgain_O, None, None


class _Effective(torch.autograd.Function):
    """One product with ``g ∘ (W + s B A)``, made in each pass and dropped: float32, many rows, no dropout."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, _):
        a, gsb_OR = a_RI.to(x_NI.dtype), scaled(b_OR, gain_O, s).to(x_NI.dtype)
        y_NO = nnf.linear(x_NI, effective_weight(W_OI, a, gsb_OR, gain_O), _cast(bias_O, x_NI.dtype))
        xa_NR = x_NI @ a.T
        _keep(ctx, y_NO, (a, gsb_OR), None, x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, gain_O)
        ctx.s = s
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        (x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, gain_O), y_NO, (a, gsb_OR), _ = _kept(ctx)
        needs, dy_NO = _Needs(*ctx.needs_input_grad), dy_NO.contiguous()
        dx = dy_NO @ effective_weight(W_OI, a, gsb_OR, gain_O) if needs.x else None
        dgain_O = None
        if needs.gain:
            product = _Product(x_NI, xa_NR, W_OI, b_OR, ctx.s)
            dgain_O = _gain_gradient(ctx.watch, column_dots(dy_NO, y_NO, bias_O), dy_NO, gain_O, product)
        dxa_NR = dy_NO @ gsb_OR if needs.a else None
        da, db = _factor_gradients(needs, dy_NO, x_NI, dxa_NR, xa_NR, (a_RI, b_OR, gain_O), ctx.s)
        return dx, None, _bias_gradient(needs, dy_NO, bias_O), da, db, dgain_O, None, None


class _ExactDropout(torch.autograd.Function):
    """The base's product once for x and once for what dropout leaves of it."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout):
        dtype, up = x_NI.dtype, boost(dropout)
        dropped_NI = _masked(x_NI, dropout)
        a, sb_RO = a_RI.to(dtype), (b_OR * s).to(dtype).T
        xa_NR = dropped_NI @ a.T
        z_NO = (dropped_NI @ W_OI.T).addmm_(xa_NR, sb_RO)
        # (g - 1) z + s x~ Aᵀ Bᵀ, with 1 / (1 - p) in the small factors
        y_NO = nnf.linear(x_NI, W_OI, _cast(bias_O, dtype))
        y_NO.addcmul_(z_NO, ((gain_O - 1) * up).to(dtype)).addmm_(xa_NR, sb_RO, alpha=up)
        ctx.save_for_backward(x_NI, xa_NR, z_NO, dropout.keep, W_OI, bias_O, a_RI, b_OR, gain_O)
        ctx.s, ctx.p = s, dropout.p
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        x_NI, xa_NR, z_NO, keep, W_OI, bias_O, a_RI, b_OR, gain_O = ctx.saved_tensors
        needs, dropout = _Needs(*ctx.needs_input_grad), Dropout(keep, ctx.p, exact=True)
        up, dy_NO, mask_NI = boost(dropout), dy_NO.contiguous(), mask(dropout, x_NI)
        dxa_NR = dy_NO @ scaled(b_OR, gain_O, ctx.s * up).to(dy_NO.dtype)
        dx = dxa_NR @ a_RI.to(dy_NO.dtype) if needs.x else None
        dots_O = scaled_product_and_dots(dx, dy_NO, z_NO, (gain_O - 1) * up, W_OI)
        if dx is not None:
            dx.mul_(mask_NI).addmm_(dy_NO, W_OI)
        factors = a_RI, b_OR, gain_O
        da, db = _factor_gradients(needs, dy_NO, mask_NI.mul_(x_NI), dxa_NR, xa_NR, factors, ctx.s * up)
        dgain_O = dots_O.mul_(up) if needs.gain else None
        return dx, None, _bias_gradient(needs, dy_NO, bias_O), da, db, dgain_O, None, None


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


def _keep(ctx, y_NO, factors, dropout, x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, gain_O):
    """For the backward pass; of the output, only where there is a gain that is read back from it."""
    kept = None if gain_O is None else y_NO.data
    keep = None if dropout is None else dropout.keep
    ctx.save_for_backward(x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, gain_O, kept, *factors, keep)
    ctx.dropout = dropout and dropout._replace(keep=None)
    ctx.watch = None if gain_O is None or y_NO.is_inference() else Watch(y_NO)


def _kept(ctx):
    *tensors, y_NO, a, gsb_OR, keep = ctx.saved_tensors
    return tensors, y_NO, (a, gsb_OR), ctx.dropout and ctx.dropout._replace(keep=keep)


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


def _gain_gradient(watch, dots_O, dy_NO, gain_O, product):
    """``Σ_N dy ∘ z``, (O,), with z read back from the kept output as (y - bias) / g; tiny gains computed again."""
    if watch.changed():
        return column_dots(dy_NO, product.columns(slice(None)))
    size_O = gain_O.abs()
    if size_O.numel() and size_O.amin() >= _TINY_GAIN:
        return dots_O.div_(gain_O)
    tiny = size_O < _TINY_GAIN
    index = tiny.nonzero().flatten()
    dgain_O = dots_O / torch.where(tiny, 1, gain_O)
    dgain_O[index] = column_dots(dy_NO[:, index].contiguous(), product.columns(index))
    return dgain_O


def _factor_gradients(needs, dy_NO, dropped_NI, dxa_NR, xa_NR, factors, s):
    """dA and dB."""
    a_RI, b_OR, gain_O = factors
    da_RI = (dxa_NR.T @ dropped_NI).to(a_RI.dtype) if needs.a else None
    if not needs.b:
        return da_RI, None
    # in B's own layout, or autograd copies it once more
    db_OR = torch.empty_like(b_OR).copy_((xa_NR.T @ dy_NO).T)
    return da_RI, db_OR.mul_(s if gain_O is None else (gain_O * s)[:, None])


def _bias_gradient(needs, dy_NO, bias_O):
    return dy_NO.sum(0, dtype=sum_dtype(dy_NO.dtype)).to(bias_O.dtype) if needs.bias else None


def rest_and_shift(gain_O, bias_O, dtype):
    """``g - 1`` and ``(g - 1) ∘ bias``, or two None where the gain itself loses nothing and there is no bias."""
    if bias_O is None and dtype == gain_O.dtype:
        return None, None
    rest_O = (gain_O - 1).to(dtype)
    return rest_O, None if bias_O is None else rest_O * bias_O.to(dtype)


def scale_product(y_NO, gain_O, rest_O, shift_O):
    """Turn ``z + bias`` into ``g ∘ z + bias`` in place; g - 1 keeps what g would lose in bfloat16."""
    if rest_O is None:
        y_NO.mul_(gain_O)
        return
    y_NO.addcmul_(y_NO, rest_O)
    if shift_O is not None:
        y_NO.sub_(shift_O)


def scaled(b_OR, gain_O, s):
    """``s g ∘ B``, a rank-sized product that saves one over (N, O)."""
    return b_OR * s if gain_O is None else b_OR * (gain_O * s)[:, None]


def _masked(x_NI, dropout):
    """x with zeros where dropout says, not yet divided by 1 - p (`boost` does that in a smaller tensor)."""
    return x_NI if dropout is None else mask(dropout, x_NI).mul_(x_NI)


def _cast(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)
