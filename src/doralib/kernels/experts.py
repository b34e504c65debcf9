"""Adapted weights themselves, for model code that reads a stack of weights and multiplies with it in its own way."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import gain, merge_weight, row_blocks, sum_dtype, without_autocast


def adapted_weights(
    W_EOI: Tensor, a_ERI: Tensor, b_EOR: Tensor, m_EO: Tensor | None, s: float, *, detach_norm: bool
) -> Tensor:
    """``g ∘ (W + s B A)`` of every weight of a stack, in W's dtype and strides; gradients go to A, B and m.

    Summed in float32, a few weights at a time, so the result is the only tensor of W's size that is made. The backward
    pass sums W + s B A again.

    Args:
        W_EOI: Frozen; a transposed view will do.
        m_EO: None for LoRA: ``W + s B A``.
        detach_norm: Whether the norm is a constant of the backward pass.
    """
    # autocast would run the products of float32 sums in half precision
    with without_autocast(W_EOI):
        weights: Tensor = _AdaptedWeights.apply(W_EOI, a_ERI, b_EOR, m_EO, s, detach_norm)
    return weights


class _AdaptedWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W_EOI, a_ERI, b_EOR, m_EO, s, detach_norm):
        out_EOI = torch.empty_like(W_EOI)
        for e in _blocks(W_EOI):
            out_EOI[e] = merge_weight(W_EOI[e], a_ERI[e], b_EOR[e], None if m_EO is None else m_EO[e], s)
        ctx.save_for_backward(W_EOI, a_ERI, b_EOR, m_EO)
        ctx.s, ctx.detach_norm = s, detach_norm
        return out_EOI

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_EOI):
        W_EOI, a_ERI, b_EOR, m_EO = ctx.saved_tensors
        da_ERI, db_EOR = torch.empty_like(a_ERI), torch.empty_like(b_EOR)
        dm_EO = None if m_EO is None else torch.empty_like(m_EO)
        dtype = sum_dtype(W_EOI.dtype)
        for e in _blocks(W_EOI):
            a, b, dV = a_ERI[e].to(dtype), b_EOR[e].to(dtype), dout_EOI[e].to(dtype)
            if m_EO is not None and dm_EO is not None:
                V = torch.baddbmm(W_EOI[e].to(dtype), b, a, alpha=ctx.s)
                n_EO = torch.linalg.vector_norm(V, dim=2)
                g_EO, dots_EO = gain(m_EO[e].to(dtype), n_EO), (dV * V).sum(2)
                dm_EO[e] = gain(dots_EO, n_EO).to(m_EO.dtype)
                dV = dV * g_EO[..., None]
                if not ctx.detach_norm:
                    dV -= gain(gain(g_EO * dots_EO, n_EO), n_EO)[..., None] * V
            db_EOR[e] = (dV @ a.mT).mul_(ctx.s).to(db_EOR.dtype)
            da_ERI[e] = (b.mT @ dV).mul_(ctx.s).to(da_ERI.dtype)
        return None, da_ERI, db_EOR, dm_EO, None, None


def _blocks(W_EOI: Tensor) -> Iterator[slice]:
    E, O, I = W_EOI.shape
    return row_blocks(E, O * I)
