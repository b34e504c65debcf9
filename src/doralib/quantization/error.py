"""What quantising a merged weight again does to the change that was merged in."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..functional import Rows, row_blocks

# from here on the error is no longer small beside the change: the merged model need not answer as the adapted one
SWALLOWED = 0.5


@dataclass(frozen=True)
class QuantizationCost:
    """One layer, W before, V = g ∘ (W + s B A) as merged, Q what V became in the storage."""

    layer: str
    storage: str
    """E.g. ``"bitsandbytes nf4"``."""
    of_change: float
    """|Q - V| / |V - W|: 1 where the storage swallows the change whole; 0 where nothing was to change."""
    of_weight: float
    """|Q - V| / |V|."""

    @classmethod
    @torch.no_grad()
    def measure(cls, layer: str, storage: str, W: Rows, V_OI: Tensor, Q: Rows) -> "QuantizationCost":
        """Frobenius norms, by row blocks."""
        sums = torch.zeros(3, dtype=torch.float64)
        for rows in row_blocks(*V_OI.shape):
            w, v, q = (block[rows].double() for block in (W, V_OI, Q))
            sums += torch.stack([(q - v).square().sum(), (v - w).square().sum(), v.square().sum()]).cpu()
        error, change, weight = sums.sqrt().tolist()
        return cls(layer, storage, _over(error, change), _over(error, weight))


def is_change_lost(layers: Sequence[QuantizationCost]) -> bool:
    """Whether the storage's error drowns what was merged in."""
    return bool(layers) and median(layer.of_change for layer in layers) > SWALLOWED


def find_worst(layers: Sequence[QuantizationCost]) -> QuantizationCost:
    """The layer that lost most of its change."""
    return max(layers, key=lambda layer: layer.of_change)


def format_costs(layers: Sequence[QuantizationCost]) -> str:
    """A line for each kind of layer, q_proj and so on, with the worst layer of it."""
    kinds = defaultdict(list)
    for layer in layers:
        kinds[layer.layer.rpartition(".")[2], layer.storage].append(layer)
    width = max((len(kind) for kind, _ in kinds), default=0)
    lines = ["requantisation error, median over the layers, as a share of the merged change and of the weight:"]
    for (kind, storage), group in kinds.items():
        change, weight = (median(getattr(layer, share) for layer in group) for share in ("of_change", "of_weight"))
        bad = find_worst(group)
        lines.append(
            f"  {kind:{width}}  x{len(group):<3} {storage}: {change:7.1%} of the change, {weight:6.2%} of the weight; "
            f"worst {bad.layer}, {bad.of_change:.1%} of its change"
        )
    return "\n".join(lines)


def _over(error: float, size: float) -> float:
    return error / size if size else math.inf if error else 0.0
