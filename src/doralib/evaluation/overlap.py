"""How much of a reference is in a text: BLEU and chrF over all rows, ROUGE row by row."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from .metrics import RESAMPLES, Score, mean_score

_WORD = re.compile(r"\w+")


def translation_scores(texts: Sequence[str], references: Sequence[str], tokenize: str) -> dict[str, Score]:
    """BLEU and chrF of all texts, from 0 to 100, with the intervals of sacrebleu's own bootstrap.

    Args:
        tokenize: sacrebleu's name of the way to divide a text into words.

    Raises:
        UsageError: if sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF  # noqa: PLC0415  an extra
    except ImportError:
        raise UsageError("BLEU and chrF need sacrebleu: pip install 'doralib[translate]'") from None
    metrics: dict[str, Any] = {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF()}
    return {name: _score_corpus(metric, texts, references) for name, metric in metrics.items()}


def _score_corpus(metric: Any, texts: Sequence[str], references: Sequence[str]) -> Score:
    found = metric.corpus_score(list(texts), [list(references)], n_bootstrap=RESAMPLES)
    said = json.loads(found.format(width=6, signature=str(metric.get_signature()), is_json=True))
    middle, half = said["confidence_mean"], said["confidence_var"]
    return Score(float(found.score), middle - half, middle + half)


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
