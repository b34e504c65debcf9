"""`doralib compare`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import DoraError, UsageError, check_given_once, collecting, raise_all
from .console import console, print_json, sigterm_as_ctrl_c
from .options import Json

if TYPE_CHECKING:
    from ..experiments.compare.study import Comparison


def compare_command(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a packaged recipe (`doralib recipes`).")],
    out: Annotated[Path, typer.Option(help="The folder of all runs and results; the same command goes on in it.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings given again, for every run.")
    ] = None,
    methods: Annotated[str, typer.Option(help="full, lora, dora, vera, dvora; separated by commas.")] = "lora,dora",
    ranks: Annotated[str | None, typer.Option(help="e.g. 4,8,16; left out: the recipe's own.")] = None,
    lrs: Annotated[str, typer.Option(help="auto: searched for each method and rank; or a list of rates.")] = "auto",
    seeds: Annotated[str, typer.Option(help="e.g. 0,1,2; rates are chosen by the first: see --tune-seeds.")] = "0",
    tune_seeds: Annotated[int, typer.Option(min=1, help="So many of the seeds choose the rates, by their mean.")] = 1,
    axis: Annotated[str | None, typer.Option(help="A setting to vary too: KEY=V1,V2.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="With --lrs auto: rates to try for each method and rank.")] = 5,
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Stop runs that fall behind (successive halving, by Optuna).")
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep those of finished runs, e.g. for analyze.")
    ] = False,
    launcher: Annotated[str, typer.Option(help="local, slurm (by submitit) or ray (an existing cluster).")] = "local",
    at_once: Annotated[int, typer.Option(min=1, help="Methods and ranks that are worked on at the same time.")] = 1,
    commands: Annotated[
        bool, typer.Option("--commands", help="Write the recipes and print the commands; run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The same job by several methods, ranks, rates and seeds.

    Every run is an ordinary one; what is finished is not done again.
    """
    problems: list[DoraError] = []
    lists: dict[str, list[Any]] = {}
    for option, text, kind in (
        ("--methods", methods, str),
        ("--ranks", ranks, int),
        ("--lrs", None if lrs == "auto" else lrs, float),
        ("--seeds", seeds, int),
    ):
        with collecting(problems):
            lists[option] = [] if text is None else _split(option, text, kind)
    with collecting(problems):
        key, values = _read_axis(axis)
    from ..experiments.compare.launch import find_launcher
    from ..training.early import check_early
    from ..training.recipe_file import read_recipe

    with collecting(problems):
        launch = find_launcher(launcher)
    missing: list[DoraError] = []
    with collecting(problems):
        check_given_once(changes or [])
        chosen = read_recipe(recipe, changes or [])
        with collecting(missing):
            check_early(chosen)
    if problems:
        raise_all([*problems, *missing])
    from ..experiments.compare.grid import Grid, check_grid
    from ..experiments.compare.report import write_comparison
    from ..experiments.compare.study import compare, list_commands

    grid = Grid(
        recipe=chosen,
        methods=tuple(lists["--methods"]),
        ranks=tuple(lists["--ranks"]) or (chosen.adapter.r,),
        seeds=tuple(lists["--seeds"]),
        out=out,
        rates=tuple(lists["--lrs"]),
        axis=key,
        axis_values=values,
        tune_seeds=tune_seeds,
        budget=budget,
        stop_early=stop_early,
        keep_checkpoints=keep_checkpoints,
    )
    if missing:
        # what is wrong with the grid is told with it
        with collecting(missing):
            check_grid(grid)
        raise_all(missing)
    if commands:
        for command in list_commands(grid):
            print(command)
        return
    # as Ctrl-C: a run that nobody watches any more is stopped with a checkpoint
    with sigterm_as_ctrl_c():
        comparison = compare(grid, launch, at_once=at_once)
    written = write_comparison(comparison)
    _show(comparison)
    console.print(f"written: {', '.join(str(path) for path in written[:2])}, and figures")
    if as_json:
        print_json(_describe(comparison))


def _show(comparison: "Comparison") -> None:
    from ..experiments.compare.report import cell_rows, difference_rows, explain_diverged, explain_ends
    from ..experiments.compare.table import compare_methods, diverged_runs, rates_at_an_end, summarize

    if diverged := diverged_runs(comparison):
        console.print(explain_diverged(diverged))
    if ends := rates_at_an_end(comparison):
        console.print(explain_ends(ends))
    console.print(_table("means over the seeds", *cell_rows(comparison, summarize(comparison))))
    differences = compare_methods(comparison)
    if differences:
        console.print(_table("differences in rows that are right", *difference_rows(comparison, differences)))


def _describe(comparison: "Comparison") -> dict[str, Any]:
    from ..experiments.compare.table import compare_methods, summarize

    return {
        "base": {name: result.to_json() for name, result in comparison.base.items()},
        "cells": [asdict(each) for each in summarize(comparison)],
        "differences": [asdict(each) for each in compare_methods(comparison)],
    }


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _split(option: str, text: str, kind: type) -> list[Any]:
    """The values between commas.

    Raises:
        UsageError: if there is none, one is of another kind, or one is there twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        values = [kind(word) for word in words]
    except ValueError:
        what = {int: "whole numbers", float: "numbers"}[kind]
        raise UsageError(f"{option} {text}: should be {what}, separated by commas") from None
    if not values or len(set(values)) < len(values):
        raise UsageError(f"{option} {text!r}: " + ("a value is there twice" if values else "names nothing"))
    return values


def _read_axis(axis: str | None) -> tuple[str | None, tuple[str, ...]]:
    if axis is None:
        return None, ()
    key, found, values = axis.partition("=")
    if not found or not key:
        raise UsageError(f"--axis {axis}: is written KEY=V1,V2, such as adapter.magnitude_lr_ratio=1,10")
    return key, tuple(_split("--axis", values, str))
