"""Metrics against their definitions, intervals against drawing the rows one by one."""

import math

import numpy as np
import pytest

from doralib.evaluation.metrics import (
    accuracy_score,
    classification_scores,
    confusion_counts,
    macro_f1,
    perplexity_scores,
)


def f1_by_definition(truth, predicted):
    """Mean over the labels that occur, from precision and recall."""
    scores = []
    for label in sorted({*truth, *predicted}):
        hits = sum(t == p == label for t, p in zip(truth, predicted, strict=True))
        precision = hits / max(1, sum(p == label for p in predicted))
        recall = hits / max(1, sum(t == label for t in truth))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_their_definitions(seed):
    rng = np.random.default_rng(seed)
    num_labels, rows = 2 + seed % 4, 1 + 3 * seed
    truth, predicted = rng.integers(0, num_labels, (2, rows)).tolist()
    counts = confusion_counts(truth, predicted, num_labels)
    assert counts[truth[0], predicted[0]] >= 1
    assert counts.sum() == rows
    scores = classification_scores(counts, seed)
    assert scores["accuracy"].value == pytest.approx(sum(t == p for t, p in zip(truth, predicted, strict=True)) / rows)
    assert scores["macro_f1"].value == pytest.approx(f1_by_definition(truth, predicted))
    for score in scores.values():
        assert 0 <= score.low <= score.value + 1e-12
        assert score.value <= score.high + 1e-12 <= 1 + 1e-9


def test_rows_of_the_confusion_matrix_are_true_labels():
    assert confusion_counts([0, 0, 1], [1, 1, 1], 2).tolist() == [[0, 2], [0, 1]]


def test_a_label_that_never_occurs_does_not_lower_f1():
    assert macro_f1(confusion_counts([0, 1], [0, 1], 3)) == 1.0


def test_interval_is_the_percentile_bootstrap_of_the_rows():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 300)
    predicted = np.where(rng.random(300) < 0.7, truth, rng.integers(0, 3, 300))
    scores = classification_scores(confusion_counts(truth.tolist(), predicted.tolist(), 3), seed=0)
    drawn = [rng.integers(0, 300, 300) for _ in range(4000)]
    for name, of in {"accuracy": lambda t, p: (t == p).mean(), "macro_f1": f1_by_definition}.items():
        low, high = np.percentile(
            [of(truth[i], predicted[i]) for i in drawn[: 4000 if name == "accuracy" else 600]], [2.5, 97.5]
        )
        assert scores[name].low == pytest.approx(low, abs=0.012)
        assert scores[name].high == pytest.approx(high, abs=0.012)
    alone = accuracy_score((truth == predicted).tolist(), seed=0)
    assert (alone.low, alone.high) == pytest.approx((scores["accuracy"].low, scores["accuracy"].high), abs=0.012)


def test_a_seed_gives_the_same_interval_again():
    right = [True] * 30 + [False] * 20
    assert accuracy_score(right, 3) == accuracy_score(right, 3)
    losses = [3.0, 9.0, 2.0, 30.0], [2, 4, 2, 9], [5, 9, 4, 40]
    assert perplexity_scores(*losses, 3) == perplexity_scores(*losses, 3)
    assert perplexity_scores(*losses, 3) != perplexity_scores(*losses, 4)


def test_perplexity_weighs_rows_by_their_tokens():
    # 3 tokens at probability 1/2, 1 token at 1/8
    scores = perplexity_scores([3 * math.log(2), math.log(8)], [3, 1], [6, 6], seed=0)
    assert scores["perplexity"].value == pytest.approx(2 ** (6 / 4))
    assert scores["bits_per_byte"].value == pytest.approx(6 / 12)
    assert scores["perplexity"].low == pytest.approx(2.0)
    assert scores["perplexity"].high == pytest.approx(8.0)


def test_perplexity_interval_covers_the_spread_of_the_mean():
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.5, 400)
    score = perplexity_scores(losses.tolist(), [1] * 400, [4] * 400, seed=0)["perplexity"]
    half = 1.96 * losses.std() / math.sqrt(400)
    assert math.log(score.low) == pytest.approx(losses.mean() - half, abs=0.01)
    assert math.log(score.high) == pytest.approx(losses.mean() + half, abs=0.01)
