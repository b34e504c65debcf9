"""What a task of a layout is: files of questions or captions beside files of features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ...documents import decode_json
from ...errors import DoraError
from ...files import read_text

Scoring = Literal["vqa", "label", "truth", "choice", "caption"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Asked:
    """One question, or one thing to describe."""

    key: str
    """Of its row in the layout."""
    text: str
    """What the encoder reads."""
    features: tuple[str, ...]
    """Files of features, one for each picture."""
    targets: tuple[str, ...] = ()
    """What may be answered; none: it is not known."""
    scores: tuple[float, ...] = ()
    """How right each target is, 0 to 1."""
    answers: tuple[str, ...] = ()
    """What people said, where an answer is scored by that."""
    pictures: tuple[str, ...] = ()
    """Where pictures, or videos, may lie, without their endings."""
    spare: int = 0
    """How many characters at the beginning of the text, behind its first word, may be left out if it is too long."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What a file of predictions says of it."""


class Reader(Protocol):
    """Reads the rows of one split of a task."""

    def __call__(self, root: Path, split: Split, features: str) -> Iterator[Asked]:
        """The rows below the layout's folder; raises for files that are missing or damaged."""


class FileLister(Protocol):
    """Says which files a split of a task is read from."""

    def __call__(self, root: Path, split: Split) -> Sequence[Path]:
        """The files, whether they are there or not."""


@dataclass(frozen=True)
class LayoutTask:
    """How a task is read, asked and scored."""

    read: Reader
    list_files: FileLister
    scoring: Scoring
    target_tokens: int
    """Most tokens of a target, and of an answer."""
    text_tokens: int | None = None
    """Most tokens of a text; None: as many as data.max_length."""
    choices: int = 0
    """How many answers there are to choose from."""

    @property
    def num_beams(self) -> int:
        """Beams of the published evaluation."""
        return 5 if self.scoring == "caption" else 1


@dataclass(frozen=True)
class Layout:
    """Tasks whose files lie in one folder."""

    tasks: Mapping[str, LayoutTask]
    features: str
    """Where features lie below a task's own folder."""


def pick(row: Mapping[str, Any], key: str, file: Path, number: int) -> Any:
    """A value of a row.

    Raises:
        DoraError: if the row has none.
    """
    if not isinstance(row, Mapping) or key not in row:
        raise DoraError(f"{file}: row {number} has no {key!r}; is it a file of this layout?")
    return row[key]


def read_lines(file: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        DoraError: naming the line that is none.
    """
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = decode_json(line)
        except ValueError as error:
            raise DoraError(f"{file}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise DoraError(f"{file}, line {number} is no object, {{...}}")
        yield row
