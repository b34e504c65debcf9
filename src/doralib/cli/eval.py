"""`doralib eval`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import UsageError, did_you_mean
from .console import bars, console
from .options import Alpha, Base, Batch, Dtype, Model, Seed

if TYPE_CHECKING:
    from ..evaluation.evaluate import TaskResult

COMMONSENSE = {"boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"}
"""The tasks whose average the paper prints."""

_WRONG_SHOWN = 5
_PROMPT_SHOWN = 300  # characters: the end of a prompt says most


def eval_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names or YAML files, separated by commas.")],
    out: Annotated[Path | None, typer.Option(help="Write results.json here, after each task.")] = None,
    base: Base = None,
    alpha: Alpha = None,
    dtype: Dtype = "auto",
    batch_size: Batch = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first examples of each task.")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out the tasks that --out has already.")] = False,
    published: Annotated[
        str | None, typer.Option(help="A packaged recipe, whose published scores are shown beside.")
    ] = None,
) -> None:
    """Score a base, adapted or merged model."""
    from ..checkpoints.load import load_model
    from ..evaluation.evaluate import evaluate, read_all
    from ..evaluation.results_file import ResultsFile
    from ..evaluation.task_file import load_tasks
    from ..files import check_writable
    from ..formats.base import Hints

    chosen = load_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    if not chosen:
        raise UsageError("--tasks names no task: give names or YAML files, separated by commas")
    if resume and out is None:
        raise UsageError("--resume needs --out, the file that has the results so far")
    beside = _find_published(published)
    file = None
    if out is not None:
        check_writable(out, "--out", folder=False)
        settings = {"model": model, "base": base, "alpha": alpha, "dtype": dtype, "limit": limit, "seed": seed}
        file = ResultsFile(out, settings)
    results = file.read(chosen) if file and resume else {}
    left = [task for task in chosen if task.name not in results]
    read_all(left, limit)
    if left:
        loaded, tokenizer = load_model(model, base=base, dtype=dtype, given=Hints(alpha=alpha))
    with bars() as tick:
        for task in left:
            found = evaluate(loaded, tokenizer, [task], batch_size=batch_size, limit=limit, seed=seed, tick=tick)
            results |= found
            if file:
                file.add(task, found[task.name])
    results = {task.name: results[task.name] for task in chosen}
    console.print(results_table(results, title=model))
    if beside is not None:
        console.print(published_table(results, beside, title=f"{model}, and {published} as published"))
    for name, result in results.items():
        console.print(wrong_answers(name, result))
    if out is not None:
        console.print(f"written: {out}")


def _find_published(recipe: str | None) -> "Mapping[str, float] | None":
    if recipe is None:
        return None
    from ..training.recipe_file import packaged_recipes

    known = packaged_recipes()
    if recipe not in known:
        raise UsageError(f"--published: there is no packaged recipe {recipe!r}{did_you_mean(recipe, known)}")
    scores = known[recipe].published
    if not scores:
        having = ", ".join(each.name for each in known.values() if each.published)
        raise UsageError(f"--published: no result of {recipe} was published; there are those of {having}")
    return scores


def published_table(results: Mapping[str, "TaskResult"], published: Mapping[str, float], title: str) -> Table:
    """Accuracy in per cent beside the published one, a line for each task, and the average of the tasks they share."""
    table = Table(title=title)
    for name, justify in (("Task", "left"), ("Here", "right"), ("Published", "right"), ("Difference", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    # boolq, boolq-clean and boolq-likelihood are one data set
    here = {
        name.removesuffix("-likelihood").removesuffix("-clean"): 100 * result.metrics["accuracy"].value
        for name, result in results.items()
        if "accuracy" in result.metrics
    }
    for name, value in here.items():
        table.add_row(name, f"{value:.1f}", *_compare(value, published.get(name)))
    if here.keys() == COMMONSENSE and "average" in published:
        mean = sum(here.values()) / len(here)
        table.add_row("average", f"{mean:.1f}", *_compare(mean, published["average"]))
    elif len(both := [name for name in here if name in published]) > 1:
        means = [sum(scores[name] for name in both) / len(both) for scores in (here, published)]
        table.add_row(f"average of these {len(both)}", f"{means[0]:.1f}", *_compare(*means))
    return table


def _compare(here: float, published: float | None) -> tuple[str, str]:
    return ("", "") if published is None else (f"{published:.1f}", f"{here - published:+.1f}")


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
    return f"{100 * value:.1f} %" if metric in {"accuracy", "macro_f1"} else f"{value:.3f}"
