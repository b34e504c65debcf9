"""Adapted layers: the parameters, and which formula they go through."""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .. import functional as F
from ..config import DoraConfig
from ..errors import DoraError
from ..kernels import eager
from ..kernels.cache import LayerCache
from ..kernels.dispatch import on_gpu
from ..kernels.dropout import Dropout, draw, dropped
from ..kernels.operands import Operands
from ..state import LowRankValues, MovedValues, Values
from .base.linear import Dense
from .base.opaque import Opaque, Quantized
from .base.registry import open_base
from .init import DRAWN, decompose, takes_part_of_weight
from .wrapper import AdapterLayer, Part, autocast, autocast_dtype


class DoraLinear(Part, AdapterLayer):
    """A frozen linear layer whose rows learn a length (m) and a low-rank turn of direction (B A).

    ``y = g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias`` with ``g = m / |W + s B A|``. A fresh adapter changes nothing, bit for bit:
    B = 0 and m = |W|. Without m (method lora) g is 1. Parameters carry PEFT's names and are float32 masters, whatever
    the base's dtype. `base_layer` is frozen here and kept as it is; `base` is the same layer as rows, if it was opened
    before.

    Raises:
        DoraError: if the layer is not linear.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    start_A: nn.Parameter | None
    """A and B as they began, frozen, where they began as a part of the weight: the change is ``B A - B0 A0``."""
    start_B: nn.Parameter | None
    on_read: Callable[[], object] | None = None
    """Called when model code reads the weight, while an audit listens."""

    def __init__(
        self, base_layer: nn.Module, r: int, scale: float, config: DoraConfig, base: Dense | None = None
    ) -> None:
        self._freeze(base_layer, scale, config, base)
        self._add_parameters(r, config)

    def _freeze(self, base_layer: nn.Module, scale: float, config: DoraConfig, base: Dense | None) -> None:
        """All that the layer has before its parameters."""
        super().__init__()
        base = base or open_base(base_layer)
        if base is None:
            raise DoraError(f"{type(base_layer).__qualname__} is not a linear layer that can be adapted")
        if isinstance(base, Quantized):
            base.storage.keep_readable()
        self.base_layer = base_layer.requires_grad_(False)
        self.base = base = self.as_rows(base)
        self.kind = base.kind
        self.scale, self.enabled = scale, True
        self.dropout, self.exact_dropout = config.lora_dropout, config.dropout_mode == "exact"
        self.detach_norm, self.start = config.detach_norm, config.init_lora_weights
        self.cache = LayerCache(base)
        self.out_features, self.in_features = base.shape

    def _add_parameters(self, r: int, config: DoraConfig) -> None:
        self.register_parameter("start_A", None)
        self.register_parameter("start_B", None)
        empty = partial(torch.empty, dtype=F.sum_dtype(self.base.dtype), device=self.base.device)
        O, *row = self.base.row_shape
        self._register_factors(nn.Parameter(empty(r, *row)), nn.Parameter(empty(O, r, *(1 for _ in row[1:]))))
        m_O = nn.Parameter(empty(self.num_lengths)) if config.has_magnitude else None
        self.register_parameter("lora_magnitude_vector", m_O)
        self.reset_parameters()

    @staticmethod
    def as_rows(base: Dense) -> Dense:
        """The frozen layer, with the rows that this layer adapts."""
        return base

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start: A and B as `init_lora_weights` says, with no change of the weight, and m = |W|."""
        self._start_factors()
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._start_lengths())

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B whose product is the change of the weight; made anew, of rank 2r, where a start is taken off."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return F.difference(self.lora_A, self.lora_B, self.start_A, self.start_B)

    @property
    def num_lengths(self) -> int:
        """How many lengths m holds: one for each output row."""
        return self.out_features

    @property
    def a_RI(self) -> Tensor:
        """The first of the factors, as rows."""
        return self.factors[0].flatten(1)

    @property
    def b_OR(self) -> Tensor:
        """The second of the factors, as rows."""
        return self.factors[1].flatten(1)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight, for model code that reads it."""
        if self.on_read is not None:
            self.on_read()
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias."""
        return self.base.bias

    def gain(self) -> Tensor | None:
        """``g = m / |W + s B A|``, (O,), or None for LoRA."""
        if self.lora_magnitude_vector is None:
            return None
        return self.lora_magnitude_vector / self.cache.norm(self.a_RI, self.b_OR, self.scale, detach=self.detach_norm)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `Masters`; what is kept of the frozen weight is made anew."""
        self.cache.forget()
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """``g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias``, (..., I) to (..., O), in the dtype that the base layer would return."""
        if not self.enabled:
            return self.base_layer(x)
        dtype, compiling, learning = autocast_dtype(x), torch.compiler.is_compiling(), torch.is_grad_enabled()
        x = x if dtype is None else x.to(dtype)
        if self.cache.trusted and not (self.training or learning or compiling) and x.dtype in self.cache.trusted:
            return eager.infer(x, *self.cache.trusted[x.dtype])
        dropout = self._draw_dropout(x)
        if isinstance(self.base, Opaque) or (compiling and on_gpu(x) is None):
            # the plain formula around the layer's own call: other storages, and what a compiler can see through
            return self._around(self.base_layer(x), x, dropout)
        W_OI, bias_O = self.base.W_OI if dtype is None else self.base.W_OI.to(dtype), self.base.bias
        factors, m = self.factors, self.lora_magnitude_vector
        infers = dropout is None and not learning
        fused = on_gpu(x)
        if fused is not None or not (infers or (m is not None and self._trains_by_cache(x))):
            return (fused or eager).dora_linear(x, W_OI, *factors, self.gain(), self.scale, bias_O, dropout)
        operands = self._operands(factors, m, x.dtype)
        if not infers:
            return eager.apply_operands(x, W_OI, (*factors, m), operands, bias_O, dropout)
        bias_O = None if bias_O is None else bias_O.to(x.dtype)
        # not a weight that autocast made: it would be a second copy of every layer's
        if self.cache.trusted is not None and W_OI.dtype == self.base.dtype:
            self.cache.trusted[x.dtype] = W_OI, operands, bias_O
        return eager.infer(x, W_OI, operands, bias_O)

    def around(self, base: Tensor, x: Tensor) -> Tensor:
        """The output for x from the base's own output for it, which rows of other adapters may share.

        A class with a forward of its own has one of these too, or is called apart for its rows (`MultiAdapter`).
        """
        x = autocast(x)
        return self._around(base, x, self._draw_dropout(x))

    def values(self) -> Values:
        if self.start_A is not None and self.start_B is not None:
            return MovedValues(self.lora_A, self.lora_B, self.lora_magnitude_vector, self.start_A, self.start_B)
        return LowRankValues(self.lora_A, self.lora_B, self.lora_magnitude_vector)

    def adapter_parts(self, place: str) -> dict[str, Part]:
        return {place: self}

    def merged_weight(self) -> Tensor:
        """``g ∘ (W + s B A)``, (O, I), in float32: a plain layer with it equals this one."""
        return F.merge_weight(self.base.W_OI, self.a_RI, self.b_OR, self.lora_magnitude_vector, self.scale)

    def merged(self) -> nn.Module:
        """A plain layer of the base's kind with the merged weight."""
        return self.base.with_weight(self.merged_weight())

    def extra_repr(self) -> str:
        method = "lora" if self.lora_magnitude_vector is None else "dora"
        return f"{method}, r={self.r}, scale={self.scale:g}, enabled={self.enabled}"

    def _register_factors(self, a: nn.Parameter, b: nn.Parameter) -> None:
        self.lora_A, self.lora_B = a, b
        if takes_part_of_weight(self.start):
            self.start_A, self.start_B = (nn.Parameter(torch.empty_like(p), requires_grad=False) for p in (a, b))

    def _start_factors(self) -> None:
        if self.start_A is None or self.start_B is None:
            DRAWN[self.start](self.lora_A)
            nn.init.zeros_(self.lora_B)
        elif not self.lora_A.is_meta:
            rows = torch.arange(self.out_features, device=self.base.device)
            found = decompose(self.start, self.base.dense_rows(rows), self.r, self.scale)
            for p, start, value in zip((self.lora_A, self.lora_B), (self.start_A, self.start_B), found, strict=True):
                p.copy_(value.view_as(p))
                start.copy_(p)

    def _start_lengths(self) -> Tensor:
        return self.cache.norm_at_start(self.a_RI, self.b_OR, self.scale)

    def row_lengths(self) -> Tensor:
        return self.cache.norm(self.a_RI, self.b_OR, self.scale, detach=True)

    def _operands(self, factors: tuple[Tensor, Tensor], m: Tensor | None, dtype: torch.dtype) -> Operands:
        """What the cache has for these factors and m."""
        return self.cache.operands(*factors, m, self.scale, self.base.bias, dtype)

    def _trains_by_cache(self, x: Tensor) -> bool:
        """Whether a training step reads the cache, not the gain: on a CPU, with the norm a constant."""
        return x.is_cpu and self.detach_norm

    def _draw_dropout(self, x: Tensor) -> Dropout | None:
        return draw(x, self.dropout, exact=self.exact_dropout) if self.training and self.dropout else None

    def _around(self, base: Tensor, x: Tensor, dropout: Dropout | None) -> Tensor:
        self.base.refuse_backward(x)
        x_a = dropped(x, dropout)
        A, B = self.factors
        change = nnf.linear(nnf.linear(x_a, A.to(x.dtype)), (B * self.scale).to(x.dtype))
        return self._compose(base, change, x_a, dropout)

    def _compose(self, y: Tensor, change: Tensor, x_a: Tensor, dropout: Dropout | None) -> Tensor:
        """The output from the base's own output y and the change s B A x_a, x_a being x after dropout."""
        gain_O = self.gain()
        if gain_O is None:
            return y + change
        if dropout is not None and dropout.exact:
            product = self.base_layer(x_a)
            product = product if self.bias is None else product - self.bias.to(product.dtype)
            return F.compose_exact(y, product, change, gain_O)
        return F.compose(y, change, gain_O, self.bias)
