"""What a comparison says, as lines of numbers: compare.csv, the table of cells, and differences of methods."""

import csv
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...disk import replacing
from ..statistics import Interval, deviation, paired_difference
from .grid import Cell
from .study import Comparison, RunResult, mean_loss

COLUMNS = ("method", "r", "learning_rate", "seed", "axis", "task", "metric", "split", "value", "seconds", "peak_bytes")


@dataclass(frozen=True)
class CellResult:
    """What a method got at one rank: means over the seeds with the chosen rate."""

    cell: Cell
    rate: float
    seeds: int
    scores: Mapping[str, tuple[float, float | None]]
    """Mean and deviation of each task's first metric, a share where it is one."""
    loss: float
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Difference:
    """Of two methods at the same rank and value of the axis, on one task."""

    task: str
    first: Cell
    second: Cell
    accuracy: Interval
    """First less second."""


def main_metric(scores: Mapping[str, Any]) -> str:
    """Accuracy where there is one."""
    return "accuracy" if "accuracy" in scores else next(iter(scores))


def write_csv(comparison: Comparison) -> Path:
    """Write compare.csv, a line for each run and score."""
    path = comparison.grid.out / "compare.csv"
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(_lines(comparison))
    return path


def _lines(comparison: Comparison) -> Iterator[dict[str, Any]]:
    axis = comparison.grid.axis
    for task, untouched in comparison.base.items():
        for metric, score in untouched.metrics.items():
            yield {"method": "base", "task": task, "metric": metric, "split": "test", "value": score.value}
    for result in comparison.runs:
        run = result.run
        known = {
            "method": run.cell.method,
            "r": "" if run.cell.r is None else run.cell.r,
            "learning_rate": run.rate,
            "seed": run.seed,
            "axis": "" if axis is None else f"{axis}={run.cell.value}",
            "seconds": round(result.seconds, 3),
            "peak_bytes": result.peak_bytes or "",
        }
        yield {**known, "metric": "loss", "split": "validation", "value": result.loss}
        for task, scored in result.scores.items():
            for metric, score in scored.metrics.items():
                yield {**known, "task": task, "metric": metric, "split": "test", "value": score.value}


def summarize(comparison: Comparison) -> list[CellResult]:
    """Means over the seeds of every cell, in the order of the grid."""
    made = []
    for cell, runs in _chosen(comparison).items():
        values = {
            task: [run.scores[task].metrics[main_metric(run.scores[task].metrics)].value for run in runs]
            for task in runs[0].scores
        }
        peaks = [run.peak_bytes for run in runs if run.peak_bytes]
        made.append(
            CellResult(
                cell,
                runs[0].run.rate,
                len(runs),
                {task: (float(np.mean(each)), deviation(each)) for task, each in values.items()},
                loss=float(np.mean([run.loss for run in runs])),
                seconds=float(np.mean([run.seconds for run in runs])),
                peak_bytes=max(peaks) if peaks else None,
            )
        )
    return made


def compare_methods(comparison: Comparison) -> list[Difference]:
    """Every pair of methods at the same rank and value of the axis; a method without a rank meets every rank."""
    chosen = _chosen(comparison)
    made = []
    for (first, runs), (second, others) in itertools.combinations(chosen.items(), 2):
        same_rank = first.r == second.r or None in (first.r, second.r)
        if first.method == second.method or first.value != second.value or not same_rank:
            continue
        for task in runs[0].scores:
            one, other = ([run.scores[task].right for run in each] for each in (runs, others))
            if one[0]:
                made.append(Difference(task, first, second, paired_difference(one, other)))
    return made


def losses_by_rate(comparison: Comparison) -> dict[Cell, list[tuple[float, float]]]:
    """Rates and validation losses of each cell's search, by rate; those that failed or were stopped are left out."""
    found: dict[Cell, dict[float, list[RunResult]]] = defaultdict(lambda: defaultdict(list))
    for result in comparison.runs:
        if result.run.seed in comparison.grid.choosing:
            found[result.run.cell][result.run.rate].append(result)
    points = {cell: [(rate, mean_loss(tried[rate])) for rate in sorted(tried)] for cell, tried in found.items()}
    return {cell: [point for point in each if np.isfinite(point[1])] for cell, each in points.items()}


def rates_at_an_end(comparison: Comparison) -> list[str]:
    """The cells whose chosen rate is the lowest or the highest that was tried: beyond it may be a better one."""
    chosen, found = _chosen(comparison), []
    for cell, points in losses_by_rate(comparison).items():
        rates, rate = [rate for rate, _ in points], chosen[cell][0].run.rate
        if len(rates) > 1 and rate in (rates[0], rates[-1]):
            found.append(f"{cell.text(comparison.grid.axis)} ({rate:g})")
    return found


def curves(comparison: Comparison) -> dict[Cell, list[tuple[int, float]]]:
    """Steps and validation losses of the runs behind the scores, by step: the mean of the seeds that have one there."""
    found: dict[Cell, list[tuple[int, float]]] = {}
    for cell, runs in _chosen(comparison).items():
        by_step: dict[int, list[float]] = defaultdict(list)
        for step, loss in (point for run in runs for point in run.curve):
            by_step[step].append(loss)
        found[cell] = [(step, float(np.mean(by_step[step]))) for step in sorted(by_step)]
    return found


def diverged_runs(comparison: Comparison) -> list[str]:
    """The runs behind the scores whose training loss diverged."""
    return [each.run.name for runs in _chosen(comparison).values() for each in runs if each.diverged]


def _chosen(comparison: Comparison) -> dict[Cell, Sequence[RunResult]]:
    found: dict[Cell, list[RunResult]] = defaultdict(list)
    for result in comparison.runs:
        if result.chosen:
            found[result.run.cell].append(result)
    return dict(found)
