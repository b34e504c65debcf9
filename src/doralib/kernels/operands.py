"""What the adapted linear operator takes beside its input and W: small factors that follow from A, B and the gain."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Operands(NamedTuple):
    """Factors a row or a rank wide, outside the graph, each in the dtype that it is used in."""

    s: float
    a_RI: Tensor
    """In the dtype of the products."""
    gsb_OR: Tensor
    """``s g ∘ B`` in the dtype of the products."""
    wide_a_RI: Tensor
    """A itself."""
    wide_gsb_OR: Tensor
    """``s g ∘ B`` in the dtype of B."""
    gain_O: Tensor | None
    """None for LoRA."""
    gs_O1: Tensor | None
    """``s g``."""
    rest_O: Tensor | None
    """g - 1 in the dtype of the products; None where g itself loses nothing and there is no bias."""
    shift_O: Tensor | None
    """``(g - 1) ∘ bias``."""
    n_O: Tensor | None
    """The norm where the gradient is m's; None where it is the gain's."""
    columns_OR: Tensor | None = None
    """A copy of `wide_gsb_OR` laid out by columns, for one row without gradients. A training step never reads it:
    another layout can give other bits."""

    def with_columns(self) -> Self:
        """With the copy by columns: without it a generated token in float32 takes 10 % longer (docs/bench.md)."""
        return self._replace(columns_OR=self.wide_gsb_OR.T.contiguous().T)


@torch.no_grad()
def make_operands(
    a_RI: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    s: float,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Operands:
    """The operands for products in a dtype, where the gradient is the gain's."""
    a_RI, gs_O1, rest_O, shift_O = a_RI.detach(), None, None, None
    if gain_O is not None:
        gain_O = gain_O.detach()
        gs_O1 = (gain_O * s)[:, None]
        if bias_O is not None or dtype != gain_O.dtype:
            rest_O = (gain_O - 1).to(dtype)
            shift_O = None if bias_O is None else rest_O * bias_O.to(dtype)
    wide_gsb_OR = b_OR * (s if gs_O1 is None else gs_O1)
    return Operands(s, a_RI.to(dtype), wide_gsb_OR.to(dtype), a_RI, wide_gsb_OR, gain_O, gs_O1, rest_O, shift_O, None)
