"""The best LoRA of a given rank in place of DoRA, for servers that run LoRA alone; a layer at a time."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DoraError, list_some
from ..functional import merged_change
from ..state import AdapterState, ExpertsValues, LayerAdapter
from .adapter import read_base_rows
from .safetensors import Checkpoint

# above this many rows and columns the whole decomposition takes minutes a layer
_WHOLE = 1024
# more columns than are wanted, and rounds of the power iteration: together the error is within a percent of the least
_SPARE, _ROUNDS = 16, 8


@dataclass(frozen=True)
class Approximation:
    """How well a LoRA stands for one layer's change."""

    layer: str
    rank: int
    relative: float
    """|change - LoRA| / |change|, Frobenius norms; 0 where nothing changed."""
    of_weight: float
    """|change - LoRA| / |W|."""


def approximate(state: AdapterState, checkpoint: Checkpoint, rank: int) -> tuple[AdapterState, list[Approximation]]:
    """Find for each layer the LoRA of this rank that is nearest to its change of the base weight, with s = 1.

    Raises:
        DoraError: if the adapter does not fit the checkpoint: everything, at once.
    """
    if turned := [name for name, layer in state.layers.items() if layer.kind == "transposed_convolution"]:
        raise DoraError(
            f"a transposed convolution has no LoRA in PEFT: {list_some(turned, 5, ', ')}; merge the adapter"
        )
    layers, errors = {}, []
    for name, layer, W_OI in read_base_rows(state, checkpoint):
        layers[name], error, size = _approximate_layer(layer, W_OI, rank)
        relative = error / size if size else 0.0
        errors.append(Approximation(name, layers[name].rank, relative, error / max(W_OI.float().norm().item(), 1e-30)))
    return replace(state, layers=layers), errors


def _approximate_layer(layer: LayerAdapter, W_OI: Tensor, rank: int) -> tuple[LayerAdapter, float, float]:
    """The nearest LoRA in the form of the layer, and the Frobenius norms of what it misses and of the change."""
    if layer.kind == "experts":
        m = [None] * len(W_OI) if layer.m_O is None else layer.m_O
        experts = zip(W_OI, layer.a_RI, layer.b_OR, m, strict=True)
        found = [_approximate_layer(LayerAdapter(a, b, m_O, layer.scale), W, rank) for W, a, b, m_O in experts]
        loras, errors, sizes = zip(*found, strict=True)
        stacked = (torch.stack([lora.a_RI for lora in loras]), torch.stack([lora.b_OR for lora in loras]))
        return LayerAdapter(values=ExpertsValues(*stacked, None)), math.hypot(*errors), math.hypot(*sizes)
    change_OI = merged_change(W_OI, *layer.factors, layer.m_O, layer.scale)
    lora, error = find_nearest_lora(change_OI, rank)
    a, b, kind = lora.a_RI.reshape(-1, *layer.shape[1:]), lora.b_OR, layer.kind
    if kind == "token_embedding":  # without lengths there is one form of embeddings
        a, b, kind = lora.b_OR.T.contiguous(), lora.a_RI.T.contiguous(), "embedding"
    b = b.reshape(b.shape + (1,) * len(layer.kernel))
    return LayerAdapter(a, b, None, 1.0, kind), error, change_OI.norm().item()


@torch.no_grad()
def find_nearest_lora(change_OI: Tensor, rank: int) -> tuple[LayerAdapter, float]:
    """The LoRA of this rank nearest to a change of weight, and the Frobenius norm of what it misses.

    Small weights are decomposed whole (Eckart and Young: nothing is nearer); large ones by power iteration.
    """
    rank = min(rank, *change_OI.shape)
    if min(change_OI.shape) <= _WHOLE:
        U_OK, S_K, V_KI = torch.linalg.svd(change_OI, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file from the same adapter
            spare = min(rank + _SPARE, *change_OI.shape)
            U_OK, S_K, V_IK = torch.svd_lowrank(change_OI, q=spare, niter=_ROUNDS)
        V_KI = V_IK.T
    root_R = S_K[:rank].sqrt()
    layer = LayerAdapter(
        (root_R[:, None] * V_KI[:rank]).contiguous(), (U_OK[:, :rank] * root_R).contiguous(), None, 1.0
    )
    return layer, torch.addmm(change_OI, layer.b_OR, layer.a_RI, alpha=-1).norm().item()
