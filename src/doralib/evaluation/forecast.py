"""Forecasts scored against what came: MASE, sMAPE and pinball loss, by utilsforecast."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..data.forecaster import describe_forecaster, find_frequency, forecast
from ..data.series import Values
from ..data.windows import Origin
from ..errors import DoraError
from ..extras import import_extra
from .metrics import Score, mean_score

log = logging.getLogger(__name__)

# utilsforecast divides by the sum of both sizes, the competitions by half of it, in per cent
_SMAPE = 200.0


def check_scorable() -> None:
    """Check that forecasts can be scored.

    Raises:
        UsageError: if utilsforecast is not installed.
    """
    import_extra("utilsforecast", "the score of forecasts")


@dataclass(frozen=True)
class Scoring:
    """How forecasts are made and scored."""

    context: int | None
    """Values that the model looks back on; None: as many as it takes."""
    season: int | None
    """Values of a season; None: as the times of each series say."""
    batch_size: int
    seed: int
    """Of the bootstrap."""


def score_origins(
    model: nn.Module, origins: Sequence[Origin], scoring: Scoring, tick: Callable[[float], None]
) -> dict[str, Score]:
    """The scores of a model of series, see `score_forecasts`.

    Raises:
        UsageError: if the model does not forecast as far or look back on as much, or utilsforecast is not installed.
        DoraError: if it gives NaN, or no series can be scored.
    """
    check_scorable()
    family = describe_forecaster(model)
    horizon = family.choose_horizon(max(origin.horizon for origin in origins))
    context = family.choose_context(scoring.context, max(origin.at for origin in origins))
    frequencies = [find_frequency(origin.series.season) for origin in origins]
    found = forecast(model, [origin.past for origin in origins], frequencies, context, scoring.batch_size, tick)
    seasons = [scoring.season or origin.series.season for origin in origins]
    return score_forecasts(origins, [each[:horizon] for each in found], family.levels, seasons, scoring.seed)


def score_forecasts(
    origins: Sequence[Origin], found: Sequence[Values], levels: Sequence[float], seasons: Sequence[int], seed: int
) -> dict[str, Score]:
    """Means over the origins: ``mase``, ``smape`` in per cent, ``pinball`` where there are quantiles, ``naive_mase``.

    MASE divides the mean error by that of the seasonal naive forecast within the past; the pinball loss, a mean over
    the levels, is divided by the same. A past that is no longer than a season, or repeats itself, is compared with the
    step before; where that is always right, the origin has no such score, which is logged.

    Args:
        found: (H, 1 + Q) of each origin: the forecast, and the quantile of each level.
        levels: (Q,).
        seasons: Of each origin.

    Raises:
        DoraError: if no origin has a score.
    """
    by_season: dict[int, list[int]] = defaultdict(list)
    for i, (origin, season) in enumerate(zip(origins, seasons, strict=True)):
        by_season[_find_comparable(origin.past, season)].append(i)
    if unscored := by_season.pop(0, []):
        names = ", ".join(origins[i].name() for i in unscored[:3])
        log.warning(f"{len(unscored)} of {len(origins)} pasts are constant, and have no score: {names}")
    if not by_season:
        raise DoraError("no series can be scored: the past of each is constant")
    each: dict[str, list[float]] = defaultdict(list)
    for season, places in by_season.items():
        part = _score_season([origins[i] for i in places], [found[i] for i in places], levels, season)
        for name, values in part.items():
            each[name] += values
    return {name: mean_score(values, seed) for name, values in each.items()}


def _find_comparable(past: Values, season: int) -> int:
    """The season, or 1 where the past cannot be compared with the season before; 0 where with nothing."""
    for lag in (season, 1):
        if len(past) > lag and np.abs(past[lag:] - past[:-lag]).sum() > 0:
            return lag
    return 0


def _score_season(
    origins: Sequence[Origin], found: Sequence[Values], levels: Sequence[float], season: int
) -> dict[str, list[float]]:
    """The scores of each origin, all of one season, in their order."""
    import pandas as pd  # noqa: PLC0415  as utilsforecast, an extra
    from utilsforecast import losses  # noqa: PLC0415

    quantiles = [f"quantile {level:g}" for level in levels]
    naive = [_repeat_season(origin, season) for origin in origins]
    table: dict[str, Any] = {
        "unique_id": np.repeat(np.arange(len(origins)), [origin.horizon for origin in origins]),
        "y": np.concatenate([origin.future for origin in origins]),
        "naive": np.concatenate(naive),
    }
    table |= dict(zip(["forecast", *quantiles], np.concatenate(found).T, strict=True))
    pasts = [origin.past for origin in origins]
    numbers = np.repeat(np.arange(len(pasts)), [len(past) for past in pasts])
    data, past = pd.DataFrame(table), pd.DataFrame({"unique_id": numbers, "y": np.concatenate(pasts)})
    compared = losses.mase(data, ["forecast", "naive"], seasonality=season, train_df=past).sort_values("unique_id")
    scores = {
        "mase": compared["forecast"],
        "smape": _SMAPE * losses.smape(data, ["forecast"]).sort_values("unique_id")["forecast"],
    }
    if quantiles:
        pinball = losses.scaled_mqloss(
            data, {"forecast": quantiles}, quantiles=np.array(levels), seasonality=season, train_df=past
        )
        scores["pinball"] = pinball.sort_values("unique_id")["forecast"]
    scores["naive_mase"] = compared["naive"]
    return {name: column.tolist() for name, column in scores.items()}


def _repeat_season(origin: Origin, season: int) -> Values:
    """The last season of the past, again and again."""
    last = origin.past[-season:]
    return np.resize(last, origin.horizon)
