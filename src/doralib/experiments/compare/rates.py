"""Which learning rate to try next: from coarse to fine, on steps of a quarter of a power of ten."""

from collections.abc import Mapping

_COARSE = 2  # a factor of about 3.2
_FINE = 1  # a factor of about 1.8


def rate_at(start: float, step: int) -> float:
    """The rate so many quarters of a power of ten above the start, with three digits."""
    return float(f"{start * 10 ** (step / 4):.3g}")


def next_step(losses: Mapping[int, float]) -> int | None:
    """The step to try next, by the losses at those that were tried; None where the best lies between two near ones.

    First the start and a coarse step to either side; then on towards the better side as long as the best is at an end;
    then a fine step to either side of the best.
    """
    for step in (0, _COARSE, -_COARSE):
        if step not in losses:
            return step
    best = min(losses, key=lambda step: (losses[step], abs(step)))
    if best == max(losses):
        return best + _COARSE
    if best == min(losses):
        return best - _COARSE
    return next((step for step in (best + _FINE, best - _FINE) if step not in losses), None)
