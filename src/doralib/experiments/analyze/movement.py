"""How far each layer of an adapter went from its base."""

from typing import NamedTuple

from ... import functional as F
from ...checkpoints.adapter import read_base_rows
from ...checkpoints.safetensors import Checkpoint
from ...state import AdapterState, LayerAdapter


class Movement(NamedTuple):
    """How far one layer went from its base, as means over its output rows."""

    length: float
    """| |v| - |w| | / |w|."""
    direction: float
    """1 - cos(v, w)."""


def movements(state: AdapterState, checkpoint: Checkpoint) -> dict[str, Movement]:
    """How far every layer moved from the base model.

    Raises:
        DoraError: if the adapter is not of this base: everything that does not fit.
    """
    out = {}
    for name, layer, W_OI in read_base_rows(state, checkpoint):
        # rows of all experts, where it is a stack
        V_OI = F.merge_weight(W_OI, *layer.factors, layer.m_O, layer.scale).flatten(0, -2)
        W_OI = W_OI.flatten(0, -2)
        length_O, direction_O = F.moved(W_OI, V_OI)
        relative = length_O / F.row_norm_sq(W_OI).sqrt().clamp_min(1e-30)
        out[name] = Movement(relative.mean().item(), direction_O.mean().item())
    return out


def change_norm(layer: LayerAdapter) -> float:
    """|s B A|, without the (O, I) product; of experts over all of them."""
    # |B A|² = tr((BᵀB)(A Aᵀ))
    a, b = (factor.float() for factor in layer.factors)
    return layer.scale * ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt().item()
