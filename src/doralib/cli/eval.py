"""`doralib eval`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import UsageError, did_you_mean
from .answers import is_answer_file, keep_answers, rate_file, tell_files
from .console import bars, console, print_json
from .harness import AskedModel, Harness, run_harness_tasks
from .options import AllowNonfinite, Alpha, Base, Batch, Dtype, Json, Model, Revision, Seed

if TYPE_CHECKING:
    from ..evaluation.result import TaskResult
    from ..families import Variant

COMMONSENSE = {"boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"}
"""The tasks whose average the paper prints."""

_ONLY_WITH = {
    "--tasks": ("--published", "--answers"),
    "--harness": ("--harness-python", "--harness-model"),
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
        str | None,
        typer.Option(help="A packaged recipe, or how names begin: their published scores are shown beside."),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Keep the answers to LLaVA's evaluations here, with the files for servers.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval instead of --tasks; NAME=FILE for local rows; lmms:NAME,... of lmms-eval."),
    ] = None,
    harness_python: Annotated[
        str | None, typer.Option(help="The Python of an environment with lmms-eval, for --harness lmms:TASK,...")
    ] = None,
    harness_model: Annotated[
        str | None, typer.Option(help="lmms-eval's own name of the model, with more of its model_args: NAME,KEY=VALUE.")
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
    """Score a base, adapted or merged model, or a file of answers."""
    from ..checkpoints.load import load_model
    from ..disk import check_writable
    from ..formats.base import Hints
    from ..hub import add_revision

    _check_together(
        {"--tasks": tasks, "--harness": harness, "--mt-bench": mt_bench},
        {
            "--published": published,
            "--answers": answers,
            "--harness-python": harness_python,
            "--harness-model": harness_model,
            "--judge-url": judge_url,
            "--judge-model": judge_model,
            "--judge-price": judge_price,
            "--against": against,
            "--yes": yes,
        },
    )
    model = add_revision(model, revision)
    hints = Hints(alpha=alpha, allow_nonfinite=allow_nonfinite)
    load = lambda: load_model(model, base=base, dtype=dtype, given=hints)
    if mt_bench is not None:
        from .mt_bench import MtBench, run_mt_bench

        if out is None or resume:
            why = "goes on by itself: leave out --resume" if resume else "needs --out, a folder for its files"
            raise UsageError(f"--mt-bench {why}")
        check_writable(out, "--out", folder=True)
        asked = MtBench(mt_bench, out, judge_url, judge_model, judge_price, against, limit, max_new_tokens, yes)
        run_mt_bench(asked, Path(model).resolve().name, load, seed)
        return
    if harness is not None:
        tasked = Harness(harness, harness_python, harness_model, out, resume, batch_size, limit, seed)
        results = run_harness_tasks(tasked, AskedModel(model, base, dtype, hints, load))
        console.print(results_table(results, title=f"{model}, by {tasked.tool}"))
        if out is not None:
            console.print(f"written: {out}")
        if as_json:
            print_json({name: result.to_json() for name, result in results.items()})
        return
    if resume and out is None and answers is None:
        raise UsageError("--resume needs --out, the file that has the results so far, or --answers, the folder")
    beside = _find_published(published)
    settings = {"model": model, "base": base, "alpha": alpha, "dtype": dtype, "limit": limit, "seed": seed}
    made = is_answer_file(model, {"--base": base, "--alpha": alpha})
    results = _score(tasks, None if made else load, settings, out, answers, batch_size=batch_size, resume=resume)
    console.print(results_table(results, title=model))
    _show_published(results, beside, title=f"{model}, and {published} as published")
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


def _score(
    tasks: str,
    load: Callable[[], tuple[Any, Any]] | None,
    settings: Mapping[str, Any],
    out: Path | None,
    answers: Path | None,
    *,
    batch_size: int,
    resume: bool,
) -> dict[str, "TaskResult"]:
    """The result of each task; those that the file has already are not made again.

    Args:
        load: Loads the model; None: what is scored is a file of answers.
    """
    from ..disk import check_writable
    from ..evaluation.evaluate import evaluate, read_all
    from ..evaluation.llava.answers import keeping_answers
    from ..evaluation.results_file import ResultsFile
    from ..evaluation.task_file import load_tasks
    from ..evaluation.task_media import check_scored

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
    kept = keep_answers(answers, settings["model"], left, resume=resume or load is None)
    if load is None:
        rate = lambda task: rate_file(task, chosen, settings, kept)
    else:
        if kept is None:
            check_scored(left)
        read_all(left, limit)
        if left:
            model, tokenizer = load()
        given: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "seed": seed}
        rate = lambda task: evaluate(model, tokenizer, [task], tick=tick, **given)[task.name]
    with bars() as tick, keeping_answers(kept):
        for task in left:
            results[task.name] = rate(task)
            if file:
                file.add(task, results[task.name])
    if kept is not None:
        tell_files(kept, chosen, made=load is not None)
    return {task.name: results[task.name] for task in chosen}


def _find_published(name: str | None) -> "list[Variant]":
    """The packaged recipes of this name, or whose names begin so, that have a published result."""
    if name is None:
        return []
    from ..training.recipe_file import packaged_recipes

    known = packaged_recipes()
    found = [known[name]] if name in known else [each for each in known.values() if each.name.startswith(name)]
    if not found:
        raise UsageError(f"--published: there is no packaged recipe {name!r}{did_you_mean(name, known)}")
    scored = [each for each in found if each.published]
    if not scored:
        having = ", ".join(each.name for each in known.values() if each.published)
        raise UsageError(f"--published: no result of {name} was published; there are those of {having}")
    return scored


def _show_published(results: Mapping[str, "TaskResult"], beside: "Sequence[Variant]", title: str) -> None:
    if beside:
        console.print(published_table(results, beside, title=title))
    for note in dict.fromkeys(note for each in beside for note in each.notes):
        console.print(Text(f"note: {note}"))


def published_table(results: Mapping[str, "TaskResult"], beside: "Sequence[Variant]", title: str) -> Table:
    """Each score beside the published ones, and the average of the accuracies that both have."""
    table = Table(title=title)
    alone = len(beside) == 1
    others = ("Published", "Difference") if alone else [each.name.rpartition("/")[2] for each in beside]
    for name in ("Task", "Here", *others):
        table.add_column(name, justify="left" if name == "Task" else "right")
    rows = {name: row for result in results.values() for name, row in _comparable_scores(result).items()}
    average, here = _average(rows, beside)
    for name, (value, digits) in {**rows, **({average: (here, 1)} if average else {})}.items():
        found = [_published_score(each, name, list(rows)) for each in beside]
        shown = ["" if score is None else f"{score:.{digits}f}" for score in found]
        shown += ["" if found[0] is None else f"{value - found[0]:+.{digits}f}"] if alone else []
        table.add_row(name, f"{value:.{digits}f}", *shown)
    return table


def _comparable_scores(result: "TaskResult") -> dict[str, tuple[float, int]]:
    """Values and digits by the name of the score in the recipes: TASK in per cent, TASK F1, TASK BERTScore."""
    # boolq, boolq-clean and boolq-likelihood are one data set
    task = result.task.removesuffix("-likelihood").removesuffix("-clean").rpartition("/")[2]
    if result.kind == "llava":
        # the published one is the first
        scores = list(result.metrics.values())
        return {task: (100 * scores[0].value, 1)} if scores else {}
    kinds = {"accuracy": ("", 100, 1), "weighted_f1": (" F1", 1, 3), "bertscore_f1": (" BERTScore", 1, 3)}
    return {
        f"{task}{name}": (factor * result.metrics[metric].value, digits)
        for metric, (name, factor, digits) in kinds.items()
        if metric in result.metrics
    }


def _average(rows: Mapping[str, tuple[float, int]], beside: "Sequence[Variant]") -> tuple[str, float]:
    """What an average is of, and its value here; empty where there is nothing to average."""
    whole = rows.keys() == COMMONSENSE and all("average" in (each.published or {}) for each in beside)
    names = [name for name in rows if whole or _is_in_average(name, beside)]
    told = "average" if whole else f"average of these {len(names)}" if len(names) > 1 else ""
    return told, sum(rows[name][0] for name in names) / max(len(names), 1)


def _is_in_average(name: str, beside: "Sequence[Variant]") -> bool:
    return " " not in name and all(name in (each.published or {}) for each in beside)


def _published_score(recipe: "Variant", name: str, rows: Sequence[str]) -> float | None:
    """A score of a recipe, or the average of those that are shown."""
    published = recipe.published or {}
    if not name.startswith("average of"):
        return published.get(name)
    shared = [row for row in rows if " " not in row and row in published]
    return sum(published[row] for row in shared) / len(shared)


def results_table(results: Mapping[str, "TaskResult"], title: str) -> Table:
    """A table for the terminal, a line for each metric."""
    table = Table(title=title)
    for name, justify in (("Task", "left"), ("Rows", "right"), ("Metric", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("Value", "95 % interval"):
        table.add_column(name, justify="right")
    for result in results.values():
        first = [result.task, str(result.n)]
        if not result.metrics:
            table.add_row(*first, "by its server", "", "")
        for name, score in result.metrics.items():
            interval = f"{score_text(name, score.low)} to {score_text(name, score.high)}"
            table.add_row(*first, name.replace("_", " "), score_text(name, score.value), interval)
            first = ["", ""]
    return table


def wrong_answers(name: str, result: "TaskResult") -> Group:
    """A table of the first mistakes for the terminal; nothing where there are none."""
    if not result.wrong:
        return Group()
    num_wrong = result.right.count("0") or result.n - round(result.metrics["accuracy"].value * result.n)
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


def score_text(metric: str, value: float) -> str:
    """Shares in per cent, the rest as numbers."""
    from ..runs.report_results import SHARES

    return f"{100 * value:.1f} %" if metric in SHARES else f"{value:.3f}"
