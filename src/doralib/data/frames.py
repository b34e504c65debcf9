"""Pictures and the frames of videos, read from their files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DoraError, UsageError
from ..extras import import_extra
from .pictures import ENDINGS, Picture, import_pillow, open_picture
from .prepare import BadRow

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg")


def find_media(places: list[Path]) -> list[Path]:
    """The files of pictures and videos that are named, or lie in folders that are named, by name.

    Raises:
        UsageError: if there is none, one is of another kind, or two would have features of one name.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(file for file in place.rglob("*") if is_media(file) and file.is_file())
        elif not place.is_file():
            raise UsageError(f"there is no file or folder {place}")
        elif not is_media(place):
            raise UsageError(f"{place} is neither a picture ({', '.join(ENDINGS)}) nor a video ({', '.join(VIDEOS)})")
        else:
            found.append(place)
    if not found:
        raise UsageError(f"no picture and no video in {', '.join(map(str, places))}")
    by_name: dict[tuple[str, bool], Path] = {}
    for file in found:
        other = by_name.setdefault((file.stem, is_video(file)), file)
        if other != file:
            raise UsageError(f"{other} and {file} would have features of one name; give one of them another name")
    return found


def check_readers(files: list[Path]) -> None:
    """Raise UsageError if a package is not installed that reads one of some files."""
    for file in files:
        if is_video(file):
            _import_av(file)
        else:
            import_pillow()


def is_media(file: Path) -> bool:
    """Whether a name is that of a picture or a video."""
    return file.suffix.lower() in ENDINGS or is_video(file)


def is_video(file: Path) -> bool:
    """Whether a name is that of a video."""
    return file.suffix.lower() in VIDEOS


def open_image(file: Path) -> "Image":
    """A picture in three colors, upright, on white where it is transparent.

    Raises:
        DoraError: if the file is no picture.
    """
    try:
        return open_picture(Picture(str(file)))
    except BadRow as bad:
        raise DoraError(str(bad)) from None


def read_frames(file: Path, fps: float) -> "Iterator[Image]":
    """The frames of a video, so many a second by their own times, the first of them at its start.

    Raises:
        DoraError: if the file is no video, or damaged.
    """
    taken, begin = 0, 0.0
    for i, frame in enumerate(decode_video(file)):
        time = float(frame.time or 0.0)
        begin = begin if i else time
        # a hair early: times are rounded to the file's own clock
        if time - begin >= taken / fps - 1e-3:
            taken += 1
            yield turn_upright(frame)
    if not taken:
        raise DoraError(f"{file} has no frames")


def turn_upright(frame: Any) -> "Image":
    """A frame of PyAV's as a picture; a telephone says by how much it was turned, counterclockwise."""
    turned = getattr(frame, "rotation", 0)
    return frame.to_image().rotate(turned, expand=True) if turned else frame.to_image()


def decode_video(file: Path) -> Iterator[Any]:
    """The frames of a video as PyAV has them.

    Raises:
        UsageError: if PyAV is not installed.
        DoraError: if the file is no video, or damaged.
    """
    av = _import_av(file)
    try:
        with av.open(str(file)) as opened:
            if not opened.streams.video:
                raise ValueError("it has no pictures")
            yield from opened.decode(opened.streams.video[0])
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DoraError(f"{file} cannot be read as a video: {error}") from None


def _import_av(file: Path) -> Any:
    return import_extra("av", f"{file}: a video")
