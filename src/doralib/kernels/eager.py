"""The adapted linear layer as autograd functions in plain torch, for every device and dtype.

A step keeps its input x, the product with A (N, R) and, for the gain, the layer's own output, which its consumer often
keeps anyway; under dropout also its draw, at most two bytes an input element. Nothing else of size (N, I) or (N, O).
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

from ..functional import effective_weight, sum_dtype
from .dropout import Dropout, boost, zero_, zeroed
from .operands import TINY_GAIN, Ready, ready_from
from .reductions import column_dots, scaled_product_and_dots

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
    ready: Ready | None = None,
) -> Tensor:
    """``g ∘ (x Wᵀ + s x~ Aᵀ Bᵀ) + bias``, (..., O) in x's dtype; with exact dropout `functional.compose_exact`.

    Args:
        x: (..., I), of W's dtype.
        W_OI: Frozen, gets no gradient; a transposed view will do.
        a_RI: Any float dtype; cast to x's dtype for its products, and so is B.
        gain_O: magnitude / norm; both get their gradients through it. None for LoRA. With `ready` the magnitude itself.
        ready: What is kept of a layer for these factors, this magnitude and x's dtype; the norm is a constant then.

    Raises:
        RuntimeError: from torch, on shapes or dtypes that do not fit, and on a second derivative.
    """
    # reshape(-1) cannot tell how many rows an empty input has
    x_NI = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    function: type[torch.autograd.Function] = _DoraLinear
    if dropout is not None and dropout.exact and gain_O is not None:
        function = _ExactDropout
    elif dropout is None and weight_is_cheaper(x, len(x_NI)):
        function = _Effective
    y_NO: Tensor = function.apply(x_NI, W_OI, bias_O, a_RI, b_OR, gain_O, s, dropout, ready)
    return y_NO.view(*x.shape[:-1], W_OI.shape[0])


def weight_is_cheaper(x: Tensor, N: int) -> bool:
    """Whether the effective weight costs less for N rows; never where casting it could swallow a small change."""
    return _ROWS_PER_FEATURE * x.shape[-1] < N and x.is_cpu and x.dtype in (torch.float32, torch.float64)


class _DoraLinear(torch.autograd.Function):
    """Base product, one pass for the gain, the low-rank product onto it."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, length_O, s, dropout, ready):
        ready = ready or ready_from(a_RI, b_OR, length_O, s, bias_O, x_NI.dtype)
        y_NO = nnf.linear(x_NI, W_OI, _cast(bias_O, x_NI.dtype))
        scale_product(y_NO, ready)
        # what is left is divided by 1 - p in smaller tensors
        xa_NR = (x_NI if dropout is None else zeroed(x_NI, dropout.drawn)) @ ready.a_RI.T
        y_NO.addmm_(xa_NR, ready.gsb_OR.T, alpha=boost(dropout))
        _keep_with_output(ctx, y_NO, ready, s, dropout, (x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, length_O))
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        kept, ready, needs, dy_NO = _found(ctx, dy_NO)
        dxa_NR = _boosted(dy_NO @ kept.gsb_OR, ctx.dropout)
        dx = dxa_NR @ kept.a_RI if needs.x else None
        if dx is not None and kept.drawn is not None:
            zero_(dx, kept.drawn)
        dlength_O = None
        if ready.gain_O is not None:
            dots_O = scaled_product_and_dots(dx, dy_NO, kept.y_NO, ready.gain_O, kept.W_OI, kept.bias_O)
            dlength_O = _length_gradient(ctx, kept, dots_O, dy_NO) if needs.length else None
        elif dx is not None:
            dx.addmm_(dy_NO, kept.W_OI)
        da = _a_gradient(kept, dxa_NR) if needs.a else None
        db = _b_gradient(ctx, kept, kept.xa_NR.T @ dy_NO) if needs.b else None
        return dx, None, _bias_gradient(needs, dy_NO, kept.bias_O), da, db, dlength_O, None, None, None


class _Effective(torch.autograd.Function):
    """One product with ``g ∘ (W + s B A)``, made in each pass and dropped: float32, many rows, no dropout."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, length_O, s, dropout, ready):
        ready = ready or ready_from(a_RI, b_OR, length_O, s, bias_O, x_NI.dtype)
        weight_OI = effective_weight(W_OI, ready.a_RI, ready.gsb_OR, ready.gain_O)
        y_NO = nnf.linear(x_NI, weight_OI, _cast(bias_O, x_NI.dtype))
        xa_NR = x_NI @ ready.a_RI.T
        _keep_with_output(ctx, y_NO, ready, s, dropout, (x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, length_O))
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        kept, ready, needs, dy_NO = _found(ctx, dy_NO)
        dx = dy_NO @ effective_weight(kept.W_OI, kept.a_RI, kept.gsb_OR, ready.gain_O) if needs.x else None
        dlength_O = None
        if needs.length:
            dlength_O = _length_gradient(ctx, kept, column_dots(dy_NO, kept.y_NO, kept.bias_O), dy_NO)
        da = _a_gradient(kept, dy_NO @ kept.gsb_OR) if needs.a else None
        db = _b_gradient(ctx, kept, kept.xa_NR.T @ dy_NO) if needs.b else None
        return dx, None, _bias_gradient(needs, dy_NO, kept.bias_O), da, db, dlength_O, None, None, None


class _ExactDropout(torch.autograd.Function):
    """The base's product once for x and once for what dropout leaves of it, x~."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, length_O, s, dropout, ready):
        ready = ready or ready_from(a_RI, b_OR, length_O, s, bias_O, x_NI.dtype)
        dropped_NI = zeroed(x_NI, dropout.drawn)
        xa_NR, product_NO = dropped_NI @ ready.a_RI.T, dropped_NI @ W_OI.T
        # (g - 1) ∘ x~ Wᵀ + s g ∘ x~ Aᵀ Bᵀ, with 1 / (1 - p) in the small factors
        y_NO = nnf.linear(x_NI, W_OI, _cast(bias_O, x_NI.dtype))
        y_NO.addcmul_(product_NO, _rest(ready, dropout).to(x_NI.dtype))
        y_NO.addmm_(xa_NR, ready.gsb_OR.T, alpha=boost(dropout))
        _keep(ctx, product_NO, ready, s, dropout, (x_NI, xa_NR, W_OI, bias_O, a_RI, b_OR, length_O))
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        kept, ready, needs, dy_NO = _found(ctx, dy_NO)
        dxa_NR = _boosted(dy_NO @ kept.gsb_OR, ctx.dropout)
        dx = dxa_NR @ kept.a_RI if needs.x else None
        dots_O = scaled_product_and_dots(dx, dy_NO, kept.y_NO, _rest(ready, ctx.dropout), kept.W_OI)
        if dx is not None:
            zero_(dx, kept.drawn).addmm_(dy_NO, kept.W_OI)
        da = _a_gradient(kept, dxa_NR) if needs.a else None
        xady_RO, dlength_O = kept.xa_NR.T @ dy_NO, None
        if needs.length:
            turned_O = (kept.b_OR * xady_RO.T).sum(1)
            dgain_O = dots_O.add_(turned_O, alpha=ctx.s).mul_(boost(ctx.dropout))
            dlength_O = dgain_O if ready.n_O is None else dgain_O.div_(ready.n_O)
        db = _b_gradient(ctx, kept, xady_RO) if needs.b else None
        return dx, None, _bias_gradient(needs, dy_NO, kept.bias_O), da, db, dlength_O, None, None, None


class _Needs(NamedTuple):
    x: bool
    W: bool
    bias: bool
    a: bool
    b: bool
    length: bool
    s: bool
    dropout: bool
    ready: bool


class Watch:
    """Tells whether an output was changed in place after it was returned, without keeping its memory."""

    def __init__(self, y: Tensor) -> None:
        self._alias = y.detach()  # shares y's version counter
        self._version = y._version
        self._alias.data = _nothing(y.dtype, y.device)  # keeps the counter, lets the memory go

    def changed(self) -> bool:
        return self._alias._version != self._version


@functools.lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device)


class _Kept(NamedTuple):
    """What the backward pass finds."""

    x_NI: Tensor
    xa_NR: Tensor
    """``x~ Aᵀ``, not yet divided by 1 - p."""
    W_OI: Tensor
    bias_O: Tensor | None
    master_RI: Tensor
    """A itself: torch checks that it has not been written to."""
    b_OR: Tensor
    length_O: Tensor | None
    """m, or the gain where that is what the caller has."""
    a_RI: Tensor
    """In x's dtype, and so is ``s g ∘ B``."""
    gsb_OR: Tensor
    y_NO: Any
    """The output, or the product that the gain multiplied; None for LoRA."""
    drawn: Any
    """`Dropout.drawn`; None without dropout."""


def _keep(ctx, y_NO, ready, s, dropout, operands):
    ctx.save_for_backward(*operands, ready.a_RI, ready.gsb_OR, y_NO, None if dropout is None else dropout.drawn)
    ctx.ready, ctx.s, ctx.dropout = ready, s, dropout and dropout._replace(drawn=None)


def _found(ctx, dy_NO):
    return _Kept(*ctx.saved_tensors), ctx.ready, _Needs(*ctx.needs_input_grad), dy_NO.contiguous()


def _keep_with_output(ctx, y_NO, ready, s, dropout, operands):
    """Of the output, only where there is a gain, whose gradient is read back from it."""
    has_gain = ready.gain_O is not None
    _keep(ctx, y_NO.data if has_gain else None, ready, s, dropout, operands)
    ctx.watch = Watch(y_NO) if has_gain and not y_NO.is_inference() else None


def _length_gradient(ctx, kept, dots_O, dy_NO):
    """``Σ_N dy ∘ z``, over n for m's, with z read back from the kept output as (y - bias) / g."""
    gain_O, clear = ctx.ready.gain_O, ctx.ready.clear
    if ctx.watch.changed():
        dgain_O = column_dots(dy_NO, _product(kept, ctx.s, slice(None)))
    elif clear if clear is not None else bool(gain_O.numel()) and gain_O.amin().item() >= TINY_GAIN:
        return dots_O.div_(kept.length_O)
    else:
        # a tiny gain's product is computed again
        tiny = gain_O.abs() < TINY_GAIN
        index = tiny.nonzero().flatten()
        dgain_O = dots_O / torch.where(tiny, 1, gain_O)
        dgain_O[index] = column_dots(dy_NO[:, index].contiguous(), _product(kept, ctx.s, index))
    return dgain_O if ctx.ready.n_O is None else dgain_O / ctx.ready.n_O


def _product(kept: _Kept, s: float, columns: Tensor | slice) -> Tensor:
    """``x Wᵀ + s x~ Aᵀ Bᵀ``, computed again for some output columns."""
    z_NK = kept.x_NI @ kept.W_OI[columns].T
    return z_NK.addmm_(kept.xa_NR, (kept.b_OR[columns] * s).to(z_NK.dtype).T)


def _a_gradient(kept, dxa_NR):
    """Of the dtype of the product; autograd casts it."""
    return dxa_NR.T @ (kept.x_NI if kept.drawn is None else zeroed(kept.x_NI, kept.drawn))


def _b_gradient(ctx, kept, xady_RO):
    # in B's own layout, or autograd copies it once more
    db_OR = torch.empty_like(kept.b_OR).copy_(xady_RO.T)
    db_OR.mul_(ctx.s if ctx.ready.gs_O1 is None else ctx.ready.gs_O1)
    return _boosted(db_OR, ctx.dropout)


def _bias_gradient(needs, dy_NO, bias_O):
    return dy_NO.sum(0, dtype=sum_dtype(dy_NO.dtype)).to(bias_O.dtype) if needs.bias else None


def scale_product(y_NO: Tensor, ready: Ready) -> None:
    """Turn ``z + bias`` into ``g ∘ z + bias`` in place; g - 1 keeps what g would lose in bfloat16."""
    if ready.gain_O is None:
        return
    if ready.rest_O is None:
        y_NO.mul_(ready.gain_O)
        return
    y_NO.addcmul_(y_NO, ready.rest_O)
    if ready.shift_O is not None:
        y_NO.sub_(ready.shift_O)


def _rest(ready, dropout):
    """``(g - 1) / (1 - p)``."""
    return (ready.gain_O - 1) * boost(dropout)


def _boosted(small, dropout):
    return small if dropout is None else small.mul_(boost(dropout))


def _cast(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


# a half-precision product of so few rows takes a CPU far longer than one in float32
_FEW_ROWS = 8


def infer(x: Tensor, W_OI: Tensor, ready: Ready, bias_O: Tensor | None) -> Tensor:
    """``g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias``, (..., O), with the numbers of `eager.dora_linear`.

    Args:
        x: (..., I), in evaluation.
        W_OI: As for `eager.dora_linear`.
        ready: Of the layer as it is now, for x's dtype.
        bias_O: In x's dtype. Added once, not scaled.
    """
    O, I = W_OI.shape
    if x.numel() == I:
        return _one_row(x, W_OI, ready, bias_O)
    N = x.numel() // max(1, I)
    if weight_is_cheaper(x, N):
        return nnf.linear(x, effective_weight(W_OI, ready.a_RI, ready.gsb_OR, ready.gain_O), bias_O)
    y = nnf.linear(x, W_OI, bias_O)
    scale_product(y, ready)
    if N <= _FEW_ROWS and x.is_cpu and x.dtype.itemsize < 4:
        return y.add_(nnf.linear(nnf.linear(x.to(ready.wide_a_RI.dtype), ready.wide_a_RI), ready.wide_gsb_OR))
    y.view(N, O).addmm_(x.reshape(N, I) @ ready.a_RI.T, ready.gsb_OR.T)
    return y


def _one_row(x: Tensor, W_OI: Tensor, ready: Ready, bias_O: Tensor | None) -> Tensor:
    """A token by itself: every operator counts."""
    y = nnf.linear(x, W_OI, bias_O)
    scale_product(y, ready)
    x_I, y_O = x.view(-1), y.view(-1)
    columns_OR = ready.wide_gsb_OR if ready.columns_OR is None else ready.columns_OR
    if x.dtype is columns_OR.dtype:
        y_O.addmv_(columns_OR, ready.a_RI.mv(x_I))
    elif x.is_cpu:
        y_O.add_(columns_OR.mv(ready.wide_a_RI.mv(x_I.to(columns_OR.dtype))))
    else:
        y_O.addmv_(ready.gsb_OR, ready.a_RI.mv(x_I))
    return y
