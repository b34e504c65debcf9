"""No factors: only the lengths of the rows are trained."""

import torch
from torch import nn

from ...state import LayerAdapter
from .low_rank import Holder, LowRank


class NoFactors(LowRank):
    """A and B of rank 1 and zeros, which is what files hold, so that every tool computes the right thing."""

    def add_to(self, layer: Holder, r: int) -> None:
        for name, p in zip(("lora_A", "lora_B"), self._empty(r), strict=True):
            layer.register_buffer(name, torch.zeros_like(p.detach()), persistent=False)

    def reset(self, layer: Holder) -> None:
        nn.init.zeros_(layer.lora_A)
        nn.init.zeros_(layer.lora_B)

    def fill(self, layer: Holder, given: LayerAdapter | None) -> None:
        """They stay zero."""

    def find_conflict(self, given: LayerAdapter) -> str:
        return "turns its rows, but only their lengths are adapted in the model" if given.turns_rows else ""
