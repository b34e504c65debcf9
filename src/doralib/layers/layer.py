"""An adapted layer: it has a frozen base, factors (A and B, or what they follow from) and lengths m."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import DoraConfig
from ..errors import DoraError
from ..kernels.cache import LayerCache
from ..kernels.dropout import Dropout, draw
from ..state import LayerAdapter, Values
from .base.linear import Dense
from .base.opaque import Quantized
from .base.registry import open_base
from .factors.low_rank import LowRank
from .factors.moved import MovedStart
from .init import takes_part_of_weight
from .wrapper import AdapterLayer, Part


class DoraLayer(Part, AdapterLayer):
    """A frozen layer whose rows learn a length (m) and a low-rank turn of direction (B A); a class a kind of layer.

    A fresh adapter changes nothing, bit for bit: s B A is zero and m = |W|. Parameters carry PEFT's names and are
    float32 masters, whatever the base's dtype. `base_layer` is frozen here and kept as it is; `base` is the same layer
    as rows, if it was opened before; the factors are those of the kind of layer, unless others are given.

    Raises:
        DoraError: if the layer cannot be adapted.
    """

    on_read: Callable[[], object] | None = None
    """Called when model code reads the weight, while an audit listens."""

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        scale: float,
        config: DoraConfig,
        base: Dense | None = None,
        factors: LowRank | None = None,
    ) -> None:
        super().__init__()
        base = base or open_base(base_layer)
        if base is None:
            raise DoraError(f"{type(base_layer).__qualname__} is not a linear layer that can be adapted")
        if isinstance(base, Quantized):
            base.storage.keep_readable()
        self.base_layer = base_layer.requires_grad_(False)
        self.base = base = self.as_rows(base)
        self.factors = factors or self.choose_factors(base, config)
        self.kind = base.kind
        self.scale, self.enabled = scale, True
        self.dropout, self.exact_dropout = config.lora_dropout, config.dropout_mode == "exact"
        self.detach_norm = config.detach_norm
        self.out_features, self.in_features = base.shape
        self.factors.add_to(self, r)
        empty_O = torch.empty(self.factors.num_lengths, dtype=F.sum_dtype(base.dtype), device=base.device)
        self.register_parameter("lora_magnitude_vector", nn.Parameter(empty_O) if config.has_magnitude else None)
        self.reset_parameters()

    @staticmethod
    def as_rows(base: Dense) -> Dense:
        """The frozen layer, with the rows that this layer adapts."""
        return base

    @staticmethod
    def choose_factors(base: Dense, config: DoraConfig) -> LowRank:
        """The factors of this kind of layer."""
        start = config.init_lora_weights
        return (MovedStart if takes_part_of_weight(start) else LowRank)(base, start)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start: A and B as `init_lora_weights` says, with no change of the weight, and m = |W|."""
        self.factors.reset(self)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.factors.norm_at_start(self))

    @property
    def cache(self) -> LayerCache:
        """Of the whole layer."""
        return self.factors.cache

    @property
    def r(self) -> int:
        """Rank."""
        return self.factors.rank(self)

    @property
    def a_RI(self) -> Tensor:
        """A as rows; made anew where the factors are no parameters, and so is B."""
        return self.factors.rows(self)[0]

    @property
    def b_OR(self) -> Tensor:
        """B as rows."""
        return self.factors.rows(self)[1]

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
        return self.factors.gain(self)

    def values(self) -> Values:
        return self.factors.values(self)

    def row_lengths(self) -> Tensor:
        return self.factors.norm(self, detach=True)

    def fill_factors(self, given: LayerAdapter | None) -> None:
        self.factors.fill(self, given)

    def find_conflict(self, given: LayerAdapter) -> str:
        return self.factors.find_conflict(given)

    def as_own(self, adapter: LayerAdapter) -> LayerAdapter:
        return self.factors.as_own(self, adapter)

    def adapter_parts(self, place: str) -> dict[str, Part]:
        return {place: self}

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``g ∘ (W + s B A)``, (O, I), in float32: a plain layer with it equals this one."""
        return self.factors.merge(self)

    def merged(self) -> nn.Module:
        """A plain layer of the base's kind with the merged weight."""
        return self.base.with_weight(self.merged_weight())

    def extra_repr(self) -> str:
        method = "lora" if self.lora_magnitude_vector is None else "dora"
        shown = f"{method}, r={self.r}, scale={self.scale:g}, enabled={self.enabled}"
        return ", ".join(filter(None, (shown, self.factors.extra_repr())))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `Masters`; what is kept of the frozen weight is made anew."""
        self.factors.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        # also into shards of a weight, of which its whole shows nothing
        self.factors.forget()
        super()._load_from_state_dict(*args)

    def _draw_dropout(self, x: Tensor) -> Dropout | None:
        return draw(x, self.dropout, exact=self.exact_dropout) if self.training and self.dropout else None
