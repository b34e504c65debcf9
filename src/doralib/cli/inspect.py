"""`doralib inspect`: what is in an adapter."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ..errors import list_some
from .console import console, print_json
from .options import AllowNonfinite, Alpha, Component, Json, Revision

if TYPE_CHECKING:
    from ..experiments.analyze.movement import Movement
    from ..formats.base import Hints, ParsedAdapter
    from ..state import AdapterState, LayerAdapter


def inspect_command(
    adapter: Annotated[Path, typer.Argument(help="A run, an adapter folder or a file of any format.")],
    base: Annotated[
        str | None, typer.Option(help="Also say how far lengths and directions moved from this model.")
    ] = None,
    revision: Revision = None,
    alpha: Alpha = None,
    allow_nonfinite: AllowNonfinite = False,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """Say what is in an adapter.

    Of any format: layers, ranks, scales, what had to be assumed, and how far it moved.
    """
    from ..formats.base import Hints
    from ..hub import add_revision, fetch_folder

    adapter = fetch_folder(add_revision(adapter, revision))
    found = read_inspected(adapter, base, Hints(alpha=alpha, component=component, allow_nonfinite=allow_nonfinite))
    if as_json:
        print_json(describe_inspected(found))
    else:
        console.print(show_inspected(found))


class Inspected(NamedTuple):
    """What an adapter's files say, and how far it moved from a base."""

    adapter: Path
    form: str
    found: "ParsedAdapter"
    notes: tuple[str, ...]
    moved: "dict[str, Movement]"


def inspect_adapter(adapter: Path, base: str | None = None, given: "Hints | None" = None) -> Group:
    """Format, settings, what had to be assumed; then a line a layer: shape, rank, scale, sizes.

    Against a base also how far each layer moved, a layer in memory at a time; formats that need a base's names or heads
    need it too.

    Raises:
        UsageError: if there is no adapter or no base of that name.
        DoraError: if a file is damaged or the adapter is not of this base.
    """
    return show_inspected(read_inspected(adapter, base, given))


def read_inspected(adapter: Path, base: str | None = None, given: "Hints | None" = None) -> Inspected:
    """What `inspect_adapter` shows; raises as it does."""
    from ..checkpoints.adapter import check_one_model, describe_base, find_other_base, read_for_base
    from ..checkpoints.gguf import open_base_folder
    from ..checkpoints.safetensors import Checkpoint
    from ..experiments.analyze.movement import movements
    from ..formats.base import Hints
    from ..formats.files import find_adapter_file

    find_adapter_file(adapter)
    with ExitStack() as stack:
        checkpoint, known = None, Hints()
        if base:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))) / "base"
            folder = stack.enter_context(open_base_folder(base, scratch))
            check_one_model(folder)
            checkpoint = Checkpoint.open(folder)
            known = describe_base(known, checkpoint)
        form, found = read_for_base(adapter, given or Hints(), known)
        moved = movements(found.state, checkpoint) if checkpoint else {}
    notes = (*found.notes, *(find_other_base(found.state.base_model, base) if base else ()))
    return Inspected(adapter, form, found, notes, moved)


def describe_inspected(seen: Inspected) -> dict[str, Any]:
    """The same as plain values: the adapter's settings, and a mapping for each layer."""
    from ..experiments.analyze.movement import change_norm

    state, config = seen.found.state, seen.found.config
    layers = [
        {
            "name": name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "r": layer.rank,
            "scale": layer.scale,
            "change_norm": change_norm(layer),
            "magnitude": None if layer.m_O is None else [layer.m_O.min().item(), layer.m_O.max().item()],
            **({} if name not in seen.moved else seen.moved[name]._asdict()),
        }
        for name, layer in state.layers.items()
    ]
    return {
        "adapter": str(seen.adapter),
        "format": seen.form,
        "base": state.base_model,
        "config": config.model_dump(mode="json"),
        "whole": list(state.extra),
        "notes": list(seen.notes),
        "layers": layers,
    }


def show_inspected(seen: Inspected) -> Group:
    """The same for the terminal."""
    adapter, form, found, notes, moved = seen
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


def _summary(adapter: Path, form: str, found: "ParsedAdapter", notes: Sequence[str]) -> Text:
    config, state = found.config, found.state
    tensors = [t for layer in state.layers.values() for t in layer.tensors().values()]
    count = sum(t.numel() for t in [*tensors, *state.extra.values(), *(rows.rows_ND for rows in state.rows.values())])
    lines = [
        f"{adapter} ({form}): {config.method}, {len(state.layers)} layers, {count:,} parameters, "
        f"base {state.base_model or 'not named'}",
        f"{_ranks(state)}, lora_alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g} ({config.dropout_mode}), "
        f"rslora {config.use_rslora}, bias {config.bias}",
    ]
    if state.extra:
        lines.append(f"saved whole: {', '.join(state.extra)}")
    for name, rows in state.rows.items():
        lines.append(f"tokens of {name}: {list_some([str(i) for i in rows.index_N.tolist()], 8, ', ')}")
    lines += [f"note: {note}" for note in notes]
    return Text("\n".join(lines))


def _ranks(state: "AdapterState") -> str:
    """The ranks there are, the commonest first, and how many layers have only their lengths trained."""
    alone = [name for name, layer in state.layers.items() if layer.magnitude_alone]
    counts = Counter(layer.rank for name, layer in state.layers.items() if name not in alone)
    ranks = ", ".join(str(rank) if len(counts) == 1 else f"{rank} (x{n})" for rank, n in counts.most_common())
    lengths = f"{len(alone)} layers of magnitude alone" if alone else ""
    return "; ".join(part for part in (f"r {ranks}" if ranks else "", lengths) if part) or "no layers"


def _shape(layer: "LayerAdapter") -> str:
    shown = str(layer.shape)
    return shown if layer.kind == "linear" else f"{shown} {layer.kind.replace('_', ' ')}"


def _sizes(layer: "LayerAdapter") -> tuple[str, str]:
    from ..experiments.analyze.movement import change_norm

    # float8 has no smallest and largest of its own
    m_O = None if layer.m_O is None else layer.m_O.float()
    span = "-" if m_O is None else f"{m_O.min().item():.3g} .. {m_O.max().item():.3g}"
    return f"{change_norm(layer):.4g}", span


def _moved(movement: "Movement | None") -> tuple[str, ...]:
    return () if movement is None else (f"{movement.length:.3%}", f"{movement.direction:.3g}")
