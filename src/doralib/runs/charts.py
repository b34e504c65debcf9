"""Line charts as inline SVG that follow the page's colors, so a report needs no drawing library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .markup import Markup, el, join

Point = tuple[float, float]
_WIDTH, _HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 34
_SMOOTH_FROM = 25  # fewer points are drawn as they are


@dataclass(frozen=True)
class Series:
    """One line of a chart; points that are not finite are left out."""

    name: str
    points: Sequence[Point]
    color: str = "a"
    """A class of the style sheet: a, b."""
    dots: bool = False
    smooth: bool = False
    """Draw the points faintly and their running mean over them."""


@dataclass(frozen=True)
class Band:
    """What lies between two lines of a chart."""

    low: Sequence[Point]
    high: Sequence[Point]
    color: str = "a"


@dataclass(frozen=True)
class _Scale:
    """From values to places on the paper."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(title: str, series: Sequence[Series], bands: Sequence[Band] = (), x_name: str = "step") -> Markup | None:
    """A figure of the lines over each other by step, or None if there is no point to draw; bands lie under them."""
    series = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return None
    edges = [point for band in bands for point in (*band.low, *band.high) if all(map(math.isfinite, point))]
    xs, ys = zip(*(point for s in series for point in s.points), *edges, strict=True)
    x_ticks, y_ticks = _ticks(xs), _ticks(ys)
    x = _Scale(*_range(min(xs), max(xs)), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(*_range(min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])), _HEIGHT - _BOTTOM, _TOP)
    picture = el(
        "svg",
        *(_y_tick(value, y) for value in y_ticks),
        *(_x_tick(value, x) for value in x_ticks if x.low <= value <= x.high),
        el("text", x_name, class_="t", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 2, text_anchor="middle"),
        *(_draw_band(band, x, y) for band in bands),
        *(_draw(s, x, y) for s in series),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title}: {'; '.join(_said(s) for s in series)}",
    )
    return el("figure", el("figcaption", el("b", title), *(_legend(s, len(series)) for s in series)), picture)


def number_text(value: float) -> str:
    """A number short enough to read at a glance, e.g. ``0.0012``, ``1.2e-05``, ``12,300``."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def time_text(seconds: float) -> str:
    """E.g. ``3 min 12 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _draw(series: Series, x: _Scale, y: _Scale) -> Markup:
    smooth = series.smooth and len(series.points) >= _SMOOTH_FROM
    lines = [el("polyline", class_=f"l {series.color}{' faint' * smooth}", points=_path(series.points, x, y))]
    if smooth:
        lines.append(el("polyline", class_=f"l {series.color}", points=_path(_running_mean(series.points), x, y)))
    shown = series.points if series.dots or len(series.points) == 1 else []
    for at, value in shown:
        hint = el("title", f"{series.name} at {number_text(at)}: {number_text(value)}")
        lines.append(el("circle", hint, class_=series.color, cx=x(at), cy=y(value), r=3.5))
    return join(*lines)


def _draw_band(band: Band, x: _Scale, y: _Scale) -> Markup:
    outline = [*band.low, *reversed(band.high)]
    return el(
        "polygon", class_=f"band {band.color}", points=_path([p for p in outline if all(map(math.isfinite, p))], x, y)
    )


def _path(points: Sequence[Point], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(at)},{y(value)}" for at, value in points)


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """Each value replaced by the mean of its neighbors, a twentieth of the line to either side."""
    reach = max(2, len(points) // 20)
    means = []
    for i, (at, _) in enumerate(points):
        near = [value for _, value in points[max(0, i - reach) : i + reach + 1]]
        means.append((at, sum(near) / len(near)))
    return means


def _y_tick(value: float, y: _Scale) -> Markup:
    return join(
        el("line", class_="g", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value)),
        el("text", number_text(value), class_="t", x=_LEFT - 6, y=y(value) + 4, text_anchor="end"),
    )


def _x_tick(value: float, x: _Scale) -> Markup:
    return el("text", number_text(value), class_="t", x=x(value), y=_HEIGHT - _BOTTOM + 16, text_anchor="middle")


def _legend(series: Series, num_series: int) -> Markup:
    last = number_text(series.points[-1][1])
    if num_series == 1:
        return el("span", f"last {last}", class_="last")
    return el("span", el("i", class_=series.color), f"{series.name} {last}", class_="key")


def _said(series: Series) -> str:
    first, last = series.points[0], series.points[-1]
    return f"{series.name} from {number_text(first[1])} to {number_text(last[1])}"


def _range(low: float, high: float) -> tuple[float, float]:
    """The two ends, moved apart where they are the same."""
    if low < high:
        return low, high
    pad = abs(low) * 0.1 or 1.0
    return low - pad, high + pad


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers across the values, about five."""
    low, high = _range(min(values), max(values))
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
