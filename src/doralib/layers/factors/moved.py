"""Factors that start as a part of the weight (pissa, olora): the change is ``B A - B0 A0``, nothing at the start."""

import torch
from torch import Tensor, nn

from ... import functional as F
from ...state import LayerAdapter, MovedValues
from ..init import decompose
from .low_rank import Holder, LowRank


class MovedStart(LowRank):
    """A and B, trained, and `start_A` and `start_B`, frozen: A and B as they began."""

    def add_to(self, layer: Holder, r: int) -> None:
        super().add_to(layer, r)
        layer.start_A, layer.start_B = (nn.Parameter(p.detach(), requires_grad=False) for p in self._empty(r))

    def reset(self, layer: Holder) -> None:
        if layer.lora_A.is_meta:
            return
        W_OI = self.base.dense_rows(torch.arange(self.base.shape[0], device=self.base.device))
        for trained, start, value in zip(
            (layer.lora_A, layer.lora_B),
            (layer.start_A, layer.start_B),
            decompose(self.start, W_OI, self.rank(layer), layer.scale),
            strict=True,
        ):
            trained.copy_(value.view_as(trained))
            start.copy_(trained)

    def pair(self, layer: Holder) -> tuple[Tensor, Tensor]:
        """Made anew, of rank 2R."""
        return F.difference(layer.lora_A, layer.lora_B, layer.start_A, layer.start_B)

    def values(self, layer: Holder) -> MovedValues:
        m = layer.lora_magnitude_vector
        return MovedValues(layer.lora_A, layer.lora_B, m, layer.start_A, layer.start_B)

    def fill(self, layer: Holder, given: LayerAdapter | None) -> None:  # noqa: ARG002
        """Nothing fits over it but its start."""
        layer.lora_A.copy_(layer.start_A)
        layer.lora_B.copy_(layer.start_B)
