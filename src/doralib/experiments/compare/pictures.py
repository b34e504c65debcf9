"""What each method draws: a line for each prompt, a column for each cell, all from the same seed."""

from collections.abc import Sequence
from typing import Any

from ...runs.folder import RunFolder
from ...runs.markup import Child
from ...runs.report_pictures import is_picture, show_picture
from ..page import Section
from .study import Comparison

_DATA = "of the data"


def pictures_section(comparison: Comparison) -> Section | None:
    """The pictures of each cell's chosen run of the first seed; None where nothing was drawn."""
    grid, columns = comparison.grid, dict[str, list[dict[str, Any]]]()
    for each in comparison.runs:
        if each.chosen:
            folder = RunFolder(grid.out / "runs" / each.run.name)
            columns.setdefault(each.run.cell.text(grid.axis), folder.read(folder.samples, []))
    first = next(iter(columns.values()), [])
    if not any(is_picture(sample.get("after")) for sample in first):
        return None
    head = ["prompt", _DATA, *columns]
    rows = [_row(number, str(sample.get("prompt", "")), list(columns.values())) for number, sample in enumerate(first)]
    return Section("What each draws", "By the first seed, each prompt from the same noise.", head, rows)


def _row(number: int, prompt: str, columns: Sequence[list[dict[str, Any]]]) -> list[Child]:
    samples = [each[number] if number < len(each) else {} for each in columns]
    return [
        prompt,
        show_picture(samples[0].get("expected"), _DATA),
        *(show_picture(each.get("after"), prompt) for each in samples),
    ]
