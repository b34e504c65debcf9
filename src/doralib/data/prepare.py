"""What becomes of rows, whatever they hold: those that a model can take, and a report of those left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

Row = Mapping[str, Any]
IGNORED = -100
"""The label of a place that does not count in the loss."""

_SHOWN_PER_REASON = 3


class BadRow(Exception):
    """One row cannot be used: its kind, to count by, and what exactly is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


@dataclass
class RowReport:
    """What becomes of the rows, counted while they go by."""

    rows: int
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    truncated: int = 0
    tokens: int = 0
    label_tokens: int = 0
    examples: list[str] = field(default_factory=list)
    """The first rows of each reason, with their numbers in the file."""
    dropped_numbers: list[int] = field(default_factory=list)

    def drop(self, number: int, bad: BadRow) -> None:
        """Count a row that is left out."""
        self.dropped[bad.kind] += 1
        self.dropped_numbers.append(number)
        self._show(bad.kind, f"row {number}: {bad.detail}", self.dropped[bad.kind])

    def cut(self, number: int, length: int) -> None:
        """Count a row whose end is left out."""
        self.truncated += 1
        self._show("cut", f"row {number}: cut, it has {length} tokens", self.truncated)

    def keep(self, labels: Sequence[int]) -> None:
        """Count a row that is used."""
        self.kept += 1
        self.tokens += len(labels)
        self.label_tokens += sum(label != IGNORED for label in labels[1:])

    def lines(self) -> list[str]:
        """The report for a person; empty when every row was taken whole."""
        lost = [f"{count} left out, {reason}" for reason, count in self.dropped.items()]
        cut = [f"{self.truncated} cut to max_length"] if self.truncated else []
        return [f"of {self.rows} rows: {'; '.join(lost + cut)}", *self.examples] if lost or cut else []

    def _show(self, kind: str, text: str, count: int) -> None:
        if count <= _SHOWN_PER_REASON:
            self.examples.append(f"  {text}")
        elif count == _SHOWN_PER_REASON + 1:
            self.examples.append(f"  more rows {kind} not shown")


@dataclass(frozen=True)
class PreparedRows:
    """Rows as the model takes them."""

    rows: datasets.Dataset
    """Has a column `length`, by which rows are grouped into batches."""
    report: RowReport


@dataclass(frozen=True)
class Sample:
    """A prompt and the answer that the data give."""

    prompt: str
    expected: str
