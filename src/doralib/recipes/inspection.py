"""`doralib inspect` and `doralib targets`: what is in an adapter, and what in a model could take one."""

import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .. import functional as F
from ..bases import open_base
from ..config import DoraConfig, ModelSettings
from ..inject import read_adapter
from ..models import load_model
from ..state import AdapterState, LayerAdapter
from ..targets import adaptable


class Movement(NamedTuple):
    """How far one layer went from its base, as means over its output rows."""

    length: float
    """| |v| - |w| | / |w|."""
    direction: float
    """1 - cos(v, w)."""


def inspect_adapter(adapter: Path, base: str | None = None) -> Group:
    """Settings, then a line a layer: shape, rank, scale, sizes and, against a base, how far it moved.

    Raises:
        UsageError: if there is no adapter or no base of that name.
        DoraError: if a file is damaged or the adapter is not of this base.
    """
    config, state = read_adapter(adapter)
    moved = movements(state, base) if base else {}
    table = Table("layer", "(out, in)", "r", "scale", "|s B A|", "m min .. max")
    for heading in ("length moved", "direction moved") if moved else ():
        table.add_column(heading, justify="right")
    for name, layer in state.layers.items():
        table.add_row(
            name, str(layer.shape), str(layer.rank), f"{layer.scale:g}", *_sizes(layer), *_moved(moved.get(name))
        )
    return Group(_summary(adapter, config, state), table)


def movements(state: AdapterState, base: str) -> dict[str, Movement]:
    """How far every layer moved from the base model (a name or path)."""
    model, _ = load_model(ModelSettings(path=base))
    out = {}
    for name, layer in state.layers.items():
        frozen = open_base(model.get_submodule(name))
        assert frozen is not None
        V_OI = F.merge_weight(frozen.W_OI, *layer.factors, layer.m_O, layer.scale)
        length_O, direction_O = F.moved(frozen.W_OI, V_OI)
        relative = length_O / frozen.row_norm_sq().sqrt().clamp_min(1e-30)
        out[name] = Movement(relative.mean().item(), direction_O.mean().item())
    return out


def list_targets(model: str, *, every: bool = False) -> Table:
    """The layers that can be adapted, a line a kind (or every one), with shapes and what rank 16 would cost."""
    loaded, _ = load_model(ModelSettings(path=model))
    layers = adaptable(loaded)
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in layers.items():
        kinds[name if every else name.rpartition(".")[2], shape].append(name)
    table = Table("target_modules", "count", "(out, in)", "parameters at r 16", "for example", title=model)
    for (kind, shape), names in kinds.items():
        cost = len(names) * (16 * (shape[0] + math.prod(shape[1:])) + shape[0])
        table.add_row(kind, str(len(names)), str(shape), f"{cost:,}", names[0])
    return table


def _summary(adapter: Path, config: DoraConfig, state: AdapterState) -> Text:
    tensors = [t for layer in state.layers.values() for t in layer.tensors().values()]
    count = sum(t.numel() for t in [*tensors, *state.extra.values()])
    lines = [
        f"{adapter}: {config.method}, {len(state.layers)} layers, {count:,} parameters, base {state.base_model}",
        f"r {config.r}, lora_alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g} ({config.dropout_mode}), "
        f"rslora {config.use_rslora}, bias {config.bias}",
    ]
    if state.extra:
        lines.append(f"saved whole: {', '.join(state.extra)}")
    return Text("\n".join(lines))


def _sizes(layer: LayerAdapter) -> tuple[str, str]:
    # |B A|² = tr((BᵀB)(A Aᵀ)): no (O, I) product
    a, b = (factor.float() for factor in layer.factors)
    size = layer.scale * ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt().item()
    span = "-" if layer.m_O is None else f"{layer.m_O.min().item():.3g} .. {layer.m_O.max().item():.3g}"
    return f"{size:.4g}", span


def _moved(movement: Movement | None) -> tuple[str, ...]:
    return () if movement is None else (f"{movement.length:.3%}", f"{movement.direction:.3g}")
