"""`doralib eval`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import UsageError, did_you_mean
from .console import bars, console, print_json
from .options import AllowNonfinite, Alpha, Base, Batch, Dtype, Json, Model, Revision, Seed

if TYPE_CHECKING:
    from ..evaluation.evaluate import TaskResult

COMMONSENSE = {"boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"}
"""The tasks whose average the paper prints."""

_ONLY_WITH = {
    "--tasks": ("--resume", "--published"),
    "--mt-bench": ("--judge-url", "--judge-model", "--judge-price", "--against", "--yes"),
}
_WRONG_SHOWN = 5
_PROMPT_SHOWN = 300  # characters: the end of a prompt says most


def eval_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names or YAML files, separated by commas.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="Write results.json here, after each task; with --mt-bench a folder.")
    ] = None,
    base: Base = None,
    revision: Revision = None,
    alpha: Alpha = None,
    allow_nonfinite: AllowNonfinite = False,
    dtype: Dtype = "auto",
    batch_size: Batch = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first examples of each task.")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out the tasks that --out has already.")] = False,
    published: Annotated[
        str | None, typer.Option(help="A packaged recipe, whose published scores are shown beside.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval instead of --tasks; NAME=FILE for rows of a local file.")
    ] = None,
    mt_bench: Annotated[Path | None, typer.Option(help="MT-Bench's question.jsonl, instead of --tasks.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, e.g. http://host/v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    judge_price: Annotated[str | None, typer.Option(help="Dollars a million tokens, read and written: 2.5,10")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another model's answer file: judge in pairs, in both orders.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Of one answer of MT-Bench.")] = 1024,
    yes: Annotated[bool, typer.Option("--yes", help="Judge without asking whether the cost is right.")] = False,
    as_json: Json = False,
) -> None:
    """Score a base, adapted or merged model."""
    from ..checkpoints.load import load_model
    from ..disk import check_writable
    from ..formats.base import Hints
    from ..hub import add_revision

    _check_together(
        {"--tasks": tasks, "--harness": harness, "--mt-bench": mt_bench},
        {
            "--resume": resume,
            "--published": published,
            "--judge-url": judge_url,
            "--judge-model": judge_model,
            "--judge-price": judge_price,
            "--against": against,
            "--yes": yes,
        },
    )
    model = add_revision(model, revision)
    load = lambda: load_model(model, base=base, dtype=dtype, given=Hints(alpha=alpha, allow_nonfinite=allow_nonfinite))
    if mt_bench is not None:
        from .mt_bench import MtBench, run_mt_bench

        if out is None:
            raise UsageError("--mt-bench needs --out, a folder for its files")
        check_writable(out, "--out", folder=True)
        asked = MtBench(mt_bench, out, judge_url, judge_model, judge_price, against, limit, max_new_tokens, yes)
        run_mt_bench(asked, Path(model).resolve().name, load, seed)
        return
    if harness is not None:
        results = _run_harness(harness, load, out, model, batch_size=batch_size, limit=limit, seed=seed)
        if as_json:
            print_json({name: result.to_json() for name, result in results.items()})
        return
    if resume and out is None:
        raise UsageError("--resume needs --out, the file that has the results so far")
    beside = _find_published(published)
    settings = {"model": model, "base": base, "alpha": alpha, "dtype": dtype, "limit": limit, "seed": seed}
    results = _score(tasks, load, settings, out, batch_size=batch_size, resume=resume)
    console.print(results_table(results, title=model))
    if beside is not None:
        console.print(published_table(results, beside, title=f"{model}, and {published} as published"))
    for name, result in results.items():
        console.print(wrong_answers(name, result))
    if out is not None:
        console.print(f"written: {out}")
    if as_json:
        print_json({name: result.to_json() for name, result in results.items()})


def _check_together(kinds: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Check that one kind of evaluation is asked for, and no option of another.

    Raises:
        UsageError: naming the options that do not go together.
    """
    asked = [kind for kind, value in kinds.items() if value]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} do not go together: give one of them")
    kind = asked[0] if asked else "--tasks"
    for owner, options in _ONLY_WITH.items():
        if owner != kind and (given := [option for option in options if others[option]]):
            raise UsageError(f"{', '.join(given)}: goes with {owner}, not with {kind}")


def _run_harness(
    asked: str,
    load: Callable[[], tuple[Any, Any]],
    out: Path | None,
    name: str,
    *,
    batch_size: int,
    limit: int | None,
    seed: int,
) -> "dict[str, TaskResult]":
    from ..disk import check_writable
    from ..evaluation.harness import run_harness
    from ..files import write_json

    if out is not None:
        check_writable(out, "--out", folder=False)
    words = [word.strip() for word in asked.split(",") if word.strip()]
    results = run_harness(*load(), words, batch_size=batch_size, limit=limit, seed=seed)
    console.print(results_table(results, title=f"{name}, by lm-eval"))
    if out is not None:
        write_json(out, {"model": name, "after": {task: result.to_json() for task, result in results.items()}})
        console.print(f"written: {out}")
    return results


def _score(
    tasks: str,
    load: Callable[[], tuple[Any, Any]],
    settings: Mapping[str, Any],
    out: Path | None,
    *,
    batch_size: int,
    resume: bool,
) -> dict[str, "TaskResult"]:
    """The result of each task; those that the file has already are not made again."""
    from ..disk import check_writable
    from ..evaluation.evaluate import evaluate, read_all
    from ..evaluation.results_file import ResultsFile
    from ..evaluation.task_file import load_tasks

    chosen = load_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    if not chosen:
        raise UsageError("--tasks names no task: give names or YAML files, separated by commas")
    file, results = None, {}
    if out is not None:
        check_writable(out, "--out", folder=False)
        file = ResultsFile(out, settings)
        results = file.read(chosen) if resume else {}
    left = [task for task in chosen if task.name not in results]
    limit, seed = settings["limit"], settings["seed"]
    read_all(left, limit)
    if left:
        model, tokenizer = load()
    with bars() as tick:
        for task in left:
            found = evaluate(model, tokenizer, [task], batch_size=batch_size, limit=limit, seed=seed, tick=tick)
            results |= found
            if file:
                file.add(task, found[task.name])
    return {task.name: results[task.name] for task in chosen}


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
    return f"{100 * value:.1f} %" if metric in {"accuracy", "macro_f1", "token_f1"} else f"{value:.3f}"
