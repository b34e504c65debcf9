"""Pictures that rows name: where each is, how large it is without being read, and the picture when it is needed."""

import base64
import binascii
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DoraError
from ..extras import import_extra
from .prepare import BadRow

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Names of pictures end so."""

Size = tuple[int, int]
"""Width and height."""

_TURNED = (5, 6, 7, 8)
"""The orientations of a camera that exchange width and height."""
_ORIENTATION = 0x0112
_THUMBNAIL = 256


@dataclass(frozen=True)
class Picture:
    """A picture that is not read yet."""

    path: str = ""
    """Its file, or what it is called where `data` has it."""
    data: bytes | None = None
    """The file's content, of pictures that rows hold themselves."""

    def name(self) -> str:
        """For a person."""
        return self.path or "a picture in the row"


def find_picture(value: Any, root: Path, what: str = "picture") -> Picture:
    """The picture that a value of a row stands for: a path, a data URI, base64, or an object with one of them.

    Args:
        root: Relative paths begin there.
        what: The word for it in errors.

    Raises:
        BadRow: if it is none of these.
    """
    if isinstance(value, Mapping):
        inner = next((value[key] for key in _KEYS if value.get(key) is not None), None)
        if isinstance(inner, bytes):
            return Picture(str(value.get("path") or ""), inner)
        return find_picture(inner, root, what)
    if isinstance(value, bytes):
        return Picture(data=value)
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"without its {what}", f"{value!r:.60} names no {what}")
    if value.startswith("data:"):
        return Picture("", _decode(value.partition(",")[2]))
    if value.startswith(("http://", "https://")):
        raise BadRow(f"with a {what} on the net", f"{value:.100} is not here; fetch it and name the file")
    path = Path(value.removeprefix("file://")).expanduser()
    return Picture(str(path if path.is_absolute() else root / path))


_KEYS = ("bytes", "image", "image_url", "url", "path", "base64")
"""Where the forms of the field keep a picture: datasets, transformers, OpenAI."""


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadRow("with a picture that cannot be read", f"a data URI is not base64: {error}") from None


def find_root(named: str | None, source: str) -> Path:
    """Where relative paths of pictures begin: in the folder that is named, or else in that of the rows."""
    if named is not None:
        return Path(named).expanduser()
    path = Path(source).expanduser()
    while re.search(r"[*?\[]", path.name) and path != path.parent:
        path = path.parent
    if path.is_file():
        return path.parent
    return path if path.is_dir() else Path()


def open_picture(picture: Picture, longest: int | None = None) -> "Image":
    """The picture upright, in three colors on white, made smaller where a side has more than ``longest`` pixels.

    Raises:
        BadRow: if it is not there, or is none.
    """
    from PIL import ImageOps  # noqa: PLC0415

    with _reading(picture), _open(picture) as opened:
        made = ImageOps.exif_transpose(opened)
        if made.mode in ("RGBA", "LA", "PA") or "transparency" in made.info:
            layered = made.convert("RGBA")
            made = import_pillow().new("RGBA", layered.size, (255, 255, 255, 255))
            made.alpha_composite(layered)
        made = made.convert("RGB")
    size = shrink(made.size, longest)
    return made if size == made.size else made.resize(size, import_pillow().Resampling.BICUBIC)


def shrink(size: Size, longest: int | None) -> Size:
    """The size within a longest side; at least one pixel."""
    if longest is None or max(size) <= longest:
        return size
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height


def measure_pictures(pictures: Iterable[Picture]) -> dict[Picture, Size | BadRow]:
    """The size of each picture, or why it cannot be used: each is read once, in threads, and none is kept."""
    each = list(dict.fromkeys(pictures))
    import_pillow()
    with ThreadPoolExecutor() as pool:
        return dict(zip(each, pool.map(_measure, each), strict=True))


def _measure(picture: Picture) -> Size | BadRow:
    try:
        with _reading(picture), _open(picture) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_ORIENTATION) in _TURNED
            # the file to its end, of a JPEG at an eighth of its size: a cut one is told before training
            opened.draft("RGB", (width // 8, height // 8))
            opened.load()
    except BadRow as bad:
        return bad
    return (height, width) if turned else (width, height)


def make_blank(size: Size) -> "Image":
    """A white picture."""
    return import_pillow().new("RGB", size, (255, 255, 255))


def make_thumbnail(picture: Picture) -> str:
    """A data URI of the picture as WebP, 256 pixels at most.

    Raises:
        BadRow: if it cannot be read.
    """
    return encode_thumbnail(open_picture(picture, _THUMBNAIL))


def encode_thumbnail(image: "Image") -> str:
    """An image as a text that a page shows: WebP of 256 pixels a side at most, in a data URI."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def is_picture_name(value: Any) -> bool:
    """Whether a value of a row is the name of a picture, or one that `datasets` holds."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or is_picture_name(value.get("path"))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return bool(value) and all(map(is_picture_name, value))
    return isinstance(value, str) and (value.startswith("data:image/") or value.lower().endswith(ENDINGS))


def _open(picture: Picture) -> "Image":
    source: Any = io.BytesIO(picture.data) if picture.data is not None else picture.path
    return import_pillow().open(source)


@contextmanager
def _reading(picture: Picture) -> Iterator[None]:
    """Tell what Pillow raises, which has many ways to say it, as a bad row."""
    try:
        yield
    except (BadRow, DoraError):
        raise
    except FileNotFoundError:
        raise BadRow("without its picture", f"there is no file {picture.path}") from None
    except Exception as error:  # noqa: BLE001  each kind of file has errors of its own
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRow("with a picture that cannot be read", f"{picture.name()}: {why}") from None


def import_pillow() -> Any:
    """Pillow's module, which is an extra.

    Raises:
        UsageError: if it is not installed.
    """
    return import_extra("PIL.Image", "a picture")
