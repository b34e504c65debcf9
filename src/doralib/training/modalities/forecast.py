"""Series over time: a model looks back on a window of values, and forecasts those that follow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from torch import nn

from ...checkpoints.models import Loaded, load_forecaster
from ...data.forecaster import describe_forecaster, find_frequency, forecast
from ...data.prepare import BadRow, PreparedRows, RowReport, Sample
from ...data.rows import RawRows
from ...data.series import TimeSeries, Values, read_series
from ...data.series_form import SeriesForm
from ...data.windows import Origin, WindowCollator, least_past, list_origins
from ...errors import DoraError, UsageError, collecting, raise_all
from ...evaluation.forecast import Scoring, check_scorable
from ...evaluation.generation import evaluation_mode
from ...evaluation.result import TaskResult
from ...evaluation.validation import score_series
from ...progress import Tick
from ...recipe import DataSettings, ModelSettings
from ..modality import Collate, Prepared

_SAMPLES = 12
_BAND = (0.1, 0.9)


@dataclass
class Forecasting:
    """The functions of a modality; it knows the series once it has read them, and their windows once it has a model."""

    train: list[TimeSeries] = field(default_factory=list)
    held: list[TimeSeries] = field(default_factory=list)
    """Of a file of their own; empty where the ends of the series are held out."""
    reports: dict[str, RowReport] = field(default_factory=dict)
    """Of train, and of held if there is such a file: what of them could not be read."""
    form: SeriesForm = field(default_factory=SeriesForm)
    origins: list[Origin] = field(default_factory=list)
    """Of validation."""
    layout: str = ""
    """How the table was read, for a person."""

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:  # noqa: ARG002
        """A row for each series."""
        problems: list[DoraError] = []
        sources = settings.sources()
        if settings.validation is not None:
            with collecting(problems):
                check_scorable()
        if weighted := [source.path for source in sources if source.weight != 1]:
            problems.append(UsageError(f"data.train: series have no weight, and {', '.join(weighted)} has one"))
        for i, source in enumerate(sources):
            setting, split = "data.train" if len(sources) == 1 else f"data.train[{i}]", source.split or settings.split
            with collecting(problems):
                table = read_series(source.path, setting, settings.series, split, settings.limit)
                self.train += table.series
                self.reports.setdefault("train", RowReport(0)).add(table.report)
                self.layout = table.layout
        if isinstance(settings.validation, str):
            with collecting(problems):
                split = settings.validation_split
                table = read_series(settings.validation, "data.validation", settings.series, split)
                self.held, self.reports["held"] = table.series, table.report
        for report in self.reports.values():
            if report.dropped.total() == report.rows:
                with collecting(problems):
                    report.check(settings.bad_rows)
        raise_all(problems)
        numbers = tuple(each.name for each in self.train)
        return RawRows(_list_names(self.train), _list_names(self.held) if self.held else None, numbers)

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """The model, and the form in which it is asked."""
        return load_forecaster(settings, empty=empty), self.form

    def prepare(
        self,
        rows: RawRows,  # noqa: ARG002
        settings: DataSettings,
        model: nn.Module,
        processor: Any,
        tick: Tick | None = None,  # noqa: ARG002
    ) -> Prepared:
        """The windows of each series; a fraction of validation is the end of each."""
        asked, family = settings.series, describe_forecaster(model)
        horizon = family.choose_horizon(asked.horizon, training=True)
        longest = max(len(each.values) for each in self.train) - horizon
        context = family.choose_context(asked.context, longest)
        processor.settings = asked.model_copy(update={"context": context, "horizon": horizon})
        split = settings.validation if isinstance(settings.validation, float) else None
        lengths = [len(each.values) for each in self.train]
        ends = [length if split is None else length - max(round(split * length), horizon) for length in lengths]
        starts = [least_past(end - horizon, context, horizon) for end in ends]
        train = self._cut(self.train, starts, ends, asked.stride, self.reports["train"])
        train.report.check(settings.bad_rows)
        held = None if settings.validation is None else self._hold_out(ends, context, horizon)
        self.origins = self._list(held) if held else []
        if held is not None:
            held.report.check(settings.bad_rows)
        told = {
            "rows": f"{train.report.kept:,} of {train.report.rows:,} series: {self.layout}",
            "windows": f"{len(train.rows):,} of {context} and {horizon} values"
            + (f", {len(self.origins):,} held out" if held else ""),
            "values": f"{train.report.tokens:,} an epoch, {train.report.label_tokens:,} of them forecast",
        }
        shown = self.origins or self._list(train)
        return Prepared(train, held, [self._sample(origin) for origin in _spread(shown, _SAMPLES)], told, unit="values")

    def _hold_out(self, ends: Sequence[int], context: int, horizon: int) -> PreparedRows:
        """The windows of validation, whose futures do not overlap: of other series, or of what follows the ends."""
        lengths = [len(each.values) for each in self.held or self.train]
        if self.held:
            starts = [least_past(length - horizon, context, horizon) for length in lengths]
            return self._cut(self.held, starts, lengths, horizon, self.reports["held"], first=len(self.train))
        return self._cut(self.train, ends, lengths, horizon, RowReport(len(lengths)))

    def _cut(
        self,
        series: Sequence[TimeSeries],
        starts: Sequence[int],
        ends: Sequence[int],
        stride: int,
        report: RowReport,
        first: int = 0,
    ) -> PreparedRows:
        """A row for each window whose future begins at a start or later and ends at an end.

        Args:
            first: The number of the first series.
        """
        horizon, context = self.form.settings.horizon or 0, self.form.settings.context or 0
        columns: dict[str, list[int]] = {"series": [], "origin": [], "length": []}
        for i, (each, start, end) in enumerate(zip(series, starts, ends, strict=True), first):
            origins = list_origins(end, max(start, horizon), horizon, stride)
            if not origins:
                needed = 2 * horizon + len(each.values) - end
                bad = BadRow(
                    f"shorter than {needed} values", f"{len(each.values)} values, {horizon} are forecast at once"
                )
                report.drop(each.name, bad)
                continue
            lengths = [min(origin, context) + horizon for origin in origins]
            report.kept += 1
            report.tokens += sum(lengths)
            report.label_tokens += horizon * len(origins)
            for column, cells in zip(columns.values(), ([i] * len(origins), origins, lengths), strict=True):
                column += cells
        return PreparedRows(datasets.Dataset.from_dict(columns), report)

    def _list(self, windows: PreparedRows) -> list[Origin]:
        series, horizon = [*self.train, *self.held], self.form.settings.horizon or 0
        rows = windows.rows
        return [Origin(series[i], at, horizon) for i, at in zip(rows["series"][:], rows["origin"][:], strict=True)]

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Windows cut out of their series."""
        series, asked = [*self.train, *self.held], processor.settings
        frequencies = [find_frequency(each.season) for each in series]
        scaling = describe_forecaster(model).scaling
        return WindowCollator([each.values for each in series], frequencies, asked.context, asked.horizon, scaling)

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        asked: list[dict[str, Any]],
    ) -> list[str]:
        """The forecasts as JSON: ``forecast``, and ``low`` and ``high`` where the model gives quantiles."""
        family, horizon = describe_forecaster(model), processor.settings.horizon
        pasts = [np.array(json.loads(each["given"]["past"])) for each in asked]
        frequencies = [int(each["given"]["frequency"]) for each in asked]
        with evaluation_mode(model):
            found = forecast(model, pasts, frequencies, processor.settings.context, _SAMPLES, lambda _: None)
        return [_write_forecast(values_HQ[:horizon], family.levels) for values_HQ in found]

    def _sample(self, origin: Origin) -> Sample:
        past = origin.past[-(self.form.settings.context or 0) :]
        given = {"past": json.dumps(past.tolist()), "frequency": str(find_frequency(origin.series.season))}
        return Sample(origin.name(), json.dumps(origin.future.tolist()), given)

    def score(
        self, model: nn.Module, processor: Any, settings: DataSettings, *, batch_size: int, seed: int, tick: Tick | None
    ) -> dict[str, TaskResult]:
        """How near the forecasts of validation come; nothing where there is none."""
        if not self.origins:
            return {}
        scoring = Scoring(processor.settings.context, settings.series.season, batch_size, seed)
        return {"validation": score_series("validation", self.origins, model, scoring, tick)}


def _list_names(series: Sequence[TimeSeries]) -> datasets.Dataset:
    names, lengths = [each.name for each in series], [len(each.values) for each in series]
    return datasets.Dataset.from_dict({"series": names, "length": lengths})


def _spread(origins: Sequence[Origin], count: int) -> list[Origin]:
    """The last origins of so many series, from the first series to the last."""
    last = list({origin.series.name: origin for origin in origins}.values())
    places = np.linspace(0, len(last) - 1, min(count, len(last))).round().astype(int)
    return [last[i] for i in places]


def _write_forecast(values_HQ: Values, levels: Sequence[float]) -> str:
    found = {"forecast": values_HQ[:, 0].tolist()}
    if set(_BAND) <= set(levels):
        low, high = (values_HQ[:, 1 + levels.index(level)].tolist() for level in _BAND)
        found |= {"low": low, "high": high}
    return json.dumps(found)
