"""`doralib analyze`."""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import DoraError, UsageError, collecting, did_you_mean, raise_all
from .console import console, print_json
from .options import Alpha, Component, Json, Revision

if TYPE_CHECKING:
    from ..experiments.analyze.measure import WeightMovement
    from ..experiments.analyze.sources import Source


def analyze_command(
    base: Annotated[str, typer.Argument(help="The untouched model: a folder, a .gguf file or a hub name.")],
    tuned: Annotated[list[Path], typer.Argument(help="Runs, adapters of any format, or folders of tuned models.")],
    out: Annotated[Path, typer.Option(help="analysis.csv, analysis.html and figures/ go here.")],
    steps: Annotated[str, typer.Option(help="last, or all: every checkpoint of each run.")] = "last",
    modules: Annotated[
        str | None, typer.Option(help="e.g. q_proj,v_proj; left out: every matrix that was tuned.")
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Singular values and intruder dimensions too; slow on large matrices.")
    ] = False,
    revision: Revision = None,
    alpha: Alpha = None,
    component: Component = None,
    as_json: Json = False,
) -> None:
    """How far lengths and directions of every weight moved.

    The paper's ΔM and ΔD by layer and matrix, their correlation, and its Figures 2 and 3.
    """
    from ..checkpoints.adapter import check_one_model
    from ..checkpoints.gguf import open_base_folder
    from ..checkpoints.safetensors import Checkpoint
    from ..disk import check_writable
    from ..experiments.analyze.measure import measure
    from ..experiments.analyze.report import write_analysis
    from ..experiments.analyze.sources import find_sources
    from ..experiments.statistics import import_stats
    from ..formats.base import Hints

    if steps not in ("last", "all"):
        raise UsageError(f"--steps {steps}: is last or all")
    tuned = _fetch_all(tuned, revision)
    check_writable(out, "--out", folder=True)
    import_stats()
    wanted = [name.strip() for name in (modules or "").split(",") if name.strip()]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "base"
        folder = stack.enter_context(open_base_folder(base, scratch))
        check_one_model(folder)
        checkpoint, given = Checkpoint.open(folder), Hints(alpha=alpha, component=component)
        problems: list[DoraError] = []
        sources: list[Source] = []
        for path in tuned:
            with collecting(problems):
                sources += find_sources(path, checkpoint, every_step=steps == "all", given=given)
        raise_all(problems)
        known = {name.split(".")[-2] for name in checkpoint.slots if name.endswith(".weight")}
        if unknown := [name for name in wanted if name not in known]:
            raise UsageError(f"--modules: the base has no {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        found = list(measure(sources, wanted, spectra=spectra))
    if not found:
        raise UsageError(f"none of the tuned models changed {', '.join(wanted) or 'a matrix'}")
    written = write_analysis(out, found, base)
    console.print(_table(found))
    console.print(f"written: {written[0]}, {written[-1]}, and figures")
    if as_json:
        from ..experiments.analyze.correlate import correlate

        correlations = [asdict(each) for each in correlate(found)]
        print_json({"weights": [asdict(each) for each in found], "correlations": correlations})


def _fetch_all(tuned: list[Path], revision: str | None) -> list[Path]:
    """The folders of the tuned models, those of the hub too.

    Raises:
        UsageError: if two have one name.
    """
    from ..hub import add_revision, fetch_folder

    if twice := sorted({path.name for path in tuned if [each.name for each in tuned].count(path.name) > 1}):
        raise UsageError(f"{', '.join(twice)}: two folders have this name, by which results are told apart; rename one")
    return [fetch_folder(add_revision(each, revision)) for each in tuned]


def _table(movements: "list[WeightMovement]") -> Table:
    from ..experiments.analyze.correlate import correlate
    from ..experiments.analyze.report import correlation_rows

    head, rows = correlation_rows(correlate(movements))
    table = Table(title="correlation of ΔD and ΔM, with 95 % intervals", title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
