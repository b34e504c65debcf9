"""`doralib targets`: what in a model could take an adapter."""

import math
from collections import defaultdict
from typing import Annotated

import typer
from rich.table import Column, Table

from .console import console


def targets_command(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file or a hub name.")],
    every: Annotated[bool, typer.Option("--every", help="Every layer, not one line a kind.")] = False,
) -> None:
    """List the layers that can be adapted."""
    console.print(list_targets(model, every=every))


def list_targets(model: str, *, every: bool = False) -> Table:
    """The layers that can be adapted, a line a kind (or every one), with shapes and what rank 16 would cost."""
    from ..adapters.scan import Scan
    from ..checkpoints.load import load_base
    from ..recipe import ModelSettings

    loaded, _ = load_base(ModelSettings(path=model))
    found = Scan(loaded)
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in found.shapes.items():
        kinds[name if every else name.rpartition(".")[2], shape].append(name)
    # no name is cut: they are what recipes need
    table = Table(Column("target_modules", overflow="fold", min_width=14), title=model)
    for heading in ("count", "(out, in)", "parameters at r 16", *(() if every else ("for example",))):
        table.add_column(heading, overflow="fold")
    shared = found.tied()
    for (kind, shape), names in kinds.items():
        cost = len(names) * (16 * (shape[0] + math.prod(shape[1:])) + shape[0])
        example = () if every else (names[0],)
        told = "none: tied to another" if shared.issuperset(names) else f"{cost:,}"
        table.add_row(kind, str(len(names)), str(shape), told, *example)
    stacks: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, stack in found.stacks.items():
        stacks[name if every else ".".join(name.split(".")[-2:]), stack.shape].append(name)
    for (kind, (E, O, I)), names in stacks.items():
        cost = len(names) * E * (16 * (O + I) + O)
        shown, example = (f"target_parameters: {kind}", ()) if every else (kind, (f"target_parameters: {names[0]}",))
        table.add_row(shown, str(len(names)), f"{E} x ({O}, {I})", f"{cost:,}", *example)
    return table
