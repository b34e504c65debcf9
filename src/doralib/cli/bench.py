"""`doralib bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from ..errors import UsageError, check_given_once
from .console import console, print_json
from .options import Json

if TYPE_CHECKING:
    from ..experiments.bench.tables import Report, Table


def bench_command(
    name: Annotated[
        str,
        typer.Argument(help="step, layer, memory, qdora, rank, generate, adapt, accelerate, profile, merge or all."),
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. rounds=5")] = None,
    out: Annotated[Path, typer.Option(help="NAME.json, NAME.md and NAME.png go here.")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run?")] = False,
    as_json: Json = False,
) -> None:
    """Measure time and memory.

    Against LoRA, PEFT and the frozen model, in turns, in one run.
    """
    from ..disk import check_writable
    from ..experiments.bench.runner import run_bench
    from ..files import read_json

    if bare := [option for option in options or [] if "=" not in option]:
        raise UsageError(f"bench: options are KEY=VALUE, got {', '.join(bare)}")
    check_given_once(options or [])
    check_writable(out, "--out", folder=True)
    settings = dict(option.split("=", 1) for option in options or [])
    reports: list[Report] = []

    def show(report: "Report") -> None:
        reports.append(report)
        _show(report, out)

    run_bench(name, out, quick=quick, done=show, **settings)
    if as_json:
        print_json({report.name: read_json(out / f"{report.name}.json") for report in reports})


def _show(report: "Report", out: Path) -> None:
    from ..experiments.bench.tables import goal_table

    for table in [*report.tables, *([goal_table(report.goals)] if report.goals else [])]:
        console.print(rich_table(table))
    console.print(f"written: {out / report.name}.json, .md and .png")


def rich_table(table: "Table") -> RichTable:
    """For the terminal; in a narrow one figures go on in a second line, and no name is cut or broken."""
    shown = RichTable(title=table.title, title_justify="left")
    names = all(" " not in row[0] for row in table.rows)
    for i, column in enumerate(table.columns):
        # the columns that may wrap give way first; sentences in the first one wrap at their words
        shown.add_column(column, justify="right" if i else "left", overflow="fold", no_wrap=names and not i)
    for row in table.rows:
        shown.add_row(*row)
    return shown
