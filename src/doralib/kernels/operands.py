"""What the linear operator takes beside its input and W: small factors made from A, B and the gain."""

from typing import NamedTuple

import torch
from torch import Tensor

# below this gain the product is not read back from the output: the output may have underflowed
TINY_GAIN = 1e-12


class Ready(NamedTuple):
    """Small factors, a row or a rank wide, in the dtypes they are used in."""

    gsb_OR: Tensor
    """``s g ∘ B`` in the dtype of the products."""
    wide_gsb_OR: Tensor
    """The same in the dtype of B."""
    gain_O: Tensor | None
    """None for LoRA."""
    gs_O1: Tensor | None
    """``s g``."""
    rest_O: Tensor | None
    """g - 1 in the dtype of the products; None where g itself loses nothing and there is no bias."""
    shift_O: Tensor | None
    """``(g - 1) ∘ bias``."""
    a_RI: Tensor
    """In the dtype of the products."""
    wide_a_RI: Tensor
    """A itself."""
    n_O: Tensor | None = None
    """The norm, where the gain is m / n and the gradient is m's."""
    clear: bool | None = None
    """Whether no gain is below TINY_GAIN; None: not known."""
    columns_OR: Tensor | None = None
    """A copy of `wide_gsb_OR` laid out by columns, for products of one row: they take half as long. None until a call
    without gradients asks. A training step never reads it: another layout can give other bits."""


_ByRows = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def ready_from(
    a_RI: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    s: float,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Ready:
    """The same from a gain that is at hand."""
    return Ready(*_by_rows(b_OR, gain_O, s, bias_O, dtype), a_RI.to(dtype), a_RI)


def _by_rows(b_OR: Tensor, gain_O: Tensor | None, s: float, bias_O: Tensor | None, dtype: torch.dtype) -> _ByRows:
    """The fields of `Ready` that have a row for each output, in their order."""
    gs_O1 = rest_O = shift_O = None
    if gain_O is not None:
        gs_O1 = (gain_O * s)[:, None]
        if bias_O is not None or dtype != gain_O.dtype:
            rest_O = (gain_O - 1).to(dtype)
            shift_O = None if bias_O is None else rest_O * bias_O.to(dtype)
    wide_OR = b_OR * (s if gs_O1 is None else gs_O1)
    return wide_OR.to(dtype), wide_OR, gain_O, gs_O1, rest_O, shift_O
