"""The adapted linear layer in plain torch, for every device and dtype: ``y = g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias``.

`dora_linear` is for a gain that is at hand, `apply_operands` for what a layer's cache keeps. With gradients there are
three ways to the same numbers: by parts, by the effective weight, and with exact dropout. A step keeps its input x, the
product with A (N, R) and, for the gain, the layer's own output, which its consumer often keeps anyway; under dropout
also its draw, at most two bytes an input element. Nothing else of size (N, I) or (N, O).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

from ..functional import effective_weight, sum_dtype
from .dropout import Dropout, boost, zero_, zeroed
from .operands import Operands, make_operands
from .reductions import column_dots, scaled_product_and_dots

# from this many input rows for each input feature on, a weight that is made twice costs less than the passes it saves
_ROWS_PER_FEATURE = 1.25
# a half-precision product of so few rows takes a CPU far longer than one in float32
_FEW_ROWS = 8
# below this gain the product is not read back from the output: the output may have underflowed
TINY_GAIN = 1e-12


def dora_linear(
    x: Tensor,
    W_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    s: float,
    bias_O: Tensor | None = None,
    dropout: Dropout | None = None,
    make_W: Callable[[], Tensor] | None = None,
) -> Tensor:
    """``g ∘ (x Wᵀ + s x~ Aᵀ Bᵀ) + bias``, (..., O) in x's dtype; with exact dropout `functional.compose_exact`.

    Args:
        x: (..., I), of W's dtype.
        W_OI: Frozen, gets no gradient; a transposed view will do.
        make_W: Makes W again for the backward pass, which is then not kept: of a quantized weight.
        a_RI: Any float dtype; cast to x's dtype for its products, and so is B.
        gain_O: magnitude / norm; both get their gradients through it. None for LoRA.

    Raises:
        RuntimeError: from torch, on shapes or dtypes that do not fit, and on a second derivative.
    """
    operands = make_operands(a_RI, b_OR, gain_O, s, bias_O, x.dtype)
    return apply_operands(x, W_OI, (a_RI, b_OR, gain_O), operands, bias_O, dropout, make_W)


def apply_operands(
    x: Tensor,
    W_OI: Tensor,
    trained: tuple[Tensor, Tensor, Tensor | None],
    operands: Operands,
    bias_O: Tensor | None = None,
    dropout: Dropout | None = None,
    make_W: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`dora_linear` by operands that were made before.

    Args:
        trained: What gets the gradients: A, B, and the gain; or the magnitude, where the operands have the norm, which
            is a constant then. None for LoRA.
        operands: Of these, for x's dtype.
    """
    # reshape(-1) cannot tell how many rows an empty input has
    x_NI = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    way = _by_parts
    if dropout is not None and dropout.exact and operands.gain_O is not None:
        way = _with_exact_dropout
    elif dropout is None and _weight_is_cheaper(x, len(x_NI)):
        way = _by_effective_weight
    y_NO: Tensor = _DoraLinear.apply(x_NI, W_OI, bias_O, *trained, way, operands, dropout, make_W)
    return y_NO.view(*x.shape[:-1], W_OI.shape[0])


def infer(x: Tensor, W_OI: Tensor, operands: Operands, bias_O: Tensor | None) -> Tensor:
    """The same where no gradient is wanted and nothing is dropped: generation, often a token at a time.

    Args:
        bias_O: In x's dtype.
    """
    O, I = W_OI.shape
    N = x.numel() // max(1, I)
    if _weight_is_cheaper(x, N):
        return nnf.linear(x, effective_weight(W_OI, operands.a_RI, operands.gsb_OR, operands.gain_O), bias_O)
    y = nnf.linear(x, W_OI, bias_O)
    _scale_product(y, operands)
    if N == 1:
        return _add_one_row(y, x, operands)
    if N <= _FEW_ROWS and x.is_cpu and x.dtype.itemsize < 4:
        wide = x.to(operands.wide_a_RI.dtype)
        return y.add_(nnf.linear(nnf.linear(wide, operands.wide_a_RI), operands.wide_gsb_OR))
    y.view(N, O).addmm_(x.reshape(N, I) @ operands.a_RI.T, operands.gsb_OR.T)
    return y


def _add_one_row(y: Tensor, x: Tensor, operands: Operands) -> Tensor:
    """The low-rank product of a token by itself, onto y: every operator counts."""
    x_I, y_O = x.view(-1), y.view(-1)
    columns_OR = operands.wide_gsb_OR if operands.columns_OR is None else operands.columns_OR
    if x.dtype is columns_OR.dtype:
        y_O.addmv_(columns_OR, operands.a_RI.mv(x_I))
    elif x.is_cpu:
        y_O.add_(columns_OR.mv(operands.wide_a_RI.mv(x_I.to(columns_OR.dtype))))
    else:
        y_O.addmv_(operands.gsb_OR, operands.a_RI.mv(x_I))
    return y


class _DoraLinear(torch.autograd.Function):
    """What the three ways share: the gradients of A, B, m and the bias."""

    @staticmethod
    def forward(ctx, x_NI, W_OI, bias_O, a_RI, b_OR, length_O, way, operands, dropout, make_W):
        bias = None if bias_O is None else bias_O.to(x_NI.dtype)
        y_NO, xa_NR, product_NO = way.forward(x_NI, W_OI, bias, operands, dropout)
        ctx.watch = None
        if product_NO is y_NO:
            product_NO, ctx.watch = y_NO.data, None if y_NO.is_inference() else Watch(y_NO)
        ctx.save_for_backward(
            x_NI, xa_NR, None if make_W else W_OI, bias_O, a_RI, b_OR, length_O, operands.a_RI, operands.gsb_OR,
            product_NO, None if dropout is None else dropout.drawn,
        )  # fmt: skip
        ctx.way, ctx.operands, ctx.dropout = way, operands, dropout and dropout._replace(drawn=None)
        ctx.make_W = make_W
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        kept, operands = _Kept(*ctx.saved_tensors), ctx.operands
        needs_x, _, needs_bias, needs_a, needs_b, needs_length, *_ = ctx.needs_input_grad
        if needs_x and ctx.make_W is not None:
            kept = kept._replace(W_OI=ctx.make_W())
        dy_NO = dy_NO.contiguous()
        dxa_NR = dy_NO @ kept.gsb_OR
        if ctx.dropout is not None:
            dxa_NR.mul_(boost(ctx.dropout))
        dx, dots_O = ctx.way.backward(ctx, kept, dy_NO, dxa_NR, needs_x=needs_x, needs_length=needs_length)
        xady_RO = kept.xa_NR.T @ dy_NO
        da = db = dlength_O = dbias_O = None
        if needs_a:  # of the dtype of the product; autograd casts it
            da = dxa_NR.T @ (kept.x_NI if kept.drawn is None else zeroed(kept.x_NI, kept.drawn))
        if needs_length:
            dlength_O = ctx.way.length_gradient(ctx, kept, dots_O, dy_NO, xady_RO)
        if needs_b:
            # in B's own layout, or autograd copies it once more
            db = torch.empty_like(kept.b_OR).copy_(xady_RO.T)
            db.mul_(operands.s if operands.gs_O1 is None else operands.gs_O1)
            db = db if ctx.dropout is None else db.mul_(boost(ctx.dropout))
        if needs_bias:
            dbias_O = dy_NO.sum(0, dtype=sum_dtype(dy_NO.dtype)).to(kept.bias_O.dtype)
        return dx, None, dbias_O, da, db, dlength_O, None, None, None, None


class _Kept(NamedTuple):
    """What the backward pass finds."""

    x_NI: Tensor
    xa_NR: Tensor
    """``x~ Aᵀ``, not yet divided by 1 - p."""
    W_OI: Any
    """None where it can be made again, until it is."""
    bias_O: Any
    master_RI: Tensor
    """A itself: torch checks that it has not been written to."""
    b_OR: Tensor
    length_O: Tensor | None
    a_RI: Tensor
    """In x's dtype, and so is ``s g ∘ B``."""
    gsb_OR: Tensor
    product_NO: Any
    """The output, or what exact dropout left of the base's product; None for LoRA."""
    drawn: Any
    """`Dropout.drawn`; None without dropout."""


class _Way(NamedTuple):
    """One way to the products of size (N, I) and (N, O)."""

    forward: Callable[..., Any]
    """(x, W, bias, operands, dropout) to y, ``x~ Aᵀ`` and what is kept for the gain's gradient."""
    backward: Callable[..., Any]
    """(ctx, kept, dy, d(x~ Aᵀ)) to dx and the sums ``Σ_N dy ∘ kept``, each where it is wanted."""
    length_gradient: Callable[..., Tensor]
    """(ctx, kept, sums, dy, ``(x~ Aᵀ)ᵀ dy``) to dg, or to dm = dg / n."""


def _parts_forward(x_NI, W_OI, bias_O, operands, dropout):
    """Base product, one pass for the gain, the low-rank product onto it."""
    y_NO = nnf.linear(x_NI, W_OI, bias_O)
    _scale_product(y_NO, operands)
    # what is left is divided by 1 - p in smaller tensors
    xa_NR = (x_NI if dropout is None else zeroed(x_NI, dropout.drawn)) @ operands.a_RI.T
    y_NO.addmm_(xa_NR, operands.gsb_OR.T, alpha=boost(dropout))
    return y_NO, xa_NR, None if operands.gain_O is None else y_NO


def _parts_backward(ctx, kept, dy_NO, dxa_NR, *, needs_x, needs_length):
    dx = dxa_NR @ kept.a_RI if needs_x else None
    if dx is not None and kept.drawn is not None:
        zero_(dx, kept.drawn)
    gain_O = ctx.operands.gain_O
    if gain_O is not None:
        return dx, scaled_product_and_dots(dx, dy_NO, kept.product_NO, gain_O, kept.W_OI, kept.bias_O)
    return (None if dx is None else dx.addmm_(dy_NO, kept.W_OI)), None


def _effective_forward(x_NI, W_OI, bias_O, operands, _):
    """One product with ``g ∘ (W + s B A)``, made in each pass and dropped: float32, many rows, no dropout."""
    weight_OI = effective_weight(W_OI, operands.a_RI, operands.gsb_OR, operands.gain_O)
    y_NO = nnf.linear(x_NI, weight_OI, bias_O)
    return y_NO, x_NI @ operands.a_RI.T, None if operands.gain_O is None else y_NO


def _effective_backward(ctx, kept, dy_NO, _, *, needs_x, needs_length):
    dx = dots_O = None
    if needs_x:
        dx = dy_NO @ effective_weight(kept.W_OI, kept.a_RI, kept.gsb_OR, ctx.operands.gain_O)
    if needs_length:
        dots_O = column_dots(dy_NO, kept.product_NO, kept.bias_O)
    return dx, dots_O


def _read_back(ctx, kept, dots_O, dy_NO, _):
    """``dg = Σ_N dy ∘ z``, and over n dm, with z read back from the kept output as (y - bias) / g."""
    gain_O, n_O = ctx.operands.gain_O, ctx.operands.n_O
    if ctx.watch.changed():
        dgain_O = column_dots(dy_NO, _product(ctx, kept, slice(None)))
    elif bool(gain_O.numel()) and gain_O.amin().item() >= TINY_GAIN:
        return dots_O.div_(kept.length_O)
    else:
        # a tiny gain's product is computed again
        tiny = gain_O.abs() < TINY_GAIN
        index = tiny.nonzero().flatten()
        dgain_O = dots_O / torch.where(tiny, 1, gain_O)
        dgain_O[index] = column_dots(dy_NO[:, index].contiguous(), _product(ctx, kept, index))
    return dgain_O if n_O is None else dgain_O / n_O


def _product(ctx, kept, columns):
    """``x Wᵀ + s x~ Aᵀ Bᵀ``, computed again for some output columns."""
    W_OI = ctx.make_W() if kept.W_OI is None else kept.W_OI
    z_NK = kept.x_NI @ W_OI[columns].T
    b_KR = (kept.b_OR[columns] * ctx.operands.s).to(z_NK.dtype)
    return z_NK.addmm_(kept.xa_NR, b_KR.T, alpha=boost(ctx.dropout))


def _exact_forward(x_NI, W_OI, bias_O, operands, dropout):
    """The base's product once for x and once for what dropout leaves of it, x~."""
    dropped_NI = zeroed(x_NI, dropout.drawn)
    xa_NR, product_NO = dropped_NI @ operands.a_RI.T, dropped_NI @ W_OI.T
    # (g - 1) ∘ x~ Wᵀ + s g ∘ x~ Aᵀ Bᵀ, with 1 / (1 - p) in the small factors
    y_NO = nnf.linear(x_NI, W_OI, bias_O)
    y_NO.addcmul_(product_NO, _boosted_rest(operands, dropout).to(x_NI.dtype))
    y_NO.addmm_(xa_NR, operands.gsb_OR.T, alpha=boost(dropout))
    return y_NO, xa_NR, product_NO


def _exact_backward(ctx, kept, dy_NO, dxa_NR, *, needs_x, needs_length):
    dx = dxa_NR @ kept.a_RI if needs_x else None
    rest_O = _boosted_rest(ctx.operands, ctx.dropout)
    dots_O = scaled_product_and_dots(dx, dy_NO, kept.product_NO, rest_O, kept.W_OI)
    if dx is not None:
        zero_(dx, kept.drawn).addmm_(dy_NO, kept.W_OI)
    return dx, dots_O


def _exact_length_gradient(ctx, kept, dots_O, _, xady_RO):
    dgain_O = dots_O.add_((kept.b_OR * xady_RO.T).sum(1), alpha=ctx.operands.s).mul_(boost(ctx.dropout))
    return dgain_O if ctx.operands.n_O is None else dgain_O.div_(ctx.operands.n_O)


_by_parts = _Way(_parts_forward, _parts_backward, _read_back)
_by_effective_weight = _Way(_effective_forward, _effective_backward, _read_back)
_with_exact_dropout = _Way(_exact_forward, _exact_backward, _exact_length_gradient)


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


def _weight_is_cheaper(x: Tensor, N: int) -> bool:
    """Whether the effective weight costs less for N rows; never where casting it could swallow a small change."""
    return _ROWS_PER_FEATURE * x.shape[-1] < N and x.is_cpu and x.dtype in (torch.float32, torch.float64)


def _scale_product(y_NO: Tensor, operands: Operands) -> None:
    """Turn ``z + bias`` into ``g ∘ z + bias`` in place; g - 1 keeps what g would lose in bfloat16."""
    if operands.gain_O is None:
        return
    if operands.rest_O is None:
        y_NO.mul_(operands.gain_O)
        return
    y_NO.addcmul_(y_NO, operands.rest_O)
    if operands.shift_O is not None:
        y_NO.sub_(operands.shift_O)


def _boosted_rest(operands: Operands, dropout: Dropout) -> Tensor:
    """``(g - 1) / (1 - p)``."""
    assert operands.gain_O is not None
    return (operands.gain_O - 1) * boost(dropout)
