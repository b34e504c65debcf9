"""The correlation of how far directions and lengths moved, pooled over layers and steps, beside the paper's."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import Interval, correlation
from .measure import WeightMovement

PUBLISHED = {"full": -0.62, "lora": 0.83, "dora": -0.31}
"""Section 3.2: of VL-BART; most likely of its query matrices, which the text does not say."""


@dataclass(frozen=True)
class Correlation:
    """Of delta_d and delta_m, for one method and module."""

    method: str
    module: str
    """Or "all"."""
    points: int
    pearson: Interval | None
    spearman: Interval | None
    published: float | None


def correlate(movements: Sequence[WeightMovement]) -> list[Correlation]:
    """A correlation for each method and module, and for all modules of a method together."""
    modules = [*dict.fromkeys(each.module for each in movements)]
    found = []
    for method in dict.fromkeys(each.method for each in movements):
        for module in (*modules, *(["all"] if len(modules) > 1 else [])):
            some = [each for each in movements if each.method == method and module in (each.module, "all")]
            if not some:
                continue
            x, y = [each.delta_d for each in some], [each.delta_m for each in some]
            published = PUBLISHED.get(method) if module in ("q_proj", "query", "all") else None
            pearson, spearman = (correlation(x, y, kind) for kind in ("pearson", "spearman"))
            found.append(Correlation(method, module, len(some), pearson, spearman, published))
    return found
