"""`doralib eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import UsageError
from .console import bars, console
from .options import Alpha, Base, Batch, Dtype, Model, Seed

if TYPE_CHECKING:
    from ..evaluation.evaluate import TaskResult

_WRONG_SHOWN = 5
_PROMPT_SHOWN = 300  # characters: the end of a prompt says most


def eval_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names or YAML files, separated by commas.")],
    out: Annotated[Path | None, typer.Option(help="Write results.json here.")] = None,
    base: Base = None,
    alpha: Alpha = None,
    dtype: Dtype = "auto",
    batch_size: Batch = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first examples of each task.")] = None,
    seed: Seed = 0,
) -> None:
    """Score a base, adapted or merged model."""
    from ..checkpoints.load import load_model
    from ..evaluation.evaluate import evaluate
    from ..evaluation.task_file import load_tasks
    from ..files import check_writable, write_json
    from ..formats.base import Hints

    chosen = load_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    if not chosen:
        raise UsageError("--tasks names no task: give names or YAML files, separated by commas")
    if out is not None:
        check_writable(out, "--out", folder=False)
    loaded, tokenizer = load_model(model, base=base, dtype=dtype, given=Hints(alpha=alpha))
    with bars() as tick:
        results = evaluate(loaded, tokenizer, chosen, batch_size=batch_size, limit=limit, seed=seed, tick=tick)
    console.print(results_table(results, title=model))
    for name, result in results.items():
        console.print(wrong_answers(name, result))
    if out is not None:
        write_json(out, {"model": model, "after": {name: result.to_json() for name, result in results.items()}})
        console.print(f"written: {out}")


def results_table(results: Mapping[str, "TaskResult"], title: str) -> Table:
    """A table for the terminal, a line for each metric."""
    table = Table(title=title)
    for name, justify in (("Task", "left"), ("Rows", "right"), ("Metric", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("Value", "95 % interval"):
        table.add_column(name, justify="right")
    for result in results.values():
        first = [result.task, str(result.n)]
        for name, score in result.metrics.items():
            interval = f"{_score_text(name, score.low)} to {_score_text(name, score.high)}"
            table.add_row(*first, name.replace("_", " "), _score_text(name, score.value), interval)
            first = ["", ""]
    return table


def wrong_answers(name: str, result: "TaskResult") -> Group:
    """A table of the first mistakes for the terminal; nothing where there are none."""
    if not result.wrong:
        return Group()
    num_wrong = result.n - round(result.metrics["accuracy"].value * result.n)
    table = Table(title=f"{name}: {num_wrong} of {result.n} answers are wrong", show_lines=True)
    for column in ("Prompt", "Expected", "Predicted"):
        table.add_column(column, overflow="fold")
    for wrong in result.wrong[:_WRONG_SHOWN]:
        prompt = wrong["prompt"].strip()
        prompt = prompt if len(prompt) <= _PROMPT_SHOWN else "..." + prompt[-_PROMPT_SHOWN:]
        said = wrong["predicted"] or f"(no answer in: {wrong.get('output', '').strip()})"
        # Text: brackets in data are not markup
        table.add_row(*(Text(cell) for cell in (prompt, wrong["expected"], said)))
    return Group(table)


def _score_text(metric: str, value: float) -> str:
    """Shares in per cent, the rest as numbers."""
    return f"{100 * value:.1f} %" if metric in {"accuracy", "macro_f1", "token_f1"} else f"{value:.3f}"
