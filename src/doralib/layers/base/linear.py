"""Frozen linear layers whose weight is a plain tensor; every other base answers the same questions."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import functional as F
from ...kernels.dispatch import on_gpu
from .memory import Memory


class Dense:
    """`nn.Linear`: the weight is a plain (O, I) tensor."""

    kind: ClassVar[str] = "linear"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._memory = Memory()

    @property
    def W_OI(self) -> Tensor:
        """The weight itself, rows are output features; a view."""
        return self._weight

    @property
    def rows(self) -> F.Rows:
        """W by blocks of its rows."""
        return self.W_OI

    @property
    def bias(self) -> Tensor | None:
        """(O,)."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        O, I = self.W_OI.shape
        return O, I

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(O, I), or (O, I / groups, taps...) of a convolution."""
        return self.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, or of the products of a storage that hides it."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.device

    def key(self) -> tuple[Any, ...]:
        """Differs once the weight has been changed, replaced or moved; `.data` writes to it are not seen."""
        W = self._weight
        return (self._memory.number(W), version(W), W.dtype, W.device)

    def triton_weight(self) -> Tensor | None:
        """The weight, where Triton's kernels take it."""
        return self.W_OI if on_gpu(self.W_OI) else None

    def find_maker(self, dtype: torch.dtype) -> Callable[[], Tensor] | None:  # noqa: ARG002
        """What makes the weight dense for one product with inputs of this dtype; None where none is to be made."""
        return None

    def row_norm_sq(self) -> Tensor:
        return F.row_norm_sq(self.rows)

    def expands(self, R: int) -> bool:
        return not F.dense_is_cheaper(*self.shape, R)

    def adapted_row_norm(self, W_sq_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        # with B A = 0 both ways must give the same bits as the row norms of W alone, so a fresh layer takes the first
        if not self.expands(len(a_RI)) and b_OR.any() and a_RI.any():
            return F.dense_row_norm(self.rows, a_RI, b_OR, s)
        return F.adapted_row_norm(W_sq_O, self.times_transposed(a_RI), a_RI, b_OR, s, self.dense_rows)

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return F.times_transposed(self.rows, a_RI)

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        return F.transposed_times(self.rows, c_OR)

    def dense_rows(self, index: Tensor) -> Tensor:
        return self.W_OI.detach()[index]

    def refuse_backward(self, x: Tensor) -> None:
        """Check the gradient to the layer's input.

        Raises:
            DoraError: if x asks for one and the layer would give a wrong one.
        """

    def with_weight(self, W_OI: Tensor) -> nn.Module:
        """A plain layer of the same kind with this weight, cast once to the old one's dtype."""
        module = copy.copy(self.module)
        module._parameters = dict(self.module._parameters)
        weight = self._stored(W_OI.to(self.W_OI.dtype)).contiguous()
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def by_channel(self, t_O: Tensor) -> Tensor:
        """A value for each row as the layer's output takes it: (O,), or (O, 1...) of a convolution."""
        return t_O.view(-1, *(1 for _ in self.row_shape[2:]))

    @property
    def _weight(self) -> Tensor:
        """As stored."""
        return self.module.weight  # type: ignore[return-value]

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI


def version(t: Tensor) -> int:
    """How often a tensor was written to; one made in inference mode keeps no count."""
    return 0 if t.is_inference() else t._version


class Transposed(Dense):
    """HF ``Conv1D`` (GPT-2): the weight is stored (I, O)."""

    @property
    def W_OI(self) -> Tensor:
        return self._weight.t()

    def _stored(self, W_OI: Tensor) -> Tensor:
        return W_OI.t()
