"""`doralib inspect` and `doralib targets`: what is in an adapter, and what in a model could take one."""

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ..adapters.scan import Scan
from ..checkpoints.adapter import another_base, knowing, read_adapter, whole_pipeline
from ..checkpoints.gguf import local_base
from ..checkpoints.load import load_base
from ..checkpoints.safetensors import Checkpoint
from ..experiments.analyze import Movement, movements
from ..formats.base import Found, Given
from ..formats.files import adapter_file
from ..recipe import ModelSettings
from ..state import AdapterState, LayerAdapter


def inspect_adapter(adapter: Path, base: str | None = None, given: Given | None = None) -> Group:
    """Format, settings, what had to be assumed; then a line a layer: shape, rank, scale, sizes.

    Against a base also how far each layer moved, a layer in memory at a time; formats that need a base's names or heads
    need it too.

    Raises:
        UsageError: if there is no adapter or no base of that name.
        DoraError: if a file is damaged or the adapter is not of this base.
    """
    adapter_file(adapter)
    with ExitStack() as stack:
        checkpoint, known = None, Given()
        if base:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "base"
            folder = stack.enter_context(local_base(base, scratch))
            whole_pipeline(folder)
            checkpoint = Checkpoint.open(folder)
            known = knowing(known, checkpoint)
        form, found = read_adapter(adapter, given or Given(), known)
        moved = movements(found.state, checkpoint) if checkpoint else {}
    notes = (*found.notes, *(another_base(found.state.base_model, base) if base else ()))
    state = found.state
    # in a narrow terminal names and numbers go on in a second line; none is cut
    table = Table(Column("layer", overflow="fold", min_width=8), pad_edge=False)
    for heading in ("(out, in)", "r", "scale", "|s B A|", "m min .. max"):
        table.add_column(heading, overflow="fold")
    for heading in ("length moved", "direction moved") if moved else ():
        table.add_column(heading, justify="right", overflow="fold")
    for name, layer in state.layers.items():
        rank = "m alone" if layer.magnitude_alone else str(layer.rank)
        row = (name, _shape(layer), rank, f"{layer.scale:g}", *_sizes(layer), *_moved(moved.get(name)))
        table.add_row(*map(Text, row))
    return Group(_summary(adapter, form, found, notes), table)


def list_targets(model: str, *, every: bool = False) -> Table:
    """The layers that can be adapted, a line a kind (or every one), with shapes and what rank 16 would cost."""
    loaded, _ = load_base(ModelSettings(path=model))
    found = Scan(loaded)
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in found.shapes.items():
        kinds[name if every else name.rpartition(".")[2], shape].append(name)
    # no name is cut: they are what recipes need
    table = Table(Column("target_modules", overflow="fold", min_width=14), title=model)
    for heading in ("count", "(out, in)", "parameters at r 16", *(() if every else ("for example",))):
        table.add_column(heading, overflow="fold")
    for (kind, shape), names in kinds.items():
        cost = len(names) * (16 * (shape[0] + math.prod(shape[1:])) + shape[0])
        example = () if every else (names[0],)
        told = "none: tied to another" if found.tied().issuperset(names) else f"{cost:,}"
        table.add_row(kind, str(len(names)), str(shape), told, *example)
    stacks: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, stack in found.stacks.items():
        stacks[name if every else ".".join(name.split(".")[-2:]), stack.shape].append(name)
    for (kind, (E, O, I)), names in stacks.items():
        cost = len(names) * E * (16 * (O + I) + O)
        shown, example = (f"target_parameters: {kind}", ()) if every else (kind, (f"target_parameters: {names[0]}",))
        table.add_row(shown, str(len(names)), f"{E} x ({O}, {I})", f"{cost:,}", *example)
    return table


def _summary(adapter: Path, form: str, found: Found, notes: Sequence[str]) -> Text:
    config, state = found.config, found.state
    tensors = [t for layer in state.layers.values() for t in layer.tensors().values()]
    count = sum(t.numel() for t in [*tensors, *state.extra.values()])
    lines = [
        f"{adapter} ({form}): {config.method}, {len(state.layers)} layers, {count:,} parameters, "
        f"base {state.base_model or 'not named'}",
        f"{_ranks(state)}, lora_alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g} ({config.dropout_mode}), "
        f"rslora {config.use_rslora}, bias {config.bias}",
    ]
    if state.extra:
        lines.append(f"saved whole: {', '.join(state.extra)}")
    lines += [f"note: {note}" for note in notes]
    return Text("\n".join(lines))


def _ranks(state: AdapterState) -> str:
    """The ranks there are, the commonest first, and how many layers have only their lengths trained."""
    alone = [name for name, layer in state.layers.items() if layer.magnitude_alone]
    counts = Counter(layer.rank for name, layer in state.layers.items() if name not in alone)
    ranks = ", ".join(str(rank) if len(counts) == 1 else f"{rank} (x{n})" for rank, n in counts.most_common())
    lengths = f"{len(alone)} layers of magnitude alone" if alone else ""
    return "; ".join(part for part in (f"r {ranks}" if ranks else "", lengths) if part) or "no layers"


def _shape(layer: LayerAdapter) -> str:
    shown = str(layer.shape)
    return shown if layer.kind == "linear" else f"{shown} {layer.kind.replace('_', ' ')}"


def _sizes(layer: LayerAdapter) -> tuple[str, str]:
    # |B A|² = tr((BᵀB)(A Aᵀ)): no (O, I) product; of experts the sum
    a, b = (factor.float() for factor in layer.factors)
    size = layer.scale * ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt().item()
    span = "-" if layer.m_O is None else f"{layer.m_O.min().item():.3g} .. {layer.m_O.max().item():.3g}"
    return f"{size:.4g}", span


def _moved(movement: Movement | None) -> tuple[str, ...]:
    return () if movement is None else (f"{movement.length:.3%}", f"{movement.direction:.3g}")
