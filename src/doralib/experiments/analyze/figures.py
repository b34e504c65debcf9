"""The paper's Figures 2 and 3 and the spectra, for what was measured."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...runs.plots import new_figure
from ..page import COLORS, style_axes
from .measure import WeightMovement

NAMES = {"full": "FT", "lora": "LoRA", "dora": "DoRA", "vera": "VeRA", "dvora": "DVoRA"}
_MARKS = "os^Dv*PX"
_DASHES = ("-", "--", ":", "-.")
_SHOWN_MODULES = ("q_proj", "query", "c_attn", "v_proj", "value")


def choose_modules(movements: Sequence[WeightMovement]) -> list[str]:
    """The modules that get figures: query and value where there are such, else the first two."""
    known = [*dict.fromkeys(each.module for each in movements)]
    return [name for name in _SHOWN_MODULES if name in known][:2] or known[:2]


def draw_movements(movements: Sequence[WeightMovement]) -> dict[str, Any]:
    """The figures by the names of their files."""
    made: dict[str, Any] = {}
    for module in choose_modules(movements):
        some = [each for each in movements if each.module == module and each.layer is not None]
        if not some:
            continue
        made[f"scatter-{module}"] = _scatter(some, module)
        made[f"layers-{module}"] = _by_layer(some, module)
        if any(each.spectrum for each in some):
            made[f"spectra-{module}"] = _spectra(some, module)
    return made


def _scatter(movements: Sequence[WeightMovement], module: str) -> Any:
    """Figure 2: a panel for each method; the color is the layer, the marker the step."""
    methods = [*dict.fromkeys(each.method for each in movements)]
    steps = sorted({each.step or 0 for each in movements})
    layers = sorted({each.layer or 0 for each in movements})
    figure = new_figure(width=3.3 * len(methods) + 0.9, height=3.7)
    axes_of = figure.subplots(1, len(methods), squeeze=False)[0]
    shade = None
    for axes, method in zip(axes_of, methods, strict=True):
        some = [each for each in movements if each.method == method]
        style_axes(axes, "ΔD", "ΔM" if axes is axes_of[0] else "", f"{NAMES.get(method, method)}, {module}")
        for step in steps:
            here = [each for each in some if (each.step or 0) == step]
            shade = axes.scatter(
                [each.delta_d for each in here],
                [each.delta_m for each in here],
                c=[each.layer for each in here],
                cmap="viridis",
                vmin=layers[0],
                vmax=max(layers[-1], layers[0] + 1),
                marker=_MARKS[steps.index(step) % len(_MARKS)],
                s=24,
                label=f"step {step}" if len(steps) > 1 else None,
            )
        _draw_regression(axes, some)
        axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    if len(steps) > 1:
        handles, labels = axes_of[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(steps), 6), frameon=False, fontsize=8)
    if shade is not None:
        figure.colorbar(shade, ax=axes_of, label="layer", pad=0.02)
    return figure


def _draw_regression(axes: Any, movements: Sequence[WeightMovement]) -> None:
    x, y = (np.array([getattr(each, name) for each in movements]) for name in ("delta_d", "delta_m"))
    if len(x) < 3 or not x.std():
        return
    slope, start = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, slope * ends + start, color="#444444", linewidth=1.2, zorder=0)


def _by_layer(movements: Sequence[WeightMovement], module: str) -> Any:
    """Figure 3: a line for each tuned model at its last step."""
    figure = new_figure(width=8.4, height=3.4)
    tuned = [*dict.fromkeys(each.tuned for each in movements)]
    methods = [next(each.method for each in movements if each.tuned == label) for label in tuned]
    for i, (name, title) in enumerate((("delta_m", "ΔM"), ("delta_d", "ΔD"))):
        axes = style_axes(figure.add_subplot(1, 2, i + 1), "layer", "", f"{title}, {module}")
        for label, method in zip(tuned, methods, strict=True):
            points = sorted((each.layer, getattr(each, name)) for each in _last_step(movements, label))
            # of two models by one method the second is dashed
            dash = _DASHES[methods[: tuned.index(label)].count(method) % len(_DASHES)]
            color = COLORS.get(method)
            axes.plot(*zip(*points, strict=True), dash, color=color, marker="o", markersize=3, label=label)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=8)
    return figure


def _spectra(movements: Sequence[WeightMovement], module: str) -> Any:
    """Singular values of the change, a median over the layers, and the intruders of each layer."""
    figure = new_figure(width=8.4, height=3.4)
    left = style_axes(figure.add_subplot(1, 2, 1), "singular value of the change", "", f"median over layers, {module}")
    right = style_axes(figure.add_subplot(1, 2, 2), "layer", "", f"intruder dimensions, of the first 10, {module}")
    for label in dict.fromkeys(each.tuned for each in movements):
        some = [each for each in _last_step(movements, label) if each.spectrum]
        if not some:
            continue
        color = COLORS.get(some[0].method)
        by_layer: dict[int, int] = defaultdict(int)
        for each in some:
            assert each.spectrum is not None
            by_layer[each.layer or 0] = each.spectrum.intruders
        values_LK = np.array([each.spectrum.values for each in some if each.spectrum])
        left.plot(range(1, values_LK.shape[1] + 1), np.median(values_LK, axis=0), color=color, label=label)
        right.plot(*zip(*sorted(by_layer.items()), strict=True), color=color, marker="o", markersize=3)
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    right.set_ylim(-0.5, 10.5)
    right.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _last_step(movements: Sequence[WeightMovement], label: str) -> list[WeightMovement]:
    some = [each for each in movements if each.tuned == label]
    last = max(each.step or 0 for each in some)
    return [each for each in some if (each.step or 0) == last]
