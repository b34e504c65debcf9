"""Scores of predictions, each with a 95 % bootstrap interval over the rows; numpy alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

RESAMPLES = 1000
_ROWS_AT_ONCE = 50  # resamples of a long list of rows held at a time


@dataclass(frozen=True)
class Score:
    """A metric and its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def confusion_counts(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> Counts:
    """(L, L): how many rows of each true label (row) were given each label (column)."""
    counts_LL = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(counts_LL, (np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return counts_LL


def accuracy(counts_LL: Counts) -> Floats:
    """Share of the rows on the diagonal; any number of leading axes."""
    return np.trace(counts_LL, axis1=-2, axis2=-1) / counts_LL.sum(axis=(-2, -1))


def macro_f1(counts_LL: Counts) -> Floats:
    """Mean F1 of the labels that occur as truth or as prediction; any number of leading axes."""
    hits_L = np.diagonal(counts_LL, axis1=-2, axis2=-1)
    seen_L = counts_LL.sum(axis=-1) + counts_LL.sum(axis=-2)
    f1_L = 2 * hits_L / np.maximum(seen_L, 1)
    return f1_L.sum(axis=-1) / np.maximum((seen_L > 0).sum(axis=-1), 1)


def classification_scores(counts_LL: Counts, seed: int) -> dict[str, Score]:
    """Accuracy and macro F1 of a confusion matrix."""
    # drawing rows with replacement and counting them is one multinomial draw over the cells
    cells = counts_LL.ravel() / counts_LL.sum()
    drawn = np.random.default_rng(seed).multinomial(counts_LL.sum(), cells, size=RESAMPLES)
    drawn_SLL = drawn.reshape(RESAMPLES, *counts_LL.shape)
    return {
        name: _score(float(metric(counts_LL)), metric(drawn_SLL))
        for name, metric in (("accuracy", accuracy), ("macro_f1", macro_f1))
    }


def accuracy_score(correct: Sequence[bool], seed: int) -> Score:
    """Share of true entries."""
    hits, rows = sum(correct), len(correct)
    drawn_S = np.random.default_rng(seed).binomial(rows, hits / rows, size=RESAMPLES) / rows
    return _score(hits / rows, drawn_S)


def perplexity_scores(
    loss_N: Sequence[float], tokens_N: Sequence[int], bytes_N: Sequence[int], seed: int
) -> dict[str, Score]:
    """Perplexity a token and bits a byte, each weighted by the length of the rows.

    Args:
        loss_N: summed negative log-likelihood of each row, in nats.
        tokens_N: how many tokens each sum covers.
        bytes_N: how many UTF-8 bytes those tokens spell.
    """
    table_N3 = np.array([loss_N, tokens_N, bytes_N], dtype=np.float64).T
    rows, rng = len(table_N3), np.random.default_rng(seed)
    sums_S3 = np.concatenate(
        [
            rng.multinomial(rows, np.full(rows, 1 / rows), size=_ROWS_AT_ONCE) @ table_N3
            for _ in range(RESAMPLES // _ROWS_AT_ONCE)
        ]
    )
    whole_3 = table_N3.sum(axis=0)
    return {
        "perplexity": _score(_perplexity(whole_3).item(), _perplexity(sums_S3)),
        "bits_per_byte": _score(_bits_per_byte(whole_3).item(), _bits_per_byte(sums_S3)),
    }


def _perplexity(sums: Floats) -> Floats:
    return np.exp(sums[..., 0] / sums[..., 1])


def _bits_per_byte(sums: Floats) -> Floats:
    return sums[..., 0] / math.log(2) / sums[..., 2]


def _score(value: float, drawn_S: Floats) -> Score:
    low, high = np.percentile(drawn_S, [2.5, 97.5])
    return Score(value, float(low), float(high))
