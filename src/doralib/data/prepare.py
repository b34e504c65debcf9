"""What becomes of rows, whatever they hold: those that a model can take, and a report of those left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DoraError, UsageError

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]
RowNumber = int | str
"""The place of a row in its file, from 1; of one of several files with the file's name: `b.jsonl:12`."""
IGNORED = -100
"""The label of a place that does not count in the loss."""

_SHOWN_PER_REASON = 3


class BadRow(Exception):
    """One row cannot be used: its kind, to count by, and what exactly is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def check_length(length: int, limit: int) -> None:
    """Check that a row of so many tokens is within data.max_length.

    Raises:
        BadRow: if it is not.
    """
    if length > limit:
        raise BadRow(f"longer than {limit} tokens", f"{length} tokens, data.max_length is {limit}")


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
    noted: Counter[str] = field(default_factory=Counter)
    """Rows that are used, and what of them is not."""
    divided: int = 0
    """Rows that became several."""

    def drop(self, number: RowNumber, bad: BadRow) -> None:
        """Count a row that is left out."""
        self.dropped[bad.kind] += 1
        self._show(bad.kind, f"row {number}: {bad.detail}", self.dropped[bad.kind])

    def cut(self, number: RowNumber, length: int) -> None:
        """Count a row whose end is left out."""
        self.truncated += 1
        self._show("cut", f"row {number}: cut, it has {length} tokens", self.truncated)

    def divide(self, number: RowNumber, length: int, parts: int) -> None:
        """Count a row that becomes several."""
        self.divided += 1
        self._show("divided", f"row {number}: divided into {parts}, it has {length} tokens", self.divided)

    def note(self, number: RowNumber, kind: str) -> None:
        """Count a row that is used, but not in all it says."""
        self.noted[kind] += 1
        self._show(kind, f"row {number}: {kind}", self.noted[kind])

    def keep(self, *parts: Sequence[int]) -> None:
        """Count a row that is used, by its labels; of a divided one each part's."""
        self.kept += 1
        for labels in parts:
            self.tokens += len(labels)
            self.label_tokens += sum(label != IGNORED for label in labels[1:])

    def add(self, other: "RowReport") -> None:
        """Count the rows of another set too."""
        for name in ("rows", "kept", "truncated", "tokens", "label_tokens", "divided"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        self.noted.update(other.noted)
        self.examples += other.examples

    def check(self, bad_rows: str) -> None:
        """Check that there are rows to use, and no bad ones where they are errors (data.bad_rows).

        Raises:
            UsageError: if no row is usable.
            DoraError: if a row is bad and bad rows are errors.
        """
        told = "\n".join(self.lines())
        if self.dropped and bad_rows == "error":
            raise DoraError(f"data.bad_rows is 'error', and there are bad rows:\n{told}")
        if not self.kept:
            raise UsageError(f"no row can be used, the data set is empty:\n{told}")

    def lines(self) -> list[str]:
        """The report for a person; empty when every row was taken whole."""
        lost = [f"{count} left out, {reason}" for reason, count in self.dropped.items()]
        cut = [f"{self.truncated} cut to max_length"] if self.truncated else []
        cut += [f"{self.divided} divided into rows of max_length"] if self.divided else []
        partly = [f"{count} with {reason}" for reason, count in self.noted.items()]
        told = "; ".join(lost + cut + partly)
        return [f"of {self.rows} rows: {told}", *self.examples] if told else []

    def _show(self, kind: str, text: str, count: int) -> None:
        if count <= _SHOWN_PER_REASON:
            self.examples.append(f"  {text}")
        elif count == _SHOWN_PER_REASON + 1:
            self.examples.append(f"  more rows {kind} not shown")


@dataclass(frozen=True)
class RenderedRow:
    """A row as one text, and what of it is learned."""

    text: str
    learned: tuple[tuple[int, int], ...]
    """Start and end of each stretch of characters whose tokens are labels, in order."""
    closed: bool = False
    """The text spells its own start and end tokens."""
    begins_bare: bool = False
    """Of a closed text: but for the start token, which the tokenizer puts before it."""
    notes: tuple[str, ...] = ()
    """What of the row is not in the text, or not learned: texts to follow `rows with`."""

    def mark(self, opening: str = "⟦", closing: str = "⟧") -> str:
        """The text with each learned stretch between two marks."""
        shown, place = "", 0
        for start, end in self.learned:
            shown += f"{self.text[place:start]}{opening}{self.text[start:end]}{closing}"
            place = end
        return shown + self.text[place:]


@dataclass(frozen=True)
class PreparedRows:
    """Rows as the model takes them."""

    rows: "datasets.Dataset"
    """Has a column `length`, by which rows are grouped into batches."""
    report: RowReport
    numbers: Sequence[RowNumber] = ()
    """The place in its file of each row; of packed rows none."""


@dataclass(frozen=True)
class Sample:
    """A prompt and the answer that the data give."""

    prompt: str
    expected: str
    given: Mapping[str, str] = field(default_factory=dict)
    """What the row has in the fields that the prompt is made of."""
    pictures: tuple[str, ...] = ()
    """Data URIs of what is asked about, small."""
    sound: str = ""
    """What is heard, as a data URI for the report."""

    def to_json(self) -> dict[str, Any]:
        """As plain values, without what there is none of."""
        said = {"prompt": self.prompt, "expected": self.expected, "given": dict(self.given)}
        more = {"pictures": list(self.pictures), "sound": self.sound}
        return {**said, **{name: value for name, value in more.items() if value}}
