"""The pictures, videos and sounds that rows of a task name, each of which is opened once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.pictures import Picture, find_picture
from ..data.prepare import BadRow, Row
from ..data.sounds import Clip, hear_clip
from ..data.videos import Video, find_video
from ..errors import DoraError, list_some

_SHOWN = 12


def find_pictures(
    name: str, rows: Sequence[Row], root: Path, images: str | None, videos: str | None
) -> list[tuple[Picture | Video, ...]]:
    """What is shown with each row, pictures before videos.

    Args:
        name: Of the task, for errors.
        rows: With the columns.
        root: Where relative names begin.
        images: The column of pictures, each row's one or a list.
        videos: Likewise of videos.

    Raises:
        DoraError: if some cannot be read.
    """
    problems: list[str] = []
    found: list[tuple[Picture | Video, ...]] = []
    for number, row in enumerate(rows, 1):
        try:
            pictures = [find_picture(value, root) for value in _list_shown(row, images)]
            found.append((*pictures, *(find_video(value, root) for value in _list_shown(row, videos))))
        except BadRow as bad:
            problems.append(f"row {number}: {bad}")
    check_pictures(name, found, problems)
    return found


def _list_shown(row: Row, column: str | None) -> Sequence[Any]:
    """What a row has in a column of pictures or videos, which may hold one or several."""
    value = [] if column is None else row[column]
    return value if isinstance(value, list | tuple) else [value]


def check_pictures(name: str, found: Sequence[Sequence[Picture | Video]], problems: Sequence[str] = ()) -> None:
    """Open each picture, and each video's beginning.

    Raises:
        DoraError: if some cannot be read, or there were problems before.
    """
    from ..data.picture_encoder import measure_seen  # noqa: PLC0415  a task is checked without torch

    looks = measure_seen((each for seen in found for each in seen), frames=1)
    problems = [*problems, *(str(look) for look in looks.values() if isinstance(look, BadRow))]
    if problems:
        told = list_some(problems, _SHOWN)
        raise DoraError(f"task {name}: of its pictures and videos {len(problems)} cannot be read:\n  {told}")


def find_sounds(name: str, values: Sequence[Any], root: Path) -> list[Clip]:
    """The sounds that a column names, all of which were read once.

    Raises:
        DoraError: if some cannot be heard.
    """
    found, problems = list[Clip](), list[str]()
    for number, value in enumerate(values, 1):
        clip: Clip = value if isinstance(value, Mapping) else str(root / str(value))
        try:
            hear_clip(clip)
        except BadRow as bad:
            problems.append(f"row {number}: {bad}")
        found.append(clip)
    if problems:
        told = list_some(problems, _SHOWN)
        raise DoraError(f"task {name}: of its sounds {len(problems)} cannot be heard:\n  {told}")
    return found
