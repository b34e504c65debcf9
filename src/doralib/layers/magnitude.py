"""Layers of which only the lengths are trained: the official code's Wdecompose_target_modules."""

from typing import Any

from torch import Tensor

from .. import functional as F
from ..config import DoraConfig
from ..kernels.dropout import dropped
from .base.linear import Dense
from .factors.low_rank import LowRank
from .factors.none import NoFactors
from .layer import DoraLayer
from .wrapper import AroundBase, ReadsThrough, autocast


class DoraMagnitude(ReadsThrough, AroundBase, DoraLayer):
    """A frozen layer of any kind whose rows learn a length (m) and keep their direction.

    ``y = g ∘ (W x) + bias`` with ``g = m / |W|``: DoRA with B A = 0.
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

    @staticmethod
    def choose_factors(base: Dense, config: DoraConfig) -> LowRank:  # noqa: ARG004
        return NoFactors(base)
