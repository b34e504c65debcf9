"""How much of a reference is in a text: BLEU and chrF over all rows, ROUGE row by row."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import import_extra
from .metrics import Score, corpus_score, mean_score

_WORD = re.compile(r"\w+")


def translation_scores(texts: Sequence[str], references: Sequence[str], tokenize: str, seed: int) -> dict[str, Score]:
    """BLEU and chrF of all texts, from 0 to 100, as sacrebleu computes them.

    Args:
        tokenize: sacrebleu's name of the way to divide a text into words.

    Raises:
        UsageError: if sacrebleu is not installed.
    """
    tools = import_extra("sacrebleu.metrics", "the score of translations")
    metrics: dict[str, Any] = {"bleu": tools.BLEU(tokenize=tokenize), "chrf": tools.CHRF()}
    return {name: _score_corpus(metric, texts, references, seed) for name, metric in metrics.items()}


def _score_corpus(metric: Any, texts: Sequence[str], references: Sequence[str], seed: int) -> Score:
    """The score of the rows' summed counts; sacrebleu's own bootstrap fails where a resample scores 0 (2.6.0)."""
    counts_NK = np.array(metric._extract_corpus_statistics(list(texts), [list(references)]), dtype=np.int64)
    score = lambda counts_K: float(metric._compute_score_from_stats(counts_K.tolist()).score)
    return corpus_score(counts_NK, score, seed)


def rouge_scores(texts: Sequence[str], references: Sequence[str], seed: int) -> dict[str, Score]:
    """The mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), of lower-case words as they are, without stemming."""
    pairs = [(_split(text), _split(reference)) for text, reference in zip(texts, references, strict=True)]
    return {
        **{f"rouge{n}": mean_score([_compare_runs(*pair, n) for pair in pairs], seed) for n in (1, 2)},
        "rougeL": mean_score([_compare_order(*pair) for pair in pairs], seed),
    }


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _compare_runs(words: Sequence[str], wanted: Sequence[str], n: int) -> float:
    """F1 of the runs of n words that both have."""
    ours, theirs = (Counter(tuple(each[i : i + n]) for i in range(len(each) - n + 1)) for each in (words, wanted))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _compare_order(words: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of the longest row of words that both have in the same order."""
    longest = [0] * (len(wanted) + 1)
    for word in words:
        above = longest.copy()
        for i, other in enumerate(wanted, 1):
            longest[i] = above[i - 1] + 1 if word == other else max(above[i], longest[i - 1])
    return _f1(longest[-1], len(words), len(wanted))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if ours and theirs else 0.0
