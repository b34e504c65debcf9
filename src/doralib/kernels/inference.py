"""The adapted linear layer where no gradient is wanted: generation, a token at a time.

What follows from A, B, m and the norm alone is made when one of them has changed, so a call adds three small products
to the frozen layer's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..functional import effective_weight
from .eager import rest_and_shift, scale_product, scaled, weight_is_cheaper
from .norm import same

# a half-precision product of so few rows takes a CPU ten times as long as one in float32
_FEW_ROWS = 8


class _Ready(NamedTuple):
    """Factors in the dtype of the products, and what they were made from."""

    made_from: tuple[Tensor | None, ...]
    s: float
    dtype: torch.dtype
    a_RI: Tensor
    gsb_OR: Tensor
    gain_O: Tensor | None
    rest_O: Tensor | None
    """g - 1."""
    shift_O: Tensor | None
    """(g - 1) ∘ bias."""
    small: tuple[Tensor, Tensor] | None
    """A and ``s g ∘ B`` in float32, for half-precision inputs of a few rows on a CPU."""


class Inference:
    """``g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias`` with the numbers of `eager.dora_linear`."""

    def __init__(self) -> None:
        self._ready: _Ready | None = None

    def __call__(
        self, x: Tensor, W_OI: Tensor, factors: tuple[Tensor, ...], n_O: Tensor | None, s: float, bias_O: Tensor | None
    ) -> Tensor:
        """The output, (..., O).

        Args:
            x: (..., I), in evaluation.
            W_OI: As for `eager.dora_linear`.
            factors: A, B and, for DoRA, m.
            n_O: The norm, of which `FreshNorm` hands out the same tensor until A, B or s change; None for LoRA.
            s: The scale.
            bias_O: Added once, not scaled.
        """
        x_NI = x.reshape(-1, W_OI.shape[1])
        ready = self._ready
        if ready is None or not self._still(ready, factors, n_O, s, bias_O, x.dtype):
            ready = self._ready = _make(factors, n_O, s, bias_O, x.dtype)
        bias = None if bias_O is None else bias_O.to(x.dtype)
        if weight_is_cheaper(x_NI):
            return nnf.linear(x, effective_weight(W_OI, ready.a_RI, ready.gsb_OR, ready.gain_O), bias)
        y = nnf.linear(x, W_OI, bias)
        if ready.gain_O is not None:
            scale_product(y, ready.gain_O, ready.rest_O, ready.shift_O)
        if ready.small is not None and len(x_NI) <= _FEW_ROWS:
            a_RI, gsb_OR = ready.small
            return y.add_(nnf.linear(nnf.linear(x.float(), a_RI), gsb_OR))
        y.view(-1, W_OI.shape[0]).addmm_(x_NI @ ready.a_RI.T, ready.gsb_OR.T)
        return y

    def _still(
        self,
        ready: _Ready,
        factors: tuple[Tensor, ...],
        n_O: Tensor | None,
        s: float,
        bias_O: Tensor | None,
        dtype: torch.dtype,
    ) -> bool:
        *seen, seen_n, seen_bias = ready.made_from
        if seen_n is not n_O or ready.s != s or ready.dtype != dtype or (seen_bias is None) != (bias_O is None):
            return False
        # the same norm says that A and B are the same, so only m is left to compare
        watched = list(zip(seen, factors, strict=True))[2 if n_O is not None else 0 :]
        if bias_O is not None and bias_O.requires_grad:
            watched.append((seen_bias, bias_O))
        return all(a is not None and same(a, b) for a, b in watched)


def _make(
    factors: tuple[Tensor, ...], n_O: Tensor | None, s: float, bias_O: Tensor | None, dtype: torch.dtype
) -> _Ready:
    a, b, *m = (p.detach() for p in factors)
    gain_O = None if n_O is None else m[0] / n_O
    rest_O, shift_O = (None, None) if gain_O is None else rest_and_shift(gain_O, bias_O, dtype)
    # a norm that is still the same says that A and B are, so no copies of them are needed
    seen = (a.clone(), b.clone()) if n_O is None else (None, None, m[0].clone())
    made_from = (*seen, n_O, None if bias_O is None else bias_O.detach().clone())
    gsb_OR = scaled(b, gain_O, s)
    small = (a, gsb_OR) if b.is_cpu and dtype.itemsize < 4 and b.dtype == torch.float32 else None
    return _Ready(made_from, s, dtype, a.to(dtype), gsb_OR.to(dtype), gain_O, rest_O, shift_O, small)
