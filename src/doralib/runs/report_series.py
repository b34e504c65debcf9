"""The report's forecasts: a chart for each of a few series, with what came, and the forecasts before and after."""

import json
from collections.abc import Sequence
from typing import Any

from .charts import Band, Series, line_chart
from .markup import Markup, el
from .record import RunRecord, Values, is_series

_PAST_SHOWN = 4  # horizons


def series_section(record: RunRecord) -> Markup | None:
    """A chart of each sample that is a series."""
    charts = [_chart(sample) for sample in record.samples if is_series(sample)]
    if not any(charts):
        return None
    bands = any("low" in _read(sample.get("after")) for sample in record.samples)
    intro = "Forecast before and after training, and what came."
    intro += " The bands are from the 10 % to the 90 % quantile." if bands else ""
    return el("section", el("h2", "Forecasts"), el("p", intro), el("div", *charts, class_="charts"))


def _chart(sample: Values) -> Markup | None:
    try:
        past, future = json.loads(sample["given"]["past"]), json.loads(sample["expected"])
        shown = past[-_PAST_SHOWN * len(future) :]
        lines = [Series("what came", _number([*shown, *future], 1 - len(shown)), "past")]
        bands = []
        for when, color in (("before", "before"), ("after", "a")):
            said = _read(sample.get(when))
            if "forecast" not in said:
                continue
            lines.append(Series(when, _number(said["forecast"], 1), color))
            if "low" in said and "high" in said:
                bands.append(Band(_number(said["low"], 1), _number(said["high"], 1), color))
        return line_chart(str(sample.get("prompt", "")), lines, bands, "values ahead")
    except (KeyError, TypeError, ValueError):
        # the file is of another version, or damaged
        return None


def _number(values: Sequence[Any], first: int) -> list[tuple[float, float]]:
    return [(float(i), float(value)) for i, value in enumerate(values, first)]


def _read(text: Any) -> Values:
    """A forecast as it was written; empty where none was."""
    said = json.loads(text) if isinstance(text, str) and text.startswith("{") else {}
    return said if isinstance(said, dict) else {}
