"""What long work tells: how far it is, for whoever draws it (cli/console.py), and not a library's usual warnings."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Tick(Protocol):
    """Takes each step forward of something that is under way."""

    def __call__(self, what: str, amount: float, total: float, note: str = "") -> None:
        """So much more of the total is done; the note says how it goes."""


def log_progress() -> Tick:
    """What logs how far work is, a line every 10 seconds, where no bar can move."""
    done: dict[str, float] = {}
    last = time.monotonic()

    def tick(what: str, amount: float, total: float, note: str = "") -> None:
        nonlocal last
        done[what] = done.get(what, 0.0) + amount
        # shares add up to 1 but for rounding
        if done[what] < 0.999 * total and time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info(f"  {what}: {done[what] / total:.0%}{note and f', {note}'}")

    return tick


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings of what is so by intention: a new head, a setting that it gives itself."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
