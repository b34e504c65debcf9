"""Factors that are A and B themselves, the change of a weight being s B A; every other kind answers the same."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ... import functional as F
from ...kernels.cache import LayerCache
from ...kernels.operands import Operands
from ...state import LayerAdapter, LowRankValues, Values
from ..base.linear import Dense
from ..init import DRAWN

Holder = Any
"""The layer: it has the parameters, under PEFT's names, and the scale. Each kind of factors has names of its own."""


class LowRank:
    """A (R, I) and B (O, R), trained; drawn A and B = 0 at the start.

    What is kept here follows from the layer's parameters and its frozen weight: the parameters themselves are the
    layer's, so that whatever casts, shards or replaces them is seen.
    """

    in_kernels: ClassVar[bool] = True
    """Whether the kernels take A and B as they are; `product` follows the frozen layer's own call otherwise."""
    kept_in_training: ClassVar[bool] = True
    """Whether a training step on a CPU may read the cache."""

    def __init__(self, base: Dense, start: str = "kaiming") -> None:
        self.base, self.start = base, start
        self.cache = LayerCache(base)

    def add_to(self, layer: Holder, r: int) -> None:
        """Give the layer its parameters, not filled yet."""
        layer.lora_A, layer.lora_B = self._empty(r)

    def reset(self, layer: Holder) -> None:
        """Fill them so that the weight stays as it is."""
        DRAWN[self.start](layer.lora_A)
        nn.init.zeros_(layer.lora_B)

    def pair(self, layer: Holder) -> tuple[Tensor, Tensor]:
        """A and B whose product is the change of the weight."""
        return layer.lora_A, layer.lora_B

    def rows(self, layer: Holder) -> tuple[Tensor, Tensor]:
        """The same as matrices, (R, I) and (O, R); views."""
        a, b = self.pair(layer)
        return a.flatten(1), b.flatten(1)

    def rank(self, layer: Holder) -> int:
        """R."""
        return len(layer.lora_A)

    def values(self, layer: Holder) -> Values:
        """What is trained: the parameters themselves."""
        return LowRankValues(*self.pair(layer), layer.lora_magnitude_vector)

    def fill(self, layer: Holder, given: LayerAdapter | None) -> None:
        """As `Part.fill`."""
        fill_pairs(layer.state().pairs(), given, layer.scale)

    def find_conflict(self, given: LayerAdapter) -> str:  # noqa: ARG002
        """As `Part.find_conflict`."""
        return ""

    def as_own(self, layer: Holder, adapter: LayerAdapter) -> LayerAdapter:  # noqa: ARG002
        """As `Part.as_own`."""
        return adapter

    @property
    def num_lengths(self) -> int:
        """How many lengths m holds: one for each output row."""
        return self.base.shape[0]

    def norm(self, layer: Holder, *, detach: bool) -> Tensor:
        """``|W + s B A|`` of the rows in m."""
        return self.cache.norm(*self.rows(layer), layer.scale, detach=detach)

    def norm_at_start(self, layer: Holder) -> Tensor:
        """``|W|`` of the rows in m, before anything is trained."""
        return self.cache.norm_at_start(*self.rows(layer), layer.scale)

    def gain(self, layer: Holder) -> Tensor | None:
        """``g = m / |W + s B A|``, (O,), or None for LoRA."""
        m = layer.lora_magnitude_vector
        return None if m is None else m / self.norm(layer, detach=layer.detach_norm)

    def operands(self, layer: Holder, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Operands:
        """What the cache has for these A and B, just given by `pair`, and for m."""
        return self.cache.operands(*pair, layer.lora_magnitude_vector, layer.scale, self.base.bias, dtype)

    def product(self, layer: Holder, x: Tensor) -> Tensor:
        """``s B A x``."""
        A, B = self.pair(layer)
        return nnf.linear(nnf.linear(x, A.to(x.dtype)), (B * layer.scale).to(x.dtype))

    def merge(self, layer: Holder) -> Tensor:
        """``g ∘ (W + s B A)``, (O, I), in float32."""
        return F.merge_weight(self.base.W_OI, *self.rows(layer), layer.lora_magnitude_vector, layer.scale)

    def forget(self) -> None:
        """Make anew what follows from the frozen weight."""
        self.cache.forget()

    def extra_repr(self) -> str:
        """What a person may want to know of these."""
        return ""

    def _empty(self, r: int) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the base's shape, float32 masters."""
        empty = partial(torch.empty, dtype=F.sum_dtype(self.base.dtype), device=self.base.device)
        O, *row = self.base.row_shape
        return nn.Parameter(empty(r, *row)), nn.Parameter(empty(O, r, *(1 for _ in row[1:])))


def fill_pairs(mine: Sequence[tuple[Tensor, Tensor]], given: LayerAdapter | None, scale: float) -> None:
    """Copy A and B of another adapter into these; without one, or of a smaller rank, the rest turns nothing."""
    for _, B in mine:
        B.zero_()
    if given is None:
        return
    for (A, B), (a, b) in zip(mine, given.pairs(), strict=True):
        # a larger rank turns nothing
        if len(a) <= len(A):
            A[len(a) :] = 0
            A[: len(a)] = a.to(A)
            B[:, : len(a)] = b.to(B) * (given.scale / scale)
