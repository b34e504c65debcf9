"""`doralib inspect` and `doralib targets`: what is in an adapter, and what in a model could take one."""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .. import functional as F
from ..bases import open_base
from ..config import DoraConfig, ModelSettings
from ..experts import Stack, expert_weights
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
    stacks = expert_weights(model)
    for name, layer in state.layers.items():
        moved = []
        for W_OI, (a_RI, b_OR, m_O) in _weights(model, stacks.get(name), name, layer):
            V_OI = F.merge_weight(W_OI, a_RI, b_OR, m_O, layer.scale)
            length_O, direction_O = F.moved(W_OI, V_OI)
            moved.append((length_O / F.row_norm_sq(W_OI).sqrt().clamp_min(1e-30), direction_O))
        lengths, directions = (torch.cat(each) for each in zip(*moved, strict=True))
        out[name] = Movement(lengths.mean().item(), directions.mean().item())
    return out


def _weights(
    model: nn.Module, stack: Stack | None, name: str, layer: LayerAdapter
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]]:
    """The frozen weight and its A, B and m; those of every expert, one after the other, of a stack."""
    if stack is None:
        frozen = open_base(model.get_submodule(name))
        assert frozen is not None
        yield frozen.W_OI.T if layer.kind == "token_embedding" else frozen.W_OI, (*layer.factors, layer.m_O)
    else:
        for e, W_OI in enumerate(stack.W_EOI):
            yield W_OI, (layer.a_RI[e], layer.b_OR[e], None if layer.m_O is None else layer.m_O[e])


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
    stacks: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, stack in expert_weights(loaded).items():
        stacks[name if every else ".".join(name.split(".")[-2:]), stack.shape].append(name)
    for (kind, (E, O, I)), names in stacks.items():
        cost = len(names) * E * (16 * (O + I) + O)
        table.add_row(kind, str(len(names)), f"{E} x ({O}, {I})", f"{cost:,}", f"target_parameters: {names[0]}")
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
    # |B A|² = tr((BᵀB)(A Aᵀ)): no (O, I) product; of experts the sum
    a, b = (factor.float() for factor in layer.factors)
    size = layer.scale * ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt().item()
    span = "-" if layer.m_O is None else f"{layer.m_O.min().item():.3g} .. {layer.m_O.max().item():.3g}"
    return f"{size:.4g}", span


def _moved(movement: Movement | None) -> tuple[str, ...]:
    return () if movement is None else (f"{movement.length:.3%}", f"{movement.direction:.3g}")
