"""Frozen convolutions as rows: a row is one output channel."""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as nnf

from ... import functional as F
from .linear import Dense


class Convolution(Dense):
    """`nn.Conv1d`, 2d, 3d: a row is all that makes one output channel, (I / groups · taps,)."""

    kind = "convolution"

    @property
    def W_OI(self) -> Tensor:
        return self._weight.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        O, *row = self.row_shape
        return O, math.prod(row)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self._weight.shape)

    def triton_weight(self) -> Tensor | None:
        return super().triton_weight() if self._weight.is_contiguous() else None

    def product(self, x: Tensor, weight_OIK: Tensor, *output_size: Any) -> Tensor:  # noqa: ARG002
        """The layer's own operator with another weight, of any number of output channels, and no bias."""
        # the module's method knows stride, dilation, groups and every padding mode
        return self.module._conv_forward(x, weight_OIK, None)  # type: ignore[operator]

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(self.row_shape)


class TransposedConvolution(Convolution):
    """`nn.ConvTranspose1d`, 2d, 3d: stored (I, O / groups, taps...); rows are output channels all the same."""

    kind = "transposed_convolution"

    @property
    def W_OI(self) -> Tensor:
        # a copy: these layers are small and few
        return F.swapped_channels(self._weight, self._groups).flatten(1)

    @property
    def row_shape(self) -> tuple[int, ...]:
        I, O, *kernel = self._weight.shape
        return O * self._groups, I // self._groups, *kernel

    def triton_weight(self) -> Tensor | None:
        return None

    def product(self, x: Tensor, weight_OIK: Tensor, *output_size: Any) -> Tensor:
        module: Any = self.module
        size, count = output_size[0] if output_size else None, len(self._weight.shape) - 2
        geometry = (module.stride, module.padding, module.kernel_size)
        extra = module._output_padding(x, size, *geometry, count, module.dilation)
        operator = (nnf.conv_transpose1d, nnf.conv_transpose2d, nnf.conv_transpose3d)[count - 1]
        stored = F.swapped_channels(weight_OIK, self._groups)
        return operator(x, stored, None, module.stride, module.padding, extra, self._groups, module.dilation)

    @property
    def _groups(self) -> int:
        return self.module.groups  # type: ignore[return-value]

    def _stored(self, W_OI: Tensor) -> Tensor:
        return F.swapped_channels(W_OI.reshape(self.row_shape), self._groups)
