"""The adapted linear layer where no gradient is wanted: generation, a token at a time."""

from torch import Tensor
from torch.nn import functional as nnf

from ..functional import effective_weight
from .eager import scale_product, weight_is_cheaper
from .ready import Ready

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
