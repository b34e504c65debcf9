"""`doralib generate` on a model of series: forecasts of the series in a file, as CSV."""

import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .console import console, errors, print_log


@dataclass(frozen=True)
class ForecastRequest:
    """What is to be forecast."""

    file: Path | None
    out: Path | None
    horizon: int | None
    texts: Mapping[str, Any]
    """Options for models of text, with what was given."""


def is_series_model(model: str, base: str | None) -> bool:
    """Whether a run, an adapter or a model folder is one of series over time."""
    from ..checkpoints.kind import guess_kind
    from ..formats.files import find_base_name, is_adapter
    from ..recipe import SERIES_FILE

    folder = Path(model).expanduser()
    if any((place / SERIES_FILE).is_file() for place in (folder, folder / "model")):
        return True
    named = base or (find_base_name(folder) if is_adapter(folder) else None)
    return guess_kind(named or model) == "forecast"


def write_forecasts(model: str, load: Callable[[], tuple[Any, Any]], asked: ForecastRequest, batch_size: int) -> None:
    """Forecast what follows each series of a file, with the quantiles that the model gives.

    Args:
        model: Its name, for messages.
        load: Gives the model and its form.

    Raises:
        UsageError: if no file is given, no series in it can be used, or the model does not forecast as far.
    """
    from ..adapters.inference import unchanged
    from ..data.forecaster import describe_forecaster, find_frequency, forecast
    from ..data.series import read_series
    from ..disk import check_writable, replacing

    if others := [option for option, value in asked.texts.items() if value]:
        raise UsageError(f"{', '.join(others)}: {model} forecasts series, and is given no text; use --file")
    if asked.file is None:
        raise UsageError(f"{model} forecasts series: give them as --file, a .csv, .tsf, .jsonl or .parquet file")
    if asked.out is not None:
        check_writable(asked.out, "--out", folder=False)
    print_log(errors)
    loaded, form = load()
    settings, family = form.settings, describe_forecaster(loaded)
    table = read_series(str(asked.file), "--file", settings)
    series = table.series
    for line in (f"series of {asked.file}: {table.layout}", *table.report.lines()):
        errors.print(line, markup=False)
    if not series:
        raise UsageError(f"--file: no series of {asked.file} can be used")
    horizon = family.choose_horizon(asked.horizon or settings.horizon)
    context = family.choose_context(settings.context, max(len(each.values) for each in series))
    frequencies = [find_frequency(each.season) for each in series]
    with unchanged(loaded):
        found = forecast(loaded, [each.values for each in series], frequencies, context, batch_size, lambda _: None)
    head = ["series", "time", "forecast", *(f"{level:g}" for level in family.levels)]
    lines = (
        [each.name, time, *(f"{value:.10g}" for value in values_Q)]
        for each, values_HQ in zip(series, found, strict=True)
        for time, values_Q in zip(each.later(horizon), values_HQ, strict=False)
    )
    if asked.out is None:
        _write(sys.stdout, head, lines)
        return
    with replacing(asked.out) as part, part.open("w", encoding="utf-8", newline="") as file:
        _write(file, head, lines)
    console.print(f"{len(series)} series forecast, {horizon} values each: {asked.out}")


def _write(file: Any, head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
