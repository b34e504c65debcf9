"""`doralib targets`: what in a model could take an adapter."""

import math
from collections import defaultdict
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..errors import UsageError
from .console import console, print_json
from .options import Json, Revision


def targets_command(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file or a hub name.")],
    revision: Revision = None,
    every: Annotated[bool, typer.Option("--every", help="Every layer, not one line a kind.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run a few tokens and name the layers that would be adapted in vain.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the layers that can be adapted."""
    from ..hub import add_revision

    model = add_revision(model, revision)
    if as_json:
        print_json(describe_layers(model))
        return
    for part in list_targets(model, every=every, probe=probe):
        console.print(part, soft_wrap=isinstance(part, str))


def list_targets(model: str, *, every: bool = False, probe: bool = False) -> list[Table | str]:
    """The layers that can be adapted, and with ``probe`` a line for each that would be adapted in vain."""
    loaded = _load(model)
    if probe and not hasattr(loaded, "config"):
        raise UsageError(f"--probe runs a few tokens, and {model} is a pipeline that draws; leave it out")
    return [_make_table(loaded, title=model, every=every), *(_probe(loaded) if probe else [])]


def describe_layers(model: str) -> list[dict[str, Any]]:
    """Each layer, and stack of experts, that can be adapted: name, shape, and numbers that rank 16 would train."""
    from ..adapters.scan import Scan

    found = Scan(_load(model))
    passed_by = {name for name, each in found.bypassed.items() if each.always}
    layers = [
        {
            "name": name,
            "shape": list(shape),
            "parameters_at_r16": _count(shape),
            "adaptable": name not in found.tied() and name not in passed_by,
        }
        for name, shape in found.shapes.items()
    ]
    stacks = [{"name": name, "shape": list(stack.shape), "stack": True} for name, stack in found.stacks.items()]
    return [*layers, *stacks]


def _load(model: str) -> Any:
    """The model; of a diffusion pipeline its parts, without weights."""
    from ..checkpoints.kind import is_pipeline, read_kind
    from ..checkpoints.models import load_base, load_image_text
    from ..checkpoints.pipelines import load_empty_parts
    from ..recipe import ModelSettings

    if is_pipeline(model):
        return load_empty_parts(model)
    load = load_image_text if read_kind(model) == "image-text" else load_base
    return load(ModelSettings(path=model))[0]


def _count(shape: tuple[int, ...]) -> int:
    """Numbers in A, B and m of a layer at rank 16."""
    return 16 * (shape[0] + math.prod(shape[1:])) + shape[0]


def _probe(loaded: Any) -> list[str]:
    """What the model's source, and one forward and backward pass of a few tokens, say of its layers."""
    import torch

    from ..adapters.audit import probe
    from ..adapters.scan import Scan

    known = [f"{name}: {each}" for name, each in Scan(loaded).bypassed.items()]
    seen = probe(loaded, {"input_ids": torch.arange(1, 9, device=loaded.device)[None]})
    told = f"{len(seen)} layers got no gradient from 8 tokens:" if seen else "every layer tried got a gradient"
    return [*known, told, *map(str, seen)]


def _make_table(loaded: Any, *, title: str, every: bool) -> Table:
    """A line a kind of layer, or a layer, with shapes and what rank 16 would cost."""
    from ..adapters.scan import Scan

    found = Scan(loaded)
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in found.shapes.items():
        kinds[name if every else name.rpartition(".")[2], shape].append(name)
    # no name is cut: they are what recipes need
    table = Table(Column("target_modules", overflow="fold", min_width=14), title=title)
    for heading in ("count", "(out, in)", "parameters at r 16", *(() if every else ("for example",))):
        table.add_column(heading, overflow="fold")
    shared, passed_by = found.tied(), {name for name, each in found.bypassed.items() if each.always}
    for (kind, shape), names in kinds.items():
        cost = len(names) * _count(shape)
        example = () if every else (names[0],)
        told = "none: tied to another" if shared.issuperset(names) else f"{cost:,}"
        told = "none: read without a call" if passed_by.issuperset(names) else told
        table.add_row(kind, str(len(names)), str(shape), told, *example)
    stacks: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, stack in found.stacks.items():
        stacks[name if every else ".".join(name.split(".")[-2:]), stack.shape].append(name)
    for (kind, (E, O, I)), names in stacks.items():
        cost = len(names) * E * (16 * (O + I) + O)
        shown, example = (f"target_parameters: {kind}", ()) if every else (kind, (f"target_parameters: {names[0]}",))
        table.add_row(shown, str(len(names)), f"{E} x ({O}, {I})", f"{cost:,}", *example)
    return table
