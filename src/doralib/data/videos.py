"""Videos that rows name: where each is, which of its frames are seen, and these when they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DoraError, UsageError
from .frames import VIDEOS, decode_video, turn_upright
from .pictures import Size, find_picture, shrink
from .prepare import BadRow

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_CLOCK = 24.0
"""Frames of a second, where a video does not say."""


@dataclass(frozen=True)
class Film:
    """How a video looks: its size, and of its frames which are seen."""

    size: Size
    places: tuple[int, ...]
    """Of the frames that are seen, among all."""
    total: int
    """Frames that it has."""
    fps: float
    """Frames of a second."""

    def describe(self, size: Size) -> dict[str, Any]:
        """The same in the words of transformers' VideoMetadata, for frames of another size."""
        width, height = size
        told = {"total_num_frames": self.total, "fps": self.fps, "duration": self.total / self.fps}
        return {**told, "frames_indices": [*self.places], "width": width, "height": height}


@dataclass(frozen=True)
class Video:
    """A video that is not read yet."""

    path: str
    film: Film | None = None
    """How it looks, where that is known."""

    def name(self) -> str:
        """For a person."""
        return self.path


def find_video(value: Any, root: Path) -> Video:
    """The video that a value of a row stands for: a path, or an object with one.

    Args:
        root: Relative paths begin there.

    Raises:
        BadRow: if it is none of these.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in _KEYS if value.get(key) is not None), None)
    if isinstance(value, Mapping):
        return find_video(value, root)
    found = find_picture(value, root, "video")
    if found.data is not None:
        raise BadRow("with a video that is no file", "name the file of the video")
    return Video(found.path)


_KEYS = ("video", "video_url", "url", "path")


def is_video_name(value: Any) -> bool:
    """Whether a value of a row is the name of a video, or are several."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return bool(value) and all(map(is_video_name, value))
    return isinstance(value, str) and value.lower().endswith(VIDEOS)


def measure_video(video: Video, count: int) -> Film | BadRow:
    """How a video looks where so many frames, evenly apart, are seen; or why it cannot be used. It is decoded once."""
    if video.film is not None:
        return video.film
    if not Path(video.path).is_file():
        return BadRow("without its video", f"there is no file {video.path}")
    total, first, last, size = 0, 0.0, 0.0, (0, 0)
    try:
        for frame in decode_video(Path(video.path)):
            last = float(frame.time or 0.0)
            if not total:
                first, size = last, turn_upright(frame).size
            total += 1
    except UsageError:
        # PyAV is not installed
        raise
    except DoraError as error:
        return BadRow("with a video that cannot be read", str(error))
    if not total:
        return BadRow("with a video that cannot be read", f"{video.path} has no frames")
    fps = (total - 1) / (last - first) if last > first else _NO_CLOCK
    return Film(size, spread_evenly(total, count), total, round(fps, 3))


def spread_evenly(total: int, count: int) -> tuple[int, ...]:
    """So many places among all, the middle of each part of as many; all where there are fewer."""
    if total <= count:
        return tuple(range(total))
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def open_video(video: Video, film: Film, longest: int | None = None) -> "list[Image]":
    """The frames of the film, made smaller where a side has more than ``longest`` pixels.

    Raises:
        BadRow: if they are not there any more.
    """
    wanted, found = set(film.places), []
    size = shrink(film.size, longest)
    try:
        for place, frame in enumerate(decode_video(Path(video.path))):
            if place in wanted:
                image = turn_upright(frame)
                found.append(image if image.size == size else image.resize(size))
            if len(found) == len(wanted):
                break
    except (DoraError, OSError) as error:
        raise BadRow("with a video that cannot be read", str(error)) from None
    if len(found) < len(wanted):
        raise BadRow("with a video that cannot be read", f"{video.path} has other frames than before")
    return found
