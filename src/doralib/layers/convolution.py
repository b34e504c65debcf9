"""Adapted convolutions: a row of the weight is all that makes one output channel, and has one length."""

from typing import Any

from torch import Tensor
from torch.nn import functional as nnf

from .. import functional as F
from ..kernels.dropout import dropped
from .base.convolution import Convolution
from .layer import DoraLayer
from .wrapper import AroundBase, ReadsThrough, autocast


class DoraConv(ReadsThrough, AroundBase, DoraLayer):
    """A frozen convolution, transposed or not, whose output channels learn a length (m) and a low-rank turn (B A).

    ``y = g ∘ (W * x + s B * A * x) + bias`` with ``g = m / |W + s B A|``, the length taken over everything that makes
    one output channel. A is (R, I / groups, taps...) and B (O, R, 1...), so that B A is a change of the frozen weight
    itself for any number of groups and any rank, and merges into it.
    """

    base: Convolution

    def around(self, y: Tensor, x: Tensor, *output_size: Any) -> Tensor:
        x = autocast(x)
        dropout = self._draw_dropout(x)
        x_a = dropped(x, dropout)
        gain_O = self.gain()
        if gain_O is None:
            return y + self._change(x_a, self.b_OR * self.scale, *output_size)
        if dropout is not None and dropout.exact:
            weight = self.base.W_OI.detach().unflatten(1, self._row)
            product = self.base.product(x_a, weight.to(x.dtype), *output_size)
        else:
            product = y if self.bias is None else y - self.base.by_channel(self.bias.to(y.dtype))
        change = self._change(x_a, self.b_OR * (gain_O * self.scale)[:, None], *output_size)
        return F.add_gain(y, product, self.base.by_channel(gain_O), change)

    def _change(self, x: Tensor, sb_OR: Tensor, *output_size: Any) -> Tensor:
        """``s B * A * x``; with groups as one small weight, since A would make R channels of each group."""
        if self.groups > 1:
            change_OI = sb_OR @ self.a_RI
            return self.base.product(x, change_OI.to(x.dtype).unflatten(1, self._row), *output_size)
        A, B = self.factors.pair(self)
        xa = self.base.product(x, A.to(x.dtype), *output_size)
        pointwise = (nnf.conv1d, nnf.conv2d, nnf.conv3d)[A.dim() - 3]
        return pointwise(xa, sb_OR.to(x.dtype).view_as(B))

    @property
    def _row(self) -> tuple[int, ...]:
        return self.base.row_shape[1:]
