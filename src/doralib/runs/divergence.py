"""Whether the loss of a training diverged: a run may do so and come back, and its scores alone do not tell."""

from dataclasses import dataclass
from statistics import median

from .record import RunRecord, numbers

# losses in a row whose median counts: one batch of hard rows is no divergence
_IN_A_ROW = 5
# of the runs of docs/when.md, those that end as their neighbours do rise to at most 1.4 times
_TIMES = 2.0
_MORE = 1.0  # nats a token: a model that knows its task begins near 0, where twice is nothing


@dataclass(frozen=True)
class Divergence:
    """Where a training loss was highest."""

    step: int
    loss: float
    first: float
    """At the start."""

    def __str__(self) -> str:
        return (
            f"The training loss diverged: it was {self.first:.2f} at the start and {self.loss:.2f} around step "
            f"{self.step:,}. A lower training.learning_rate, a longer training.warmup_steps or model.dtype: float32 "
            "usually help."
        )


def find_divergence(record: RunRecord) -> Divergence | None:
    """Where the loss of a run rose to twice what it was at the start, and by 1 nat; None for a sound one.

    Losses of pictures and series are on other scales, and those of objectives with a reference may begin at 0: of
    these it knows nothing.
    """
    losses, objective = numbers(record.train, "loss"), record.config.get("objective")
    kind = objective.get("kind", "sft") if isinstance(objective, dict) else "sft"
    if record.unit != "tokens" or kind != "sft" or len(losses) < 2 * _IN_A_ROW:
        return None
    windows = [losses[i : i + _IN_A_ROW] for i in range(len(losses) - _IN_A_ROW + 1)]
    medians = [(median(loss for _, loss in window), int(window[_IN_A_ROW // 2][0])) for window in windows]
    first, (highest, step) = medians[0][0], max(medians, key=lambda each: each[0])
    return Divergence(step, highest, first) if highest > max(_TIMES * first, first + _MORE) else None
