"""Scores by category, as a table of numbers and a radar figure."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...runs.plots import new_figure
from .judge import Verdict
from .questions import Question


@dataclass(frozen=True)
class CategoryScore:
    """The mean over the answers of one category, or of all."""

    category: str
    first: float | None
    """Of the first turns; None where the judge gave no score."""
    second: float | None
    both: float | None
    unscored: int


def score_categories(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[CategoryScore]:
    """A line for each category in the order of the questions, and one for all of them, "average"."""
    category = {question.id: question.category for question in questions}
    names = [*dict.fromkeys(category.values()), "average"]
    scores: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for verdict in verdicts:
        for name in (category[verdict.question], "average"):
            scores[name, verdict.turn].append(verdict.score)
    made = []
    for name in names:
        one, two = scores[name, 1], scores[name, 2]
        made.append(CategoryScore(name, _mean(one), _mean(two), _mean([*one, *two]), [*one, *two].count(None)))
    return made


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def draw_radar(scores: Sequence[CategoryScore], name: str, most: float) -> Any:
    """A `matplotlib.figure.Figure`: a ray for each category."""
    rays = [each for each in scores if each.category != "average" and each.both is not None]
    angles = [2 * math.pi * i / len(rays) for i in range(len(rays))]
    values = [each.both for each in rays]
    figure = new_figure(width=5.2, height=4.8)
    axes = figure.add_subplot(projection="polar")
    axes.plot([*angles, *angles[:1]], [*values, *values[:1]], color="#2563c9", label=name)
    axes.fill(angles, values, color="#2563c9", alpha=0.15)
    axes.set_xticks(angles, [each.category for each in rays])
    axes.tick_params(axis="x", pad=12)
    axes.set_ylim(0, most)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_title(name, loc="left", fontsize=11, pad=18)
    return figure
