"""Spread over seeds, differences on the same rows, correlations; their intervals are scipy's bootstrap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..extras import import_extra

RESAMPLES = 5000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds, of a sample; None for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(first: Sequence[str], second: Sequence[str], seed: int = 0) -> Interval:
    """How much oftener the first was right, over the rows that both answered.

    Each is a text of 0 and 1 for each seed, as `TaskResult.right`. A row counts by its mean over the seeds, and rows
    are drawn with replacement; that the seeds were drawn too is not in the interval.
    """
    means_N = [np.mean([[float(right) for right in text] for text in texts], axis=0) for texts in (first, second)]
    return mean_interval(means_N[0] - means_N[1], seed)


def mean_interval(values_N: Floats, seed: int = 0) -> Interval:
    """The mean of values and its percentile bootstrap interval.

    Raises:
        UsageError: if scipy is not installed.
    """
    value = float(values_N.mean())
    if len(values_N) < 2 or not values_N.std():
        return Interval(value, value, value)
    drawn = import_stats().bootstrap(
        (values_N,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=np.random.default_rng(seed)
    )
    return Interval(value, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high))


def correlation(
    x_N: Sequence[float], y_N: Sequence[float], kind: Literal["pearson", "spearman"], seed: int = 0
) -> Interval | None:
    """A correlation and its percentile bootstrap interval over the pairs; None for under three pairs or a constant.

    Raises:
        UsageError: if scipy is not installed.
    """
    pairs_N2 = np.array([x_N, y_N], dtype=float).T
    if len(pairs_N2) < 3 or not pairs_N2.std(axis=0).all():
        return None
    stats = import_stats()
    measure = stats.pearsonr if kind == "pearson" else stats.spearmanr
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 5):
        some_N2 = pairs_N2[rng.integers(len(pairs_N2), size=len(pairs_N2))]
        if some_N2.std(axis=0).all():  # one pair drawn again and again has none
            drawn.append(measure(*some_N2.T).statistic)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(measure(*pairs_N2.T).statistic), float(low), float(high))


def import_stats() -> Any:
    """The package scipy.stats.

    Raises:
        UsageError: if scipy is not installed.
    """
    return import_extra("scipy.stats", "an interval")
