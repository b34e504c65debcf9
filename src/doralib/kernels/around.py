"""An adapted layer from the frozen layer's own output, where its weight is not at hand: `functional.compose`.

Its gradients need ``z = x Wᵀ + s x Aᵀ Bᵀ``. Autograd would keep both summands: two tensors of size (N, O) for each
layer of an int8, GPTQ or AWQ base. Here z is kept alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional as F
from .reductions import scaled_and_dots


def compose(base: Tensor, lora: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """`functional.compose`, bit for bit, of tensors (..., O); it is that where the gain wants no gradient.

    Raises:
        RuntimeError: from torch, on a second derivative.
    """
    if torch.compiler.is_compiling() or not (gain_O.requires_grad and torch.is_grad_enabled()):
        return F.compose(base, lora, gain_O, bias_O)
    y: Tensor = _Compose.apply(base, lora, gain_O, bias_O)
    return y


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, lora: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
        z = base + lora
        ctx.save_for_backward(z if bias_O is None else z.sub_(bias_O.to(z.dtype)), gain_O)
        ctx.dtypes = base.dtype, lora.dtype, gain_O.dtype, bias_O if bias_O is None else bias_O.dtype
        return F.compose(base, lora, gain_O, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, gain_O = ctx.saved_tensors
        base, lora, gain, bias = ctx.dtypes
        O = gain_O.numel()
        dy_NO = dy.reshape(-1, O).to(z.dtype).contiguous()
        dz_NO, dgain_O = scaled_and_dots(dy_NO, z.view(-1, O), gain_O)
        dz = dz_NO.view(dy.shape)
        # what the frozen layer adds to its product goes through unscaled, and comes here by way of its output
        dbias_O = (dy_NO - dz_NO).sum(0, dtype=F.sum_dtype(dy.dtype)).to(bias) if ctx.needs_input_grad[3] else None
        return dz.to(base), dz.to(lora), dgain_O.to(gain), dbias_O
