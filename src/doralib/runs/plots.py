"""Figures as PNG files, drawn by matplotlib (the extra `plots`) without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..disk import replacing
from ..errors import UsageError
from .record import OBJECTIVE_CURVES, RunRecord, numbers, read_metric

_CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
_COLORS = ("#2563c9", "#c2560c")


def write_figures(record: RunRecord) -> list[Path]:
    """The curves and the results of a run as figures/*.png in its folder; none for what the run does not hold.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    written = []
    for key in (*_CURVES, *OBJECTIVE_CURVES):
        name = key.replace("grad", "gradient").replace("/", "_")
        lines = [("training", numbers(record.train, key)), ("evaluation", numbers(record.evals, f"eval_{key}"))]
        if any(points for _, points in lines):
            written.append(_write(_curve(name.replace("_", " "), lines), record.path / "figures" / f"{name}.png"))
    if figure := _results(record.results):
        written.append(_write(figure, record.path / "figures" / "results.png"))
    return written


def new_figure(width: float = 6.4, height: float = 3.6) -> Any:
    """An empty `matplotlib.figure.Figure`, drawn without a display.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  an extra, wanted here only
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise UsageError("drawing figures needs matplotlib: pip install 'doralib[plots]'") from None
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curve(name: str, lines: Sequence[tuple[str, list[tuple[float, float]]]]) -> Any:
    figure = new_figure()
    axes = _clean(figure.add_subplot())
    for (label, points), color in zip(lines, _COLORS, strict=False):
        if points:
            marker = "o" if label == "evaluation" or len(points) == 1 else None
            style = "--" if label == "evaluation" else "-"
            axes.plot(*zip(*points, strict=True), style, label=label, color=color, marker=marker, markersize=4)
    axes.set_xlabel("step")
    axes.set_title(name, loc="left", fontsize=11)
    if sum(bool(points) for _, points in lines) > 1:
        axes.legend(frameon=False)
    return figure


def _results(results: dict[str, dict[str, Any]]) -> Any | None:
    """Accuracy of every task that has one, before and after, with its interval."""
    found = {
        when: {task: score for task, result in tasks.items() if (score := read_metric(result, "accuracy"))}
        for when, tasks in results.items()
    }
    every = dict.fromkeys([*results["after"], *results["before"]])
    tasks = [task for task in every if any(task in scores for scores in found.values())]
    if not tasks:
        return None
    figure = new_figure(height=1.2 + 0.7 * len(tasks))
    axes = _clean(figure.add_subplot())
    # hollow and full, so that they differ in gray too
    for when, color, shift, fill in (("before", "#8a94a3", 0.14, "white"), ("after", _COLORS[0], -0.14, _COLORS[0])):
        scores = found[when].values()
        if scores:
            values = [100 * score.value for score in scores]
            ends = [[100 * (s.value - s.low) for s in scores], [100 * (s.high - s.value) for s in scores]]
            at = [len(tasks) - 1 - tasks.index(task) + shift for task in found[when]]
            axes.errorbar(values, at, xerr=ends, fmt="o", color=color, mfc=fill, label=when, capsize=3)
    axes.set_yticks(range(len(tasks)), list(reversed(tasks)))
    axes.set_ylim(-0.5, len(tasks) - 0.5)
    axes.set_xlabel("accuracy in per cent, with 95 % intervals")
    # over the axes, where no interval is
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def _clean(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25)
    return axes


def _write(figure: Any, path: Path) -> Path:
    with replacing(path) as part:
        figure.savefig(part, format="png")
    return path
