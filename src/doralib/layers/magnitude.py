"""Layers of which only the lengths are trained: the official code's Wdecompose_target_modules."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..kernels.dropout import dropped
from ..state import LayerAdapter
from .linear import DoraLinear
from .wrapper import AroundBase, ReadsThrough, autocast


class DoraMagnitude(ReadsThrough, AroundBase, DoraLinear):
    """A frozen layer of any kind whose rows learn a length (m) and keep their direction.

    ``y = g ∘ (W x) + bias`` with ``g = m / |W|``: DoRA with B A = 0. In files it is just that, with A and B of rank 1
    and zeros, so that every tool computes the right thing.
    """

    def around(self, y: Tensor, x: Tensor, *args: Any) -> Tensor:
        self.base.refuse_backward(x)
        changed = y
        if x.is_floating_point() and self.exact_dropout and (dropout := self._draw_dropout(x)):
            changed = self.base_layer(dropped(autocast(x), dropout), *args)
        if self.bias is not None:
            changed = changed - self.base.by_channel(self.bias.to(y.dtype))
        gain_O = self.gain()
        assert gain_O is not None
        return F.add_gain(y, changed, self.base.by_channel(gain_O))

    def find_conflict(self, given: LayerAdapter) -> str:
        return "turns its rows, but only their lengths are adapted in the model" if given.turns_rows else ""

    def _register_factors(self, a: nn.Parameter, b: nn.Parameter) -> None:
        self.register_buffer("lora_A", torch.zeros_like(a.detach()), persistent=False)
        self.register_buffer("lora_B", torch.zeros_like(b.detach()), persistent=False)

    def _start_factors(self) -> None:
        self.lora_A.zero_()
        self.lora_B.zero_()

    def _fill_factors(self, given: LayerAdapter | None) -> None:
        """They stay zero."""
