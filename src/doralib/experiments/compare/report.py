"""compare.html and its figures: scores by rank, losses by rate and by step, the axis, time and memory."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...runs.plots import new_figure
from ..page import COLORS, Section, save_figures, style_axes, write_sections
from .grid import Cell
from .pictures import pictures_section
from .study import Comparison
from .table import (
    CellResult,
    Difference,
    compare_methods,
    curves,
    diverged_runs,
    losses_by_rate,
    main_metric,
    rates_at_an_end,
    summarize,
    write_csv,
)

Points = list[tuple[float, float, float]]
_MARKS = "osDv^P*X"


def write_comparison(comparison: Comparison) -> list[Path]:
    """Write compare.csv, the figures and compare.html; returns their paths."""
    out = comparison.grid.out
    cells, differences = summarize(comparison), compare_methods(comparison)
    written = [write_csv(comparison)]
    try:
        drawn = save_figures(out / "figures", _draw(comparison, cells))
        note = ""
    except UsageError as error:
        drawn, note = [], f"No figures: {error}."
    sections = _sections(comparison, cells, differences, drawn)
    methods = ", ".join(comparison.grid.methods)
    lead = f"{comparison.grid.recipe.model.describe()} on {comparison.grid.recipe.data.train}. {note}"
    written.append(write_sections(out / "compare.html", f"Compared: {methods}", lead, sections))
    return written + [out / "figures" / f"{name}.png" for name in drawn]


def cell_rows(comparison: Comparison, cells: Sequence[CellResult]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of texts for the base and each cell."""
    tasks = list(comparison.grid.recipe.eval.tasks and comparison.base)
    head = ["method", "rate", "seeds", "validation loss", *tasks, "seconds", "peak memory"]
    rows = []
    if tasks:
        base = [f"{_main_value(comparison, task):.4f}" for task in tasks]
        rows.append(["base, untouched", "", "", "", *base, "", ""])
    for each in cells:
        scores = [_mean_text(*each.scores[task]) for task in tasks]
        peak = "" if each.peak_bytes is None else f"{each.peak_bytes / 1e9:.2f} GB"
        name = each.cell.text(comparison.grid.axis)
        loss = f"{each.loss:.4f}" if math.isfinite(each.loss) else ""
        rows.append([name, f"{each.rate:g}", str(each.seeds), loss, *scores, f"{each.seconds:.0f}", peak])
    return head, rows


def explain_diverged(runs: Sequence[str]) -> str:
    """That runs behind the means diverged."""
    return f"The training loss of {', '.join(runs)} diverged, which the means over the seeds do not show"


def explain_ends(ends: Sequence[str]) -> str:
    """What a rate at an end of the list means, for these cells."""
    return f"The best rate of {', '.join(ends)} is at an end of those tried, and one beyond it may be better"


def difference_rows(comparison: Comparison, differences: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of texts for each pair of methods, in points of accuracy."""
    axis = comparison.grid.axis
    rows = [
        [
            each.task,
            f"{each.first.text(axis)} - {each.second.text(axis)}",
            f"{100 * each.accuracy.value:+.2f}",
            f"{100 * each.accuracy.low:+.2f} to {100 * each.accuracy.high:+.2f}",
        ]
        for each in differences
    ]
    return ["task", "methods", "points", "95 % interval"], rows


def _main_value(comparison: Comparison, task: str) -> float:
    metrics = comparison.base[task].metrics
    return metrics[main_metric(metrics)].value


def _mean_text(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _sections(
    comparison: Comparison, cells: Sequence[CellResult], differences: Sequence[Difference], drawn: Sequence[str]
) -> list[Section]:
    grid = comparison.grid
    by = "the first seed" if grid.tune_seeds == 1 else f"the mean of {grid.tune_seeds} seeds"
    chosen = "given" if len(grid.rates) == 1 else f"chosen on the validation rows by {by}"
    head, rows = cell_rows(comparison, cells)
    text = f"Means over the seeds, with their standard deviation. Each rate is {chosen}; the test rows are scored once."
    if diverged := diverged_runs(comparison):
        text += f" {explain_diverged(diverged)}."
    sections = [Section("Results", text, head, rows, [name for name in drawn if name.startswith("score")])]
    if differences:
        text = (
            "Points are per cent of the rows that are wholly right, on the same rows; a row counts by its mean over "
            "the seeds. Intervals are scipy's bootstrap over the rows."
        )
        head, rows = difference_rows(comparison, differences)
        sections.append(Section("Differences of methods", text, head, rows))
    if (pictures := pictures_section(comparison)) is not None:
        sections.append(pictures)
    if "rates" in drawn:
        text = f"Validation loss of {by} at each rate that was tried, less the runs that were stopped early."
        if ends := rates_at_an_end(comparison):
            text += f" {explain_ends(ends)}."
        sections.append(Section("Rates", text, figures=["rates"]))
    if "curves" in drawn:
        text = "Validation loss of the runs that are scored, as they were trained: the mean over the seeds."
        sections.append(Section("Curves", text, figures=["curves"]))
    if "cost" in drawn:
        text = "Seconds of training steps alone, and the most main memory of the process (not of a GPU)."
        sections.append(Section("Time and memory", text, figures=["cost"]))
    return sections


def _draw(comparison: Comparison, cells: Sequence[CellResult]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for i, task in enumerate(comparison.base):
        if len({each.cell.r for each in cells} - {None}) > 1:
            figures[f"score-by-rank-{i}"] = _by_rank(comparison, cells, task)
        if comparison.grid.axis is not None:
            figures[f"score-by-axis-{i}"] = _by_axis(comparison, cells, task)
    rates = losses_by_rate(comparison)
    if any(len(points) > 1 for points in rates.values()):
        figures["rates"] = _rates(comparison, rates)
    lines = curves(comparison)
    if any(len(points) > 1 for points in lines.values()):
        figures["curves"] = _curves(comparison, lines)
    figures["cost"] = _cost(comparison, cells)
    return figures


def _by_rank(comparison: Comparison, cells: Sequence[CellResult], task: str) -> Any:
    figure = new_figure()
    axes = style_axes(figure.add_subplot(), "rank", main_metric(comparison.base[task].metrics), task)
    lines: dict[tuple[str, str | None], Points] = defaultdict(list)
    for each in cells:
        mean, deviation = each.scores[task]
        if each.cell.r is None:
            axes.axhline(mean, color=COLORS.get(each.cell.method), linestyle="--", label=each.cell.text(None))
        else:
            lines[each.cell.method, each.cell.value].append((each.cell.r, mean, deviation or 0.0))
    for i, ((method, value), points) in enumerate(lines.items()):
        label = method if value is None else f"{method}, {value}"
        _draw_line(axes, points, method, label, _MARKS[i % len(_MARKS)])
    axes.axhline(_main_value(comparison, task), color=COLORS["base"], linestyle=":", label="base")
    axes.set_xscale("log", base=2)
    ranks = sorted({each.cell.r for each in cells if each.cell.r is not None})
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.legend(frameon=False)
    return figure


def _by_axis(comparison: Comparison, cells: Sequence[CellResult], task: str) -> Any:
    grid = comparison.grid
    figure = new_figure()
    axes = style_axes(figure.add_subplot(), str(grid.axis), main_metric(comparison.base[task].metrics), task)
    values = list(grid.axis_values)
    numbers = _numbers(values)
    lines: dict[tuple[str, int | None], Points] = defaultdict(list)
    for each in cells:
        at = numbers[values.index(str(each.cell.value))]
        mean, deviation = each.scores[task]
        lines[each.cell.method, each.cell.r].append((at, mean, deviation or 0.0))
    for i, ((method, r), points) in enumerate(lines.items()):
        _draw_line(axes, points, method, method if r is None else f"{method} r {r}", _MARKS[i % len(_MARKS)])
    if numbers[0] > 0 and numbers != list(range(len(values))):
        axes.set_xscale("log")
    axes.set_xticks(numbers, values)
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def _numbers(values: Sequence[str]) -> list[float]:
    """The values as numbers, or their places where they are words."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return [float(place) for place in range(len(values))]


def _draw_line(axes: Any, points: Points, method: str, label: str, mark: str) -> None:
    x, y, error = zip(*sorted(points), strict=True)
    axes.errorbar(x, y, yerr=error, color=COLORS.get(method), label=label, marker=mark, markersize=5, capsize=3)


def _rates(comparison: Comparison, rates: dict[Any, list[tuple[float, float]]]) -> Any:
    figure = new_figure(height=4.2)
    axes = style_axes(figure.add_subplot(), "learning rate", "validation loss")
    ranks = sorted({cell.r or 0 for cell in rates})
    for cell, points in rates.items():
        mark = _MARKS[ranks.index(cell.r or 0) % len(_MARKS)]
        label = cell.text(comparison.grid.axis)
        axes.plot(*zip(*points, strict=True), color=COLORS.get(cell.method), marker=mark, markersize=5, label=label)
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, marker="o", markersize=11, mfc="none", color=COLORS.get(cell.method))
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def _curves(comparison: Comparison, lines: dict[Cell, list[tuple[int, float]]]) -> Any:
    figure = new_figure(height=4.2)
    axes = style_axes(figure.add_subplot(), "step", "validation loss")
    for i, (cell, points) in enumerate(lines.items()):
        mark = _MARKS[i % len(_MARKS)]
        label = cell.text(comparison.grid.axis)
        axes.plot(*zip(*points, strict=True), color=COLORS.get(cell.method), marker=mark, markersize=5, label=label)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _cost(comparison: Comparison, cells: Sequence[CellResult]) -> Any:
    with_memory = any(each.peak_bytes for each in cells)
    figure = new_figure(height=1.1 + 0.32 * len(cells))
    names = [each.cell.text(comparison.grid.axis) for each in cells]
    colors = [COLORS.get(each.cell.method) for each in cells]
    columns = [("seconds of training", [each.seconds for each in cells])]
    if with_memory:
        columns.append(("peak memory in GB", [(each.peak_bytes or 0) / 1e9 for each in cells]))
    for i, (label, values) in enumerate(columns):
        axes = style_axes(figure.add_subplot(1, len(columns), i + 1), label, "")
        axes.barh(range(len(cells)), values, color=colors)
        axes.set_yticks(range(len(cells)), names if i == 0 else [""] * len(cells))
        axes.invert_yaxis()
    return figure
