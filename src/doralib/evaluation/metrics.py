"""Scores of predictions, each with a 95 % bootstrap interval over the rows; numpy alone."""

import math
from collections.abc import Callable, Sequence
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
    drawn_SLL = _draw_tables(counts_LL, np.random.default_rng(seed))
    return {
        name: _score(float(metric(counts_LL)), metric(drawn_SLL))
        for name, metric in (("accuracy", accuracy), ("macro_f1", macro_f1))
    }


def tag_score(counts_LL: Counts, tags: Sequence[int], seed: int) -> Score:
    """F1 over all tokens of the labels that say something: what is none of ``tags`` is no hit."""

    def f1(table_LL: Counts) -> Floats:
        hits = np.diagonal(table_LL, axis1=-2, axis2=-1)[..., tags].sum(axis=-1)
        seen = table_LL[..., tags, :].sum(axis=(-2, -1)) + table_LL[..., tags].sum(axis=(-2, -1))
        return 2 * hits / np.maximum(seen, 1)

    return _score(float(f1(counts_LL)), f1(_draw_tables(counts_LL, np.random.default_rng(seed))))


def _draw_tables(counts_LL: Counts, rng: np.random.Generator) -> Counts:
    """Tables of rows that are drawn with replacement, (S, L, L)."""
    # drawing rows and counting them is one multinomial draw over the cells
    rows = counts_LL.sum()
    return rng.multinomial(rows, counts_LL.ravel() / rows, size=RESAMPLES).reshape(RESAMPLES, *counts_LL.shape)


def accuracy_score(correct: Sequence[bool], seed: int) -> Score:
    """Share of true entries."""
    hits, rows = sum(correct), len(correct)
    drawn_S = np.random.default_rng(seed).binomial(rows, hits / rows, size=RESAMPLES) / rows
    return _score(hits / rows, drawn_S)


def yes_no_scores(truth: Sequence[bool], said: Sequence[bool], seed: int) -> dict[str, Score]:
    """Accuracy, and of yes precision, recall, F1 and how often it is said."""
    counts_22 = _count_yes(truth, said)
    drawn_S22 = _draw_tables(counts_22, np.random.default_rng(seed))
    metrics = {
        "accuracy": accuracy,
        "precision": lambda each: _share(each[..., 1, 1], each[..., :, 1].sum(axis=-1)),
        "recall": lambda each: _share(each[..., 1, 1], each[..., 1, :].sum(axis=-1)),
        "f1": _yes_f1,
        "yes_rate": lambda each: _share(each[..., :, 1].sum(axis=-1), each.sum(axis=(-2, -1))),
    }
    return {name: _score(float(metric(counts_22)), metric(drawn_S22)) for name, metric in metrics.items()}


def yes_f1_scores(truth: Sequence[bool], said: Sequence[bool], groups: Sequence[str], seed: int) -> dict[str, Score]:
    """F1 of yes in each group of rows, as ``GROUP_f1``, and before them their mean as ``f1``."""
    rows = {name: [i for i, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)}
    counts = {name: _count_yes([truth[i] for i in own], [said[i] for i in own]) for name, own in rows.items()}
    rng = np.random.default_rng(seed)
    f1 = {name: (float(_yes_f1(each)), _yes_f1(_draw_tables(each, rng))) for name, each in counts.items()}
    values, drawn = zip(*f1.values(), strict=True)
    mean = _score(float(np.mean(values)), np.mean(drawn, axis=0))
    return {"f1": mean, **{f"{name}_f1": _score(*each) for name, each in f1.items()}}


def _count_yes(truth: Sequence[bool], said: Sequence[bool]) -> Counts:
    return confusion_counts([int(each) for each in truth], [int(each) for each in said], 2)


def _share(part: Counts, whole: Counts) -> Floats:
    return part / np.maximum(whole, 1)


def _yes_f1(counts_22: Counts) -> Floats:
    """F1 of yes; any number of leading axes."""
    return _share(2 * counts_22[..., 1, 1], counts_22[..., 1, :].sum(axis=-1) + counts_22[..., :, 1].sum(axis=-1))


def weighted_f1(truth_N: Counts, said_N: Counts) -> float:
    """Mean F1 of the true labels, each by how often it is true; what was said may be none of them."""
    num_labels = int(max(truth_N.max(), said_N.max())) + 1
    support_L, given_L = np.bincount(truth_N, minlength=num_labels), np.bincount(said_N, minlength=num_labels)
    hits_L = np.bincount(truth_N[truth_N == said_N], minlength=num_labels)
    return float((2 * hits_L / np.maximum(support_L + given_L, 1) * support_L).sum() / len(truth_N))


def label_scores(truth: Sequence[str], said: Sequence[str], seed: int) -> dict[str, Score]:
    """Accuracy and weighted F1 of free texts."""
    number: dict[str, int] = {}
    truth_N, said_N = (np.array([number.setdefault(text, len(number)) for text in texts]) for texts in (truth, said))
    rng, rows = np.random.default_rng(seed), len(truth_N)
    drawn = [rng.integers(rows, size=rows) for _ in range(RESAMPLES)]
    return {
        "accuracy": accuracy_score((truth_N == said_N).tolist(), seed),
        "weighted_f1": _score(
            weighted_f1(truth_N, said_N), np.array([weighted_f1(truth_N[rows_N], said_N[rows_N]) for rows_N in drawn])
        ),
    }


def mean_score(values_N: Sequence[float], seed: int) -> Score:
    """Mean over the rows."""
    table_N, rows = np.array(values_N), len(values_N)
    drawn_SN = np.random.default_rng(seed).integers(rows, size=(RESAMPLES, rows))
    return _score(float(table_N.mean()), table_N[drawn_SN].mean(axis=1))


def corpus_score(counts_NK: Counts, score: Callable[[Counts], float], seed: int) -> Score:
    """A score of the rows' summed counts, (K,), however it is computed."""
    rows = len(counts_NK)
    drawn_SK = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES) @ counts_NK
    return _score(score(counts_NK.sum(axis=0)), np.array([score(counts_K) for counts_K in drawn_SK]))


def ratio_score(counts_N: Sequence[float], sizes_N: Sequence[float], seed: int) -> Score:
    """The sum of the rows' counts over that of their sizes; of no size at all the sum itself."""
    table_N2 = np.array([counts_N, sizes_N], dtype=np.float64).T
    rows = len(table_N2)
    drawn_S2 = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES) @ table_N2
    count, size = table_N2.sum(axis=0)
    return _score(float(count / max(size, 1)), drawn_S2[:, 0] / np.maximum(drawn_S2[:, 1], 1))


def compare_answers(before: str, after: str, seed: int) -> Score:
    """How much larger the share of right answers is after than before, on the same rows.

    Each is a 1 for a right answer and a 0 for another, in the rows' order. Rows are drawn in pairs, so what makes a row
    hard for both is not in the interval.
    """
    steps = (-1, 0, 1)
    gained = [int(now) - int(was) for was, now in zip(before, after, strict=True)]
    counts = np.array([gained.count(step) for step in steps])
    drawn_S = np.random.default_rng(seed).multinomial(len(gained), counts / len(gained), size=RESAMPLES) @ steps
    return _score(sum(gained) / len(gained), drawn_S / len(gained))


def perplexity_scores(
    loss_N: Sequence[float], tokens_N: Sequence[int], bytes_N: Sequence[int], seed: int
) -> dict[str, Score]:
    """Perplexity a token and bits a byte, each weighted by the length of the rows.

    Of each row: its summed negative log-likelihood in nats, and how many tokens and UTF-8 bytes the sum covers.
    """
    table_N3 = np.array([loss_N, tokens_N, bytes_N], dtype=np.float64).T
    rows, rng = len(table_N3), np.random.default_rng(seed)
    draw = lambda: rng.multinomial(rows, np.full(rows, 1 / rows), size=_ROWS_AT_ONCE) @ table_N3
    drawn_3S = np.concatenate([draw() for _ in range(RESAMPLES // _ROWS_AT_ONCE)]).T
    perplexity = lambda loss, tokens, _: np.exp(loss / tokens)
    bits_per_byte = lambda loss, _, num_bytes: loss / math.log(2) / num_bytes
    return {
        name: _score(metric(*table_N3.sum(axis=0)).item(), metric(*drawn_3S))
        for name, metric in (("perplexity", perplexity), ("bits_per_byte", bits_per_byte))
    }


def _score(value: float, drawn_S: Floats) -> Score:
    low, high = np.percentile(drawn_S, [2.5, 97.5])
    return Score(value, float(low), float(high))
