"""Series over time: read from tables of any of four layouts; what cannot be used of them is named, a series each."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import UsageError, did_you_mean, list_some
from ..recipe import SeriesSettings
from .prepare import BadRow, RowReport
from .rows import read_dataset

log = logging.getLogger(__name__)

Values = NDArray[np.float64]

_NAMES = ("series", "unique_id", "item_id", "series_name", "series_id", "id")
_TIMES = ("time", "ds", "date", "timestamp", "datetime", "start", "start_timestamp", "month", "year", "period")
_VALUES = ("value", "y", "target", "values")
_MISSING = ("", "?", "nan", "na", "n/a", "null", "none", "-")
# dates that would pass for numbers
_DIGITS = {r"(19|20)\d{6}": "%Y%m%d", r"(19|20)\d{2}(0[1-9]|1[0-2])": "%Y%m"}
_SEASONS = {"month": 12, "quarter": 4, "year": 1, "day": 7, "business day": 5, "week": 52}
_MOST_A_DAY = 1440

SORTED = "times out of order, which are sorted"


@dataclass(frozen=True)
class TimeSeries:
    """Numbers at equal steps of time, none missing."""

    name: str
    values: Values
    """(T,)."""
    times: Any
    """(T,), a pandas index of dates, or of numbers."""
    step: Any
    """From one time to the next: a pandas offset, or a number."""

    @property
    def season(self) -> int:
        """How many values a season of the times has, 12 of months; 1 where the times do not say."""
        if not isinstance(self.step, pd.tseries.offsets.BaseOffset):
            return 1
        if isinstance(self.step, pd.tseries.offsets.Tick):
            return _season_of_tick(pd.Timedelta(self.step))
        if isinstance(self.step, pd.tseries.offsets.BusinessDay):
            return _SEASONS["business day"]
        months = _count_months(self.step)
        return max(12 // months, 1) if months else 1

    def later(self, count: int) -> list[str]:
        """The next times after the last one, as they are written."""
        if isinstance(self.step, pd.tseries.offsets.BaseOffset):
            last = self.times[-1]
            return write_times(pd.DatetimeIndex([last + (i + 1) * self.step for i in range(count)]), like=self.times)
        return write_times(pd.Index([self.times[-1] + (i + 1) * self.step for i in range(count)]))


@dataclass(frozen=True)
class _Written:
    """A series as it stands in the file."""

    name: str
    values: Any
    """A sequence of numbers, texts and None."""
    times: Any
    """A pandas index; None: the order of the values."""


@dataclass(frozen=True)
class SeriesTable:
    """What was read of a file of series."""

    series: list[TimeSeries]
    """Those that can be used."""
    report: RowReport
    """Of the others; the series are its rows."""
    layout: str
    """How the table was read, for a person."""


def read_series(
    source: str, setting: str, settings: SeriesSettings, split: str = "train", limit: int | None = None
) -> SeriesTable:
    """The series of a file, folder or data set.

    A table may be long (a value a row), wide (a column for each series), or have a row for each series, whose values
    stand in a list, as in .tsf, or in the other columns.

    Raises:
        UsageError: if there is no such file, it holds no row, or its columns do not say where the values are.
        DoraError: if it is damaged.
    """
    rows = read_dataset(source, setting, split)
    columns = {name: rows[name][:] for name in rows.column_names}
    layout, written = _divide(columns, settings, f"{setting}: {source}")
    written = list(written)[: limit or None]
    report, found, seen = RowReport(len(written)), [], dict[bytes, str]()
    for each in written:
        try:
            series, in_order = _check(each)
            if (other := seen.setdefault(series.values.tobytes(), each.name)) != each.name:
                raise BadRow("the same as another", f"its values are those of {other}")
        except BadRow as bad:
            report.drop(each.name, bad)
            continue
        if not in_order:
            report.note(each.name, SORTED)
        found.append(series)
    return SeriesTable(found, report, layout)


def write_times(times: Any, like: Any = None) -> list[str]:
    """Times as text: dates alone, where none of them (or of those that they are written like) has an hour."""
    if not isinstance(times, pd.DatetimeIndex):
        return [str(int(each)) if float(each).is_integer() else str(each) for each in times]
    others = times if like is None else like
    plain = bool((others == others.normalize()).all())
    return [each.strftime("%Y-%m-%d" if plain else "%Y-%m-%dT%H:%M:%S") for each in times]


def _divide(
    columns: Mapping[str, Sequence[Any]], settings: SeriesSettings, where: str
) -> tuple[str, Iterable[_Written]]:
    """How the columns are read, and the series in them."""
    _check_named(columns, settings, where)
    name = settings.name or _find(columns, _NAMES)
    time, value = settings.time or _find(columns, _TIMES), settings.value or _find(columns, _VALUES)
    if value is not None and _is_list(columns[value]):
        return f"each row, its values in {value!r}", _divide_lists(columns, name, time, value)
    if value is not None:
        parts = [f"values in {value!r}", f"times in {time!r}" if time else "", f"series by {name!r}" if name else ""]
        return ", ".join(filter(None, parts)), _divide_long(columns, name, time, value, where)
    first = next(iter(columns))
    if time is None and first != settings.name and _are_times(columns[first]):
        time = first
    if time is None and (settings.name or not _are_numbers(columns[first])):
        return f"each row, named in {name or first!r}", _divide_rows(columns, name or first)
    return f"each column{f', times in {time!r}' if time else ''}", _divide_wide(columns, time, where)


def _check_named(columns: Mapping[str, Sequence[Any]], settings: SeriesSettings, where: str) -> None:
    named = {key: getattr(settings, key) for key in ("name", "time", "value")}
    problems = [
        f"data.series.{key}: there is no column {column!r}{did_you_mean(column, columns)}"
        for key, column in named.items()
        if column is not None and column not in columns
    ]
    if problems:
        raise UsageError("\n".join([*problems, f"{where} has the columns {list_some(list(columns), 20, ', ')}"]))


def _divide_long(
    columns: Mapping[str, Sequence[Any]], name: str | None, time: str | None, value: str, where: str
) -> Iterator[_Written]:
    if name is None:
        texts = [column for column in columns if column not in (time, value) and not _are_numbers(columns[column])]
        if texts:
            raise UsageError(
                f"{where}: which column names the series? {', '.join(texts)} could; set data.series.name={texts[0]}"
            )
    values = np.array(columns[value], dtype=object)
    times = None if time is None else _read_times(columns[time], f"{where}: column {time!r}")
    if name is None:
        yield _Written(value, values, times)
        return
    codes, names = pd.factorize(pd.Series([_text(each) for each in columns[name]]))
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    for each, places in zip(names, np.split(order, ends[:-1]), strict=True):
        yield _Written(str(each), values[places], None if times is None else times[places])


def _divide_wide(columns: Mapping[str, Sequence[Any]], time: str | None, where: str) -> Iterator[_Written]:
    others = {name: column for name, column in columns.items() if name != time}
    if texts := [name for name, column in others.items() if not _has_number(column)]:
        told = ", ".join(f"{name!r} ({_first_written(others[name])!r})" for name in texts[:5])
        raise UsageError(
            f"{where}: each column is read as a series, and these hold no number: {told}; where a row has one value "
            "of a series, set data.series.value, data.series.time and data.series.name to its columns"
        )
    times = None if time is None else _read_times(columns[time], f"{where}: column {time!r}")
    for name, column in others.items():
        yield _Written(name, column, times)


def _divide_rows(columns: Mapping[str, Sequence[Any]], name: str) -> Iterator[_Written]:
    others = [column for other, column in columns.items() if other != name]
    for i, each in enumerate(columns[name]):
        yield _Written(_text(each), [column[i] for column in others], None)


def _divide_lists(
    columns: Mapping[str, Sequence[Any]], name: str | None, time: str | None, value: str
) -> Iterator[_Written]:
    starts = columns[time] if time is not None else [None] * len(columns[value])
    steps = columns.get("frequency", columns.get("freq", [None] * len(starts)))
    for i, (values, start, step) in enumerate(zip(columns[value], starts, steps, strict=True)):
        listed = _list_written(values)
        yield _Written(_text(columns[name][i]) if name else str(i + 1), listed, _count_times(start, step, len(listed)))


def _list_written(values: Any) -> list[Any]:
    """The values of a list, or of a text that writes one; none of a number, which stands where others have a list."""
    if isinstance(values, str):
        return values.split(",")
    return list(values) if isinstance(values, Sequence) else []


def _count_times(start: Any, step: Any, count: int) -> Any:
    """Times from the first one, or all of them where they are written in a list; None where nothing is said."""
    if isinstance(start, Sequence) and not isinstance(start, str):
        return _read_times(start, "times") if len(start) == count else None
    offset = _read_step(step)
    if start is None or offset is None:
        return None
    try:
        first = pd.to_datetime(_TSF_TIME.sub(r"\1T\2:\3:\4", str(start)))
        times = pd.DatetimeIndex([first + i * offset for i in range(count)])
    except (ValueError, OverflowError):
        return None
    return times if _are_dates(times) else None


_TSF_TIME = re.compile(r"^(\d{4}-\d{2}-\d{2}) (\d{2})-(\d{2})-(\d{2})$")
_WORDS = {
    "yearly": "YS",
    "quarterly": "QS",
    "monthly": "MS",
    "weekly": "7D",
    "daily": "D",
    "hourly": "h",
    "half_hourly": "30min",
    "minutely": "min",
    "10_minutes": "10min",
    "4_seconds": "4s",
    # of older versions of pandas, as GluonTS writes them
    "a": "YS",
    "y": "YS",
    "q": "QS",
    "m": "MS",
    "w": "7D",
    "t": "min",
}


def _read_step(said: Any) -> Any:
    """The offset that a frequency names, in the words of .tsf or of pandas; dates keep their day in a month."""
    if said is None:
        return None
    try:
        offset = pd.tseries.frequencies.to_offset(_WORDS.get(str(said).lower(), str(said)))
    except ValueError:
        return None
    months = _count_months(offset)
    return pd.DateOffset(months=months) if months else offset


def _check(written: _Written) -> tuple[TimeSeries, bool]:
    """The series, and whether its times stood in order.

    Raises:
        BadRow: if it cannot be used.
    """
    values = _read_values(written.values)
    times = pd.RangeIndex(len(values)) if written.times is None else written.times
    in_order = bool(times.is_monotonic_increasing)
    if not in_order:
        order = times.argsort(kind="stable")
        times, values = times[order], values[order]
    there = np.flatnonzero(~np.isnan(values))
    if not len(there):
        raise BadRow("without a value", "it has no value")
    # where series begin and end at different times, a table has empty cells
    times, values = times[there[0] : there[-1] + 1], values[there[0] : there[-1] + 1]
    if times.has_duplicates:
        twice = times[times.duplicated()][:1]
        raise BadRow("with two values of one time", f"{write_times(twice)[0]} is there twice")
    if missing := int(np.isnan(values).sum()):
        first = write_times(times[np.isnan(values)][:1])[0]
        raise BadRow("with missing values", f"{missing} of {len(values)} values are missing, the first at {first}")
    if len(values) > 1 and (values == values[0]).all():
        raise BadRow("constant", f"each of its {len(values)} values is {values[0]:g}")
    return TimeSeries(written.name, values, times, _find_step(times)), in_order


def _find_step(times: Any) -> Any:
    """The step from each time to the next.

    Raises:
        BadRow: if they differ.
    """
    if len(times) < 2:
        return 1
    if not isinstance(times, pd.DatetimeIndex):
        steps = np.diff(np.asarray(times, dtype=np.float64))
        if not np.allclose(steps, steps[0], rtol=1e-6, atol=0):
            raise _irregular(times, steps)
        return steps[0].item() if not float(steps[0]).is_integer() else int(steps[0])
    steps = np.diff(times.as_unit("us").asi8)
    months = np.diff(times.year * 12 + times.month)
    if (steps == steps[0]).all() and not (steps[0] >= _MONTH and (months == months[0]).all()):
        return pd.tseries.frequencies.to_offset(times[1] - times[0])
    if (
        (months == months[0]).all()
        and months[0]
        and (times.normalize() - times == times[0].normalize() - times[0]).all()
    ):
        if times.is_month_end.all():
            return pd.offsets.MonthEnd(int(months[0]))
        if (times.day == times.day.max())[times.days_in_month >= times.day.max()].all():
            return pd.DateOffset(months=int(months[0]))
    days = times.values.astype("datetime64[D]")
    if len(times) > 2 and np.is_busday(days).all() and (np.busday_count(days[:-1], days[1:]) == 1).all():
        return pd.offsets.BusinessDay()
    raise _irregular(times, steps)


_MONTH = 28 * 24 * 3600 * 10**6  # microseconds, of the shortest


def _irregular(times: Any, steps: Any) -> BadRow:
    """Where the first step is that is not the usual one."""
    usual = Counter(steps.tolist()).most_common(1)[0][0]
    at = int(np.flatnonzero(steps != usual)[0])
    before, after = write_times(times[at : at + 2], like=times)
    unit = pd.Timedelta(int(usual), unit="us") if isinstance(times, pd.DatetimeIndex) else f"{usual:g}"
    return BadRow("with irregular times", f"after {before} comes {after}, most steps are of {unit}")


def _count_months(offset: Any) -> int:
    """Months of an offset; 0 of one that is not of months."""
    if type(offset) is pd.DateOffset and "months" in offset.kwds:
        return int(offset.kwds["months"])
    if isinstance(offset, (pd.offsets.MonthBegin, pd.offsets.MonthEnd)):
        return int(offset.n)
    if isinstance(offset, (pd.offsets.QuarterBegin, pd.offsets.QuarterEnd)):
        return 3 * int(offset.n)
    if isinstance(offset, (pd.offsets.YearBegin, pd.offsets.YearEnd)):
        return 12 * int(offset.n)
    return 0


def _season_of_tick(step: pd.Timedelta) -> int:
    day = pd.Timedelta(days=1)
    if step == day:
        return _SEASONS["day"]
    if step == 7 * day:
        return _SEASONS["week"]
    a_day = day / step
    return int(a_day) if a_day.is_integer() and 1 < a_day <= _MOST_A_DAY else 1


def _read_values(written: Sequence[Any]) -> Values:
    """Numbers; NaN for what is missing.

    Raises:
        BadRow: for a text that is no number.
    """
    plain = [np.nan if each is None or _is_missing(each) else each for each in written]
    try:
        values = np.array(plain, dtype=np.float64)
        if values.ndim != 1:
            raise TypeError("lists of one length")
    except (TypeError, ValueError):
        bad = next(each for each in plain if not _is_number(each))
        raise BadRow("with what is no number", f"{bad!r} is no number") from None
    if np.isinf(values).any():
        raise BadRow("with infinite values", "an infinite value cannot be learned")
    return values


def _read_times(written: Sequence[Any], where: str) -> Any:
    """Dates, or numbers where all are.

    Raises:
        UsageError: naming the first that is neither.
    """
    texts = [_text(each) for each in written]
    if empty := [i for i, text in enumerate(texts, 1) if not text]:
        raise UsageError(f"{where}: {len(empty)} of {len(texts)} times are empty, first in row {empty[0]}")
    if all(re.fullmatch(r"(19|20)\d{2}[- ]?[qQ][1-4]", text) for text in texts):
        return pd.PeriodIndex([text.replace(" ", "") for text in texts], freq="Q").to_timestamp()
    for pattern, form in _DIGITS.items():
        if all(re.fullmatch(pattern, text) for text in texts):
            return pd.DatetimeIndex(pd.to_datetime(texts, format=form))
    if all(map(_is_number, texts)) and np.isfinite(numbers := np.array(texts, dtype=np.float64)).all():
        whole = (numbers == np.floor(numbers)).all() and np.abs(numbers).max() < _LARGEST_WHOLE
        return pd.Index(numbers.astype(np.int64) if whole else numbers)
    for options in ({"format": "ISO8601"}, {"format": "mixed"}, {"format": "mixed", "dayfirst": True}):
        try:
            found = pd.to_datetime(pd.Series(texts), utc=True, **options)
        except (ValueError, OverflowError):
            continue
        if not _are_dates(found.dt):
            continue
        if options["format"] != "ISO8601":
            log.info(f"{where}: {texts[0]} is read as {found.iloc[0]:%Y-%m-%d}")
        return pd.DatetimeIndex(found.dt.tz_localize(None))
    bad = next((text for text in texts if not _are_times([text])), texts[0])
    raise UsageError(f"{where}: {bad!r} is no time; write 2024-01-31, 2024-01-31 12:00, or a number")


def _find(columns: Mapping[str, Sequence[Any]], known: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in reversed(list(columns))}
    return next((by_name[name] for name in known if name in by_name), None)


def _are_times(column: Sequence[Any]) -> bool:
    texts = [_text(each) for each in column if each is not None][:_LOOKED_AT]
    try:
        return bool(texts) and _are_dates(pd.to_datetime(pd.Series(texts), format="mixed", utc=True).dt)
    except (ValueError, OverflowError):
        return False


_LOOKED_AT = 20
_LARGEST_WHOLE = 2.0**53
_LAST_YEAR = 9999
"""That Python can write."""


def _are_dates(times: Any) -> bool:
    """Whether all can be written: pandas takes "nan" for a time that is missing, and -1 for a year."""
    return bool(((times.year >= 1) & (times.year <= _LAST_YEAR)).all())


def _are_numbers(column: Sequence[Any]) -> bool:
    return all(each is None or _is_missing(each) or _is_number(each) for each in column)


def _has_number(column: Sequence[Any]) -> bool:
    return any(_is_number(each) for each in column) or all(each is None for each in column)


def _is_list(column: Sequence[Any]) -> bool:
    """Whether the cells of a column are lists, or texts that write such, as those of .tsf."""
    first = _first_written(column)
    return isinstance(first, Sequence) and (not isinstance(first, str) or "," in first)


def _first_written(column: Sequence[Any]) -> Any:
    return next((each for each in column if each is not None), None)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in _MISSING


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
