"""How far long work is, for whoever draws it; the command line draws bars (cli/console.py)."""

from typing import Protocol


class Tick(Protocol):
    """Takes each step forward of something that is under way."""

    def __call__(self, what: str, amount: float, total: float, note: str = "") -> None:
        """So much more of the total is done; the note says how it goes."""
