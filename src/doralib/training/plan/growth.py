"""What grows with a model's blocks and with a batch's rows, traced with one of each and with two."""

from dataclasses import dataclass
from typing import Any

from .sampled import Beside, Sampled
from .skeleton import Skeleton, Weights, find_dtype, find_widest, weigh
from .trace import StepBytes, trace_step


@dataclass(frozen=True)
class Growth:
    """What one block and one row take; all that is linear in both."""

    blocks: int
    weights: tuple[Weights, ...]
    """Of one block and all around them, and of two."""
    widest: int
    itemsize: int
    steps: tuple[tuple[StepBytes, ...], ...]
    """By the number of rows (1, 2), then of blocks."""
    beside: Beside | None = None
    """A pipeline's parts that are not trained."""

    @classmethod
    def of(cls, skeleton: Skeleton, tokens: int, labels: int | None) -> "Growth":
        """Trace a few.

        Args:
            tokens: Of a row.
            labels: Of a row; None: the model has a head that classifies.
        """
        weights, widest, steps = [], 0, ([], [])  # type: ignore[var-annotated]
        for few in skeleton.few:
            for rows in (1, 2):
                # a model of its own, as its first step makes the copies that its layers keep
                model = skeleton.adapted(few)
                steps[rows - 1].append(trace_step(model, rows, tokens, None if labels is None else rows * labels))
            weights.append(weigh(model))
            widest = find_widest(model)
        dtype = find_dtype(skeleton.recipe, skeleton.plain.config)
        return cls(skeleton.count, tuple(weights), widest, dtype.itemsize, tuple(map(tuple, steps)))

    @classmethod
    def of_sampled(cls, sampled: Sampled) -> "Growth":
        """Trace the whole model with one row and with two."""
        steps = []
        for rows in (1, 2):
            model = sampled.adapted()
            steps.append((sampled.trace(model, rows),))
        frozen = (p.dtype.itemsize for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
        itemsize = max(frozen, default=4)
        return cls(1, (weigh(model),), find_widest(model), itemsize, tuple(steps), sampled.beside)

    @property
    def whole(self) -> Weights:
        """All blocks."""
        return self._to_all(self.weights)

    @property
    def block(self) -> Weights:
        """One block; the whole model where it was not cut."""
        first, *more = self.weights
        return more[0].plus(first, -1) if more else first

    def step(self, rows: int) -> StepBytes:
        """Of all blocks and so many rows."""
        one, two = (self._to_all(steps) for steps in self.steps)
        return one.plus(two.plus(one, -1), rows - 1)

    def _to_all(self, few: tuple[Any, ...]) -> Any:
        first, *more = few
        return first.plus(more[0].plus(first, -1), self.blocks - 1) if more else first
