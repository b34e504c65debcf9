"""Windows of series: what a model looks back on, what it is to forecast, and the unit that both are in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .prepare import Row
from .series import TimeSeries, Values, write_times

Scaling = Literal["std", "mean"] | None
"""std: a window has mean 0 and deviation 1; mean: its mean size is 1; None: as it is."""

# a window that is flat where its series is not would make every step a leap
_LEAST_OF_SERIES = 0.1


@dataclass(frozen=True)
class Unit:
    """What a window's values are counted in: ``(values - start) / size``."""

    start: float
    size: float

    def to(self, values: Values) -> Values:
        """Values in this unit."""
        return (values - self.start) / self.size

    def back(self, values: Values) -> Values:
        """Values as they were."""
        return values * self.size + self.start


def find_unit(past: Values, scaling: Scaling, spread: float = 0.0) -> Unit:
    """The unit of a window, by its past alone, so that no series weighs more than another.

    A model that scales its input forecasts the same in any unit; only its loss is another.

    Args:
        spread: The standard deviation of the whole series, of which the unit is at least a tenth.
    """
    if scaling is None:
        return Unit(0.0, 1.0)
    least = _LEAST_OF_SERIES * spread
    if scaling == "mean":
        return Unit(0.0, float(max(np.abs(past).mean(), least)) or 1.0)
    return Unit(float(past.mean()), float(max(past.std(), least)) or 1.0)


@dataclass(frozen=True)
class Origin:
    """A place in a series, from which on it is forecast."""

    series: TimeSeries
    at: int
    """The first value that is forecast."""
    horizon: int

    @property
    def past(self) -> Values:
        """All before."""
        return self.series.values[: self.at]

    @property
    def future(self) -> Values:
        """What came."""
        return self.series.values[self.at : self.at + self.horizon]

    def name(self) -> str:
        """The series and the time, for a person."""
        return f"{self.series.name} from {write_times(self.series.times[self.at : self.at + 1], self.series.times)[0]}"


def least_past(last: int, context: int, horizon: int) -> int:
    """The shortest past of a window: the whole context, or half of what stands before the series' last window.

    Args:
        last: Where the future of the last window begins.
    """
    return min(context, max(horizon, last // 2))


def list_origins(end: int, least: int, horizon: int, stride: int) -> list[int]:
    """Where the future of each window begins, counted back from the last one, which ends at ``end``.

    Args:
        least: No future begins before it.
    """
    return list(range(end - horizon, least - 1, -stride))[::-1]


class WindowCollator:
    """Cuts the windows of a batch out of their series, in the unit of their past.

    Args:
        series: The values of each series.
        frequencies: Of each: see `find_frequency`.
        context: Values of the past; of a shorter past the first places are empty.
        horizon: Values of the future.
    """

    def __init__(
        self, series: Sequence[Values], frequencies: Sequence[int], context: int, horizon: int, scaling: Scaling
    ) -> None:
        self.series, self.frequencies, self.scaling = series, frequencies, scaling
        self.context, self.horizon = context, horizon
        self._spreads = [float(values.std()) for values in series]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch, with ``labels`` (B,), one of each window, by which windows are counted."""
        future = torch.empty(len(rows), self.horizon)
        pasts = []
        for i, row in enumerate(rows):
            values, origin = self.series[row["series"]], row["origin"]
            past = values[max(origin - self.context, 0) : origin]
            unit = find_unit(past, self.scaling, self._spreads[row["series"]])
            pasts.append(unit.to(past))
            future[i] = torch.from_numpy(unit.to(values[origin : origin + self.horizon]))
        batch = stack_pasts(pasts, [self.frequencies[row["series"]] for row in rows], self.context)
        tokens = torch.tensor(sum(map(len, pasts)) + future.numel())
        return {
            **batch,
            "future_values": future,
            "labels": torch.zeros(len(rows), dtype=torch.long),
            "num_tokens": tokens,
        }


def stack_pasts(pasts: Sequence[Values], frequencies: Sequence[int], context: int) -> dict[str, Tensor]:
    """Pasts as one batch: values (B, C), empty in front where a past is shorter, and their ``lengths`` (B,)."""
    stacked = torch.zeros(len(pasts), context)
    for row, past in zip(stacked, pasts, strict=True):
        row[context - len(past) :] = torch.from_numpy(past)
    lengths = torch.tensor([len(past) for past in pasts])
    return {"past_values": stacked, "lengths": lengths, "frequency": torch.tensor(list(frequencies))}
