"""Bar charts of a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...disk import replacing
from ...runs.plots import new_figure
from .subjects import SUBJECTS
from .tables import Bars

_PALETTE = (
    "#6b7480",
    "#8a94a3",
    "#c2560c",
    "#e0a458",
    "#2563c9",
    "#0f8a6c",
    "#7a4fbf",
    "#b83280",
    "#4b5563",
    "#65a30d",
)
_COLORS = dict(zip(SUBJECTS, _PALETTE, strict=True))


def write_bars(bars: Bars, path: Path) -> Path:
    """One horizontal bar a subject with its quartiles, in groups, as PNG.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    colors = choose_colors([bar.label for group in bars.groups.values() for bar in group])
    num_bars = sum(len(group) + 1 for group in bars.groups.values())
    figure = new_figure(width=7.5, height=1.4 + 0.24 * num_bars)
    axes = figure.add_subplot()
    _draw(axes, bars, colors)
    axes.set_title(bars.title, loc="left", fontsize=11, pad=14)
    axes.set_xlabel(bars.axis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    with replacing(path) as part:
        figure.savefig(part, format="png")
    return path


def choose_colors(labels: Sequence[str]) -> dict[str, str]:
    """A subject's own color, the same in every figure; what is no subject takes the palette's in turn."""
    others = [label for label in dict.fromkeys(labels) if label not in _COLORS]
    return {**_COLORS, **{label: _PALETTE[i % len(_PALETTE)] for i, label in enumerate(others)}}


def _draw(axes: Any, bars: Bars, colors: dict[str, str]) -> None:
    ticks: list[tuple[float, str]] = []
    at = 0.0
    for name, group in bars.groups.items():
        axes.text(0.004, at, name, fontsize=8, fontweight="bold", va="center", transform=axes.get_yaxis_transform())
        if bars.line is not None:  # beside the bars alone, so that it crosses no title; behind their figures
            ends = (at + 0.5, at + len(group) + 0.5)
            axes.vlines(bars.line, *ends, color="#222222", linewidth=1, linestyle="--", zorder=2.5)
        for bar in group:
            at += 1
            axes.barh(at, bar.value, color=colors[bar.label], height=0.8)
            reach = [[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]]
            axes.errorbar(bar.value, at, xerr=reach, color="#222222", linewidth=1, capsize=2)
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center_baseline"}
            number = f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.3g}"
            figure = axes.annotate(number, (bar.high, at), fontsize=7, **place)
            figure.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
            ticks.append((at, bar.label))
        at += 1.3
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_ylim(at - 0.6, -0.7)  # downwards, with the first title inside
