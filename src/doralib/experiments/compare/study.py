"""The life of a comparison: runs for the rates, runs for the seeds, scores of the chosen, a table of all of it.

OUT/recipes/NAME.yaml    the recipe of each run        OUT/logs/      what each command printed
OUT/runs/NAME/           ordinary runs                 OUT/scores/    test scores, of the base and of chosen runs
OUT/compare.yaml         what is compared              OUT/compare.csv, compare.html, figures/    the result
"""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ... import disk, files
from ...checkpoints.parts import compose_parts
from ...documents import decode_json
from ...errors import DoraError, UsageError, collecting, raise_all
from ...evaluation.evaluate import read_all
from ...evaluation.result import TaskResult
from ...evaluation.task_file import load_tasks
from ...runs import checkpointing
from ...runs.divergence import find_divergence
from ...runs.folder import RunFolder
from ...runs.record import read_run
from ..statistics import import_stats
from .early_stop import Halving
from .grid import Cell, Grid, Run, check_grid, make_recipe
from .launch import Launch, own_command, tail
from .rates import next_step, rate_at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What one run got."""

    run: Run
    loss: float
    """On the validation rows; NaN without any, infinite where training failed or was stopped early."""
    seconds: float
    peak_bytes: int | None
    stopped: bool
    """Early, for falling behind."""
    chosen: bool = False
    scores: Mapping[str, TaskResult] = field(default_factory=dict)
    """On the test rows, for chosen runs."""
    diverged: bool = False
    """Its training loss, for a while or to the end."""
    curve: Sequence[tuple[int, float]] = ()
    """Steps and losses on the validation rows."""


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured."""

    grid: Grid
    base: Mapping[str, TaskResult]
    runs: Sequence[RunResult]


def mean_loss(results: Sequence[RunResult]) -> float:
    """Over the seeds, on the validation rows; infinite if one of them failed or was stopped."""
    return sum(result.loss for result in results) / len(results)


def list_commands(grid: Grid) -> list[str]:
    """Write the recipe of every run that is known beforehand, and return the commands that train them.

    Raises:
        UsageError: if rates are to be searched, so that they are not known.
    """
    if not grid.rates:
        raise UsageError("--commands: with --lrs auto the rates follow from earlier runs; give a list of rates")
    check_grid(grid)
    _claim(grid)
    runs = [Run(cell, rate, seed) for cell in grid.cells() for rate in grid.rates for seed in grid.seeds]
    if len(grid.rates) > 1:
        # other seeds follow once the rate is chosen
        runs = [run for run in runs if run.seed in grid.choosing]
    return [f"doralib train {_write_recipe(grid, run)}" for run in runs]


def compare(grid: Grid, launch: Launch, *, at_once: int = 1) -> Comparison:
    """Train and score what is missing, and return all of it; what is there already is not done again.

    Args:
        launch: Runs a command.
        at_once: Cells that are worked on at the same time.

    Raises:
        UsageError: before the first run, for everything that cannot be.
        DoraError: if a run fails; the others stay, and the same call goes on.
    """
    problems: list[DoraError] = []
    with collecting(problems):
        check_grid(grid)
    with collecting(problems):
        import_stats()  # for the last step: hours later would be too late to say that it is missing
    with collecting(problems):
        tasks = load_tasks(grid.recipe.eval.tasks)
        read_all(tasks, grid.recipe.eval.limit)
    raise_all(problems)
    _claim(grid)
    halving = Halving(grid.out / "trials.log") if grid.stop_early else None
    work = _Work(grid, launch, halving)
    base = work.score("base", _find_base(grid)) if tasks else {}
    results = [result for found in _do_cells(work, at_once) for result in found]
    return Comparison(grid, base, results)


def _find_base(grid: Grid) -> str:
    """The untrained model, which of a VL-BART is made first: its base has no visual embedding."""
    recipe, folder = grid.recipe, grid.out / "base"
    if recipe.model.parts is not None:
        return str(compose_parts(recipe.model.parts, recipe.seed))
    if recipe.model.kind != "vl-bart":
        return recipe.model.path
    if not folder.is_dir():
        # transformers, which takes seconds to import
        from ...checkpoints.models import load_vl_bart  # noqa: PLC0415

        model, tokenizer = load_vl_bart(recipe.model, seed=recipe.seed)
        with disk.replacing(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return str(folder)


def _do_cells(work: "_Work", at_once: int) -> list[list[RunResult]]:
    """Work on the cells in turn, or some at the same time; where one fails, the runs of the others stop as well."""
    cells = list(work.grid.cells())
    if at_once == 1:
        return [work.do_cell(cell) for cell in cells]
    with ThreadPoolExecutor(at_once) as pool:
        try:
            futures = [pool.submit(work.do_cell, cell) for cell in cells]
            wait(futures, return_when=FIRST_EXCEPTION)
            for failed in (future for future in futures if future.done() and future.exception()):
                failed.result()
            return [future.result() for future in futures]
        except BaseException:
            work.halted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _claim(grid: Grid) -> None:
    """Write what is compared, or see that the folder is of the same comparison."""
    file = grid.out / "compare.yaml"
    about = {"recipe": grid.recipe.model_dump(mode="json", exclude={"out", "seed"}), "axis": grid.axis}
    if file.is_file():
        before = files.read_yaml(file)
        if before != about:
            raise UsageError(f"--out {grid.out} holds a comparison of another recipe or axis ({file}); choose another")
        return
    if grid.out.is_dir() and any(grid.out.iterdir()):
        raise UsageError(f"--out {grid.out} holds other files and no comparison; choose another folder")
    with disk.replacing(file) as part:
        part.write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")


def _write_recipe(grid: Grid, run: Run) -> Path:
    file = grid.out / "recipes" / f"{run.name}.yaml"
    text = yaml.safe_dump(make_recipe(grid, run).model_dump(mode="json", exclude_unset=True), sort_keys=False)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with disk.replacing(file) as part:
            part.write_text(text, encoding="utf-8")
    return file


@dataclass(frozen=True)
class _Work:
    grid: Grid
    launch: Launch
    halving: Halving | None
    halted: threading.Event = field(default_factory=threading.Event)

    def do_cell(self, cell: Cell) -> list[RunResult]:
        """Choose the cell's rate by its first seeds, run the other seeds with it, score those."""
        grid = self.grid
        tried = {rate: self._try(cell, rate) for rate in grid.rates} if grid.rates else self._search(cell)
        losses = {rate: mean_loss(results) for rate, results in tried.items()}
        best = min(losses, key=lambda rate: losses[rate] if not math.isnan(losses[rate]) else math.inf)
        among = ", ".join(f"{rate:g}" for rate in sorted(tried))
        if math.isinf(losses[best]):
            raise DoraError(f"{cell.text(grid.axis)}: no rate trains; tried {among}")
        how = f"chosen among {among}" if len(tried) > 1 else "as given"
        log.info(f"{cell.text(grid.axis)}: rate {best:g}, {how}")
        chosen = [*tried.pop(best), *(self.train(Run(cell, best, seed)) for seed in grid.seeds[grid.tune_seeds :])]
        return [*(result for results in tried.values() for result in results), *map(self._scored, chosen)]

    def _try(self, cell: Cell, rate: float) -> list[RunResult]:
        """The runs that speak for or against a rate."""
        return [self.train(Run(cell, rate, seed), self.halving) for seed in self.grid.choosing]

    def _search(self, cell: Cell) -> dict[float, list[RunResult]]:
        start = self.grid.start_rate(cell)
        losses: dict[int, float] = {}
        tried: dict[float, list[RunResult]] = {}
        while len(tried) < self.grid.budget and (step := next_step(losses)) is not None:
            rate = rate_at(start, step)
            tried[rate] = self._try(cell, rate)
            losses[step] = mean_loss(tried[rate])
        return tried

    def _scored(self, result: RunResult) -> RunResult:
        run = result.run
        scores = self.score(run.name, str(self.grid.out / "runs" / run.name)) if self.grid.recipe.eval.tasks else {}
        return replace(result, chosen=True, scores=scores)

    def train(self, run: Run, halving: Halving | None = None) -> RunResult:
        """Train one run, or go on with it, unless it has come to its end, or halving stops it."""
        folder = RunFolder(self.grid.out / "runs" / run.name)
        stopped = halving is not None and halving.was_stopped(run)
        if not stopped and not _has_ended(folder):
            stopped = self._launch_training(run, folder, halving)
        if not self.grid.keep_checkpoints and (stopped or _has_ended(folder)):
            disk.delete(folder.checkpoints)
        summary = folder.read(folder.summary, {})
        failed = stopped or summary.get("status") == "nan"
        curve = _read_curve(folder)
        return RunResult(
            run,
            loss=math.inf if failed else _validation_loss(curve, self.grid),
            seconds=summary.get("seconds", 0.0),
            peak_bytes=files.read_json(peak)["peak_bytes"] if (peak := self._peak_file(run)).is_file() else None,
            stopped=stopped,
            diverged=folder.path.is_dir() and find_divergence(read_run(folder.path)) is not None,
            curve=curve,
        )

    def _launch_training(self, run: Run, folder: RunFolder, halving: Halving | None) -> bool:
        """Returns whether the run was stopped early."""
        file = _write_recipe(self.grid, run)
        words = ["train", str(file)]
        if folder.config.is_file():
            # of a run that was killed before its first checkpoint nothing is lost
            words.append("--resume" if checkpointing.find_newest(folder.checkpoints) else "--overwrite")
        log.info(f"doralib {' '.join(words)}")
        watch = halving.watch(run, lambda: [loss for _, loss in _read_curve(folder)]) if halving else None
        unwanted = lambda: self.halted.is_set() or (watch is not None and watch.unwanted())
        output = self.grid.out / "logs" / f"{run.name}.log"
        outcome = self.launch(own_command(*words), output, unwanted)
        if outcome.peak_bytes:
            earlier = folder.read(self._peak_file(run), {"peak_bytes": 0})["peak_bytes"]
            files.write_json(self._peak_file(run), {"peak_bytes": max(earlier, outcome.peak_bytes)})
        if watch:
            watch.close(_validation_loss(_read_curve(folder), self.grid))
        if not (watch and watch.stopped) and not _has_ended(folder):
            raise DoraError(
                f"the run {run.name} failed with status {outcome.status}; the same command goes on from here\n"
                f"  the end of {output}:\n{tail(output)}"
            )
        return bool(watch and watch.stopped)

    def score(self, name: str, model: str) -> dict[str, TaskResult]:
        """Score a model on the test rows, once."""
        recipe, file = self.grid.recipe, self.grid.out / "scores" / f"{name}.json"
        wanted = [task.name for task in load_tasks(recipe.eval.tasks)]
        if not _has_scores(file, wanted):
            words = ["eval", model, "--tasks", ",".join(recipe.eval.tasks), "--out", str(file), "--resume"]
            words += ["--batch-size", str(recipe.eval.batch_size), "--dtype", recipe.model.dtype]
            words += ["--limit", str(recipe.eval.limit)] if recipe.eval.limit else []
            log.info(f"doralib {' '.join(words)}")
            output = self.grid.out / "logs" / f"{name}-scores.log"
            outcome = self.launch(own_command(*words), output, self.halted.is_set)
            if not _has_scores(file, wanted):
                raise DoraError(
                    f"scoring {model} failed with status {outcome.status}; the same command goes on from here\n"
                    f"  the end of {output}:\n{tail(output)}"
                )
        found = files.read_json(file)["after"]
        return {task: TaskResult.from_json(found[task], file) for task in wanted}

    def _peak_file(self, run: Run) -> Path:
        return self.grid.out / "logs" / f"{run.name}.json"


def _has_ended(folder: RunFolder) -> bool:
    """Whether there is nothing left to train: it is trained, or its loss became NaN."""
    summary: dict[str, Any] = folder.read(folder.summary, {})
    return summary.get("status") == "nan" or (summary.get("status") == "finished" and folder.trained.exists())


def _has_scores(file: Path, tasks: Sequence[str]) -> bool:
    return file.is_file() and set(tasks) <= set(files.read_json(file).get("after") or ())


def _read_curve(folder: RunFolder) -> list[tuple[int, float]]:
    """Steps and validation losses so far; a line that is being written is left for the next time."""
    found = []
    for text in folder.metrics.read_text(encoding="utf-8").splitlines() if folder.metrics.is_file() else []:
        try:
            line = decode_json(text)
        except ValueError:
            break
        loss = line.get("eval_loss") if isinstance(line, dict) and line.get("kind") == "eval" else None
        if isinstance(loss, int | float):
            found.append((int(line["step"]), float(loss)))
    return found


def _validation_loss(curve: Sequence[tuple[int, float]], grid: Grid) -> float:
    """Of the model that was kept: the best, where the recipe keeps that, else the last."""
    losses = [loss for _, loss in curve]
    if not losses:
        return math.nan
    training = grid.recipe.training
    keeps_best = training.get("load_best_model_at_end") or "early_stopping_patience" in training
    return min(losses) if keeps_best else losses[-1]
