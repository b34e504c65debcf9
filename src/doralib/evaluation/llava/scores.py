"""How right answers to LLaVA-1.5's evaluations are, each by its official formula."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics import Counts, Score, accuracy_score, corpus_score, mean_score
from ..vqa import leave_one_out, normalize_written, read_yes_no
from .questions import LETTERS, LlavaQuestion

SCORED = ("gqa", "textvqa", "pope", "sqa")
"""The evaluations that are scored here; servers score the others."""
_MOSTLY = 0.5
"""From here on a soft accuracy counts as right."""


@dataclass(frozen=True)
class Rated:
    """What answers were read as, and how right they are."""

    metrics: dict[str, Score]
    """The one that is published first."""
    read: list[str]
    right: list[bool]


def rate_answers(benchmark: str, questions: Sequence[LlavaQuestion], said: Sequence[str], seed: int) -> Rated:
    """Rate an answer to each question, of an evaluation in `SCORED`."""
    if benchmark == "textvqa":
        return _rate_textvqa(questions, said, seed)
    readers = {"gqa": lambda text, _: read_gqa(text), "pope": lambda text, _: read_yes_no(text), "sqa": read_letter}
    read = [readers[benchmark](text, each.choices) for text, each in zip(said, questions, strict=True)]
    right = [each.answers[0] == text for each, text in zip(questions, read, strict=True)]
    metrics = {"accuracy": accuracy_score(right, seed)}
    group = lambda name: [yes for yes, each in zip(right, questions, strict=True) if each.group == name]
    if benchmark == "gqa":
        metrics |= {f"{name}_accuracy": accuracy_score(group(name), seed) for name in ("binary", "open") if group(name)}
    elif benchmark == "sqa" and group("image"):
        metrics = {"image_accuracy": accuracy_score(group("image"), seed), **metrics}
    elif benchmark == "pope":
        metrics = {**_score_yes(questions, read, seed), **metrics}
    return Rated(metrics, read, right)


def read_gqa(text: str) -> str:
    """The form in which GQA's answers are compared."""
    return text.rstrip(".").lower()


def read_letter(text: str, choices: int) -> str:
    """The letter of a choice that an answer of ScienceQA is; empty if it is none of them."""
    if text in LETTERS and len(text) == 1:
        letter = text
    elif text[:1] in LETTERS and text[1:3] == ". ":
        letter = text[:1]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in LETTERS[:choices] else ""


def _rate_textvqa(questions: Sequence[LlavaQuestion], said: Sequence[str], seed: int) -> Rated:
    read = [normalize_written(text) for text in said]
    values = [
        leave_one_out(text, [normalize_written(answer) for answer in each.answers])
        for text, each in zip(read, questions, strict=True)
    ]
    return Rated({"vqa_accuracy": mean_score(values, seed)}, read, [value >= _MOSTLY for value in values])


def _score_yes(questions: Sequence[LlavaQuestion], read: Sequence[str], seed: int) -> dict[str, Score]:
    """F1 of yes, over each way in which POPE chose what it asks for, and their mean, which is published."""
    groups = list(dict.fromkeys(each.group for each in questions))
    # of each group: yes rightly, yes in all, truly yes
    counts_N3G = np.zeros((len(questions), 3, len(groups)), dtype=np.int64)
    for i, (each, text) in enumerate(zip(questions, read, strict=True)):
        true, yes = each.answers[0] == "yes", text == "yes"
        counts_N3G[i, :, groups.index(each.group)] = (true and yes, yes, true)
    f1 = lambda counts_3G: 2 * counts_3G[0] / np.maximum(counts_3G[1] + counts_3G[2], 1)

    def score(table_NK: Counts, shape: tuple[int, ...]) -> Score:
        return corpus_score(table_NK, lambda counts_K: float(f1(counts_K.reshape(shape)).mean()), seed)

    own = {
        f"{name}_f1": score(counts_N3G[[each.group == name for each in questions], :, g], (3,))
        for g, name in enumerate(groups)
    }
    return {"f1": score(counts_N3G.reshape(len(questions), -1), (3, len(groups))), **own}
