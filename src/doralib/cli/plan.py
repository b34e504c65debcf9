"""`doralib plan`."""

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from ..errors import DoraError, UsageError, check_given_once
from .console import console

if TYPE_CHECKING:
    from ..data.rows import RawRows
    from ..recipe import Recipe
    from ..training.plan.estimate import Estimate
    from ..training.plan.sampled import Sampled


def plan_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a packaged recipe (`doralib recipes`).")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings given again, e.g. adapter.r=8")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for so many GPUs instead of this device.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0, help="GiB of each GPU, e.g. 24.")] = None,
    calibration: Annotated[bool, typer.Option(help="Time a few small steps on this device.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Tell memory and time of RECIPE beforehand.

    From the model's config.json: its weights are not read, and the data only where they are at hand.
    """
    from ..checkpoints.parts import settle_parts
    from ..training.plan.estimate import estimate_run
    from ..training.recipe_file import read_recipe

    check_given_once(changes or [])
    chosen = read_recipe(recipe, changes or [])
    with settle_parts(chosen.model, chosen.seed, empty=True) as settings:
        chosen = chosen.model_copy(update={"model": settings})
        rows, sample, told = _read_rows(chosen)
        found = estimate_run(chosen, gpus=gpus, gpu_memory=gpu_memory, rows=rows, sample=sample, calibrate=calibration)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    _show(found, told)


def _read_rows(recipe: "Recipe") -> "tuple[RawRows | None, Callable[[], Sampled], str]":
    """The rows, None if they cannot be read; what makes batches of them, or raises why not; and the same in words."""
    from ..training.modalities import choose_modality
    from ..training.plan.sampled import Sampled

    try:
        modality = choose_modality(recipe)
        rows = modality.check_rows(recipe.data, recipe.seed)
    except (DoraError, OSError) as error:
        why = error

        def refuse() -> Sampled:
            raise UsageError(f"a plan for this kind of model needs its data: {why}")

        return None, refuse, f"the data were not read: {str(error).splitlines()[0]}"
    return rows, partial(Sampled, recipe, modality, rows), ""


def _show(found: "Estimate", told: str) -> None:
    from ..training.plan.parts import in_gib

    if told:
        console.print(told)
    table = Table(Column("part", no_wrap=True), Column("GiB", justify="right", no_wrap=True), "how")
    for part in found.parts:
        table.add_row(*map(Text, (part.name, f"{part.bytes / 2**30:.3f}", part.how)))
    table.add_section()
    table.add_row("together", f"{found.peak_bytes / 2**30:.3f}", "at most, in each process")
    console.print(table)
    processes = "" if found.processes == 1 else f", {found.processes} processes, {found.strategy}"
    console.print(f"device: {found.device}{processes}; batch: {found.rows} rows a process; {found.lengths.told}")
    if found.seconds_per_step is None:
        console.print(f"time: {found.seconds_how}")
    else:
        console.print(f"time: {found.seconds_per_step:.3g} seconds a step ({found.seconds_how})")
    if found.limit_bytes is not None:
        verdict = "fits" if found.fits else "does not fit"
        console.print(
            f"{verdict} in {in_gib(found.limit_bytes)}; the largest batch that does: {found.largest_rows} rows"
        )
    for line in found.advice:
        console.print(f"  {line}")
