"""What one model got on one task, and as it stands in a file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from ..errors import DoraError
from .metrics import Score

WRONG_KEPT = 20
"""Mistakes of a task that a result shows."""


@dataclass(frozen=True)
class TaskResult:
    """What one model got on one task."""

    task: str
    kind: str
    n: int
    metrics: Mapping[str, Score]
    confusion: Mapping[str, Any] | None
    """``{"labels": [...], "counts": [[...]]}``; a row of counts is a true label."""
    wrong: tuple[Mapping[str, str], ...]
    """At most 20 mistakes: prompt, expected, predicted, and for generated answers the whole output."""
    cut: int
    """Prompts longer than the model takes, whose beginning was left out."""
    seconds: float
    right: str = ""
    """A 1 for each row that was answered rightly and a 0 for the others, in their order; empty for a perplexity."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "wrong": list(self.wrong)}

    @classmethod
    def from_json(cls, values: Any, file: Path) -> Self:
        """What `to_json` made, as it stands in a file.

        Raises:
            DoraError: if the file is damaged.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DoraError(f"{file} is damaged: a task's result, {where}: {first['msg']}") from None
