"""Adapted linear layers: which way the formula is computed."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional as F
from ..kernels import around, eager
from ..kernels.dispatch import on_gpu
from ..kernels.dropout import Dropout, dropped
from .base.opaque import Opaque, Quantized
from .layer import DoraLayer
from .wrapper import autocast, autocast_dtype


class DoraLinear(DoraLayer):
    """A frozen linear layer whose rows learn a length (m) and a low-rank turn of direction (B A).

    ``y = g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias`` with ``g = m / |W + s B A|``; without m (method lora) g is 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias``, (..., I) to (..., O), in the dtype that the base layer would return."""
        if not self.enabled:
            return self.base_layer(x)
        dtype, compiling, learning = autocast_dtype(x), torch.compiler.is_compiling(), torch.is_grad_enabled()
        x = x if dtype is None else x.to(dtype)
        factors, cache = self.factors, self.factors.cache
        if cache.trusted and not (self.training or learning or compiling) and x.dtype in cache.trusted:
            return eager.infer(x, *cache.trusted[x.dtype])
        dropout = self._draw_dropout(x)
        if isinstance(self.base, Quantized) and factors.in_kernels and learning and not compiling:
            make_W = self.base.find_maker(x.dtype)
            if make_W is not None:
                return self._by_dense(x, make_W, dropout)
        if isinstance(self.base, Opaque) or not factors.in_kernels or (compiling and on_gpu(x) is None):
            # the plain formula around the layer's own call: other storages, and what a compiler can see through
            return self._around(self.base_layer(x), x, dropout)
        W_OI, bias_O = self.base.W_OI if dtype is None else self.base.W_OI.to(dtype), self.base.bias
        pair, m = factors.pair(self), self.lora_magnitude_vector
        infers, fused = dropout is None and not learning, on_gpu(x)
        kept = m is not None and x.is_cpu and self.detach_norm and factors.kept_in_training
        if fused is not None or not (infers or kept):
            return (fused or eager).dora_linear(x, W_OI, *pair, self.gain(), self.scale, bias_O, dropout)
        operands = factors.operands(self, pair, x.dtype)
        if not infers:
            return eager.apply_operands(x, W_OI, (*pair, m), operands, bias_O, dropout)
        bias_O = None if bias_O is None else bias_O.to(x.dtype)
        # not a weight that autocast made: it would be a second copy of every layer's
        if cache.trusted is not None and W_OI.dtype == self.base.dtype:
            cache.trusted[x.dtype] = W_OI, operands, bias_O
        return eager.infer(x, W_OI, operands, bias_O)

    def _by_dense(self, x: Tensor, make_W: Callable[[], Tensor], dropout: Dropout | None) -> Tensor:
        """With a quantized weight that is made dense once for product and norm, and once more in the backward pass."""
        assert isinstance(self.base, Quantized)
        W_OI, pair, m = make_W(), self.factors.pair(self), self.lora_magnitude_vector
        if m is not None and x.is_cpu and self.detach_norm and self.factors.kept_in_training:
            with self.base.at_hand(W_OI):
                operands = self.factors.operands(self, pair, x.dtype)
            return eager.apply_operands(x, W_OI, (*pair, m), operands, self.base.bias, dropout, make_W)
        with self.base.at_hand(W_OI):
            gain_O = self.gain()
        return eager.dora_linear(x, W_OI, *pair, gain_O, self.scale, self.base.bias, dropout, make_W)

    def around(self, y: Tensor, x: Tensor) -> Tensor:
        """The output for x from the base's own output y for it, which rows of other adapters may share."""
        x = autocast(x)
        return self._around(y, x, self._draw_dropout(x))

    def _around(self, y: Tensor, x: Tensor, dropout: Dropout | None) -> Tensor:
        self.base.refuse_backward(x)
        x_a = dropped(x, dropout)
        change, gain_O = self.factors.product(self, x_a), self.gain()
        if gain_O is None:
            return y + change
        if dropout is not None and dropout.exact:
            product = self.base_layer(x_a)
            product = product if self.bias is None else product - self.bias.to(product.dtype)
            return F.compose_exact(y, product, change, gain_O)
        return around.compose(y, change, gain_O, self.bias)
