"""How right answers to LLaVA-1.5's evaluations are, each by its official formula."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..metrics import Score, accuracy_score, mean_score, yes_f1_scores
from ..vqa import leave_one_out, normalize_written, read_yes_no
from .questions import LETTERS, LlavaQuestion

SCORED = ("gqa", "textvqa", "pope", "sqa")
"""The evaluations that are scored here; servers score the others."""
_MOSTLY = 0.5
"""From here on a soft accuracy counts as right."""


@dataclass(frozen=True)
class RatedAnswers:
    """What answers were read as, and how right they are."""

    metrics: dict[str, Score]
    """The one that is published first."""
    read: list[str]
    right: list[bool]


def rate_answers(benchmark: str, questions: Sequence[LlavaQuestion], said: Sequence[str], seed: int) -> RatedAnswers:
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
        true, yes = ([text == "yes" for text in texts] for texts in ((each.answers[0] for each in questions), read))
        metrics = {**yes_f1_scores(true, yes, [each.group for each in questions], seed), **metrics}
    return RatedAnswers(metrics, read, right)


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


def _rate_textvqa(questions: Sequence[LlavaQuestion], said: Sequence[str], seed: int) -> RatedAnswers:
    read = [normalize_written(text) for text in said]
    values = [
        leave_one_out(text, [normalize_written(answer) for answer in each.answers])
        for text, each in zip(read, questions, strict=True)
    ]
    return RatedAnswers({"vqa_accuracy": mean_score(values, seed)}, read, [value >= _MOSTLY for value in values])
