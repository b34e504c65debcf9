"""Pictures and their captions: a folder of them, or rows of a file or hub data set with a column of pictures."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError, list_some
from ..files import hash_file
from ..recipe import DataSettings, DataSource
from .pictures import ENDINGS, Picture, open_picture
from .prepare import BadRow, Row
from .rows import RawRows, hold_out, read_dataset, repeat_rows
from .templates import columns_in, fill_template, value_text

PICTURE, CAPTION = "picture", "caption"
"""The columns of rows of pictures: the path or the bytes of a file; a text, or None."""
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PICTURE_COLUMNS = ("image", "file_name", "picture", "path")
_CAPTION_COLUMNS = ("caption", "text", "prompt")
_UNREAD = ("target", "documents", "too_long")


def read_pictures(settings: DataSettings, seed: int) -> RawRows:
    """The pictures and captions of training and validation; a fraction is drawn by the seed.

    A caption is what `data.prompt` makes of a row's columns, or its column caption, text or prompt; else the text in
    NAME.txt beside NAME.png; else `data.instance_prompt`.

    Raises:
        UsageError: if a source is missing, holds no pictures, or a setting means nothing for them.
    """
    if unread := [name for name in _UNREAD if getattr(settings, name) is not None]:
        raise UsageError(f"data.{unread[0]}: pictures have captions and nothing of that kind; leave it out")
    made = [_read_set(source, settings, seed) for source in settings.sources()]
    held = [each.validation for each in made if each.validation is not None]
    if isinstance(settings.validation, str):
        own = settings.of_source(DataSource(path=settings.validation, split=settings.validation_split))
        held = [_read(own, "data.validation")]
    return RawRows(
        datasets.concatenate_datasets([each.train for each in made]),
        datasets.concatenate_datasets(held) if held else None,
        tuple(number for each in made for number in each.train_numbers),
        tuple(range(1, sum(map(len, held)) + 1)),
    )


def list_hashes(rows: RawRows) -> Iterator[str]:
    """For each picture a text that is another one if the picture or its caption is; no matter where it lies."""
    for part in (rows.train, rows.validation):
        for row in part or ():
            path = row[PICTURE]
            there = path is not None and Path(path).is_file()
            found = hash_file(Path(path)) if there else hashlib.sha256(row["bytes"] or b"").hexdigest()
            yield f"{found} {row[CAPTION]}"


def _read_set(source: DataSource, settings: DataSettings, seed: int) -> RawRows:
    own = settings.of_source(source)
    rows = _read(own, "data.train")
    rows = rows.select(range(min(settings.limit or len(rows), len(rows))))
    kept, held = hold_out(rows, settings.validation, seed)
    kept = repeat_rows(kept, source.weight, seed)
    numbers = tuple(i + 1 for i in kept)
    return RawRows(rows.select(kept), rows.select(held) if held else None, numbers)


def _read(settings: DataSettings, setting: str) -> datasets.Dataset:
    """The rows of one source as pictures and captions."""
    assert isinstance(settings.train, str)
    folder = Path(settings.train).expanduser()
    files = list_pictures(folder) if folder.is_dir() else []
    if not files:
        return _read_columns(read_dataset(settings.train, setting, settings.split), settings, setting, _root(folder))
    described = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if described is not None:
        rows = read_dataset(str(described), setting, settings.split)
        return _read_columns(rows, settings, setting, folder)
    if settings.prompt:
        raise UsageError(f"{setting}: data.prompt names a column, and {folder} has none; it would be in {_METADATA[0]}")
    captions = [_read_beside(file) or settings.instance_prompt for file in files]
    return _make([str(file) for file in files], captions)


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, at any depth, in the order of their names."""
    visible = lambda file: not any(part.startswith(".") for part in file.relative_to(folder).parts)
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in ENDINGS and visible(file)]


def _root(path: Path) -> Path:
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def _read_columns(rows: datasets.Dataset, settings: DataSettings, setting: str, root: Path) -> datasets.Dataset:
    """Pictures and captions of rows with columns; paths are from ``root``."""
    names = rows.column_names
    picture = settings.images or next((name for name in _PICTURE_COLUMNS if name in names), None)
    if picture not in names:
        asked = f"no column {picture!r}" if picture else f"none of the columns {', '.join(_PICTURE_COLUMNS)}"
        raise UsageError(f"{setting}: {asked}; there are {list_some(names, 10, ', ')}: set data.images")
    template = settings.prompt or next((name for name in _CAPTION_COLUMNS if name in names), "")
    if lost := [name for name in columns_in(template, "data.prompt") if name not in names]:
        raise UsageError(f"{setting}: data.prompt: no column {lost[0]!r}; there are {list_some(names, 10, ', ')}")
    if isinstance(rows.features.get(picture), datasets.Image):
        rows = rows.cast_column(picture, datasets.Image(decode=False))
    found = [_locate(value, root) for value in rows[picture][:]]
    captions = [_fill(template, rows[i]) for i in range(len(rows))] if template else [None] * len(rows)
    beside = lambda value: _read_beside(Path(value)) if isinstance(value, str) else None
    return _make(
        found, [c or beside(value) or settings.instance_prompt for c, value in zip(captions, found, strict=True)]
    )


def _fill(template: str, row: Row) -> str:
    return fill_template(template, {name: value_text(row[name]) for name in columns_in(template)}).strip()


def _locate(value: Any, root: Path) -> Any:
    """The file's path, or its bytes where the row itself has them."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return str(root / value) if isinstance(value, str) else value


def _make(pictures: list[Any], captions: list[str | None]) -> datasets.Dataset:
    files = [each if isinstance(each, str) else None for each in pictures]
    inside = [each if isinstance(each, bytes) else None for each in pictures]
    return datasets.Dataset.from_dict(
        {PICTURE: files, "bytes": inside, CAPTION: captions},
        datasets.Features(
            {PICTURE: datasets.Value("string"), "bytes": datasets.Value("binary"), CAPTION: datasets.Value("string")}
        ),
    )


def _read_beside(picture: Path) -> str | None:
    """The caption in NAME.txt, if there is one."""
    # "/" and "." have no name; what is no picture is refused where pictures are opened
    file = picture.with_suffix(".txt") if picture.name else picture
    return (file.read_text(encoding="utf-8", errors="replace").strip() or None) if file.is_file() else None


@dataclass(frozen=True)
class FittedPicture:
    """The middle of a picture, as large as it is learned."""

    pixels_CHW: Tensor
    """From -1 to 1."""
    original: tuple[int, int]
    """Height and width of the file's picture."""
    corner: tuple[int, int]
    """Top and left of the part, once the picture was scaled."""

    @property
    def sizes(self) -> list[int]:
        """What SDXL is told."""
        return [*self.original, *self.corner, *self.pixels_CHW.shape[1:]]


def open_captioned(row: Row) -> Image.Image:
    """The picture of a row, as `open_picture` gives it.

    Raises:
        BadRow: if there is no such file, or it is no picture.
    """
    inside, path = row.get("bytes"), row.get(PICTURE)
    if not inside and not path:
        raise BadRow("without a picture", "no picture")
    return open_picture(Picture(path or "", inside or None))


def fit_picture(picture: Image.Image, size: tuple[int, int]) -> FittedPicture:
    """The middle of a picture, scaled so that it just covers this height and width."""
    (width, height), (H, W) = picture.size, size
    scale = max(H / height, W / width)
    scaled = (max(W, round(width * scale)), max(H, round(height * scale)))
    top, left = (scaled[1] - H) // 2, (scaled[0] - W) // 2
    part = picture.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + W, top + H))
    pixels_HWC = torch.from_numpy(np.asarray(part, dtype=np.float32).copy())
    return FittedPicture(pixels_HWC.permute(2, 0, 1) / 127.5 - 1, (height, width), (top, left))


def read_caption(row: Row) -> str:
    """The caption of a row.

    Raises:
        BadRow: if it has none.
    """
    if not row.get(CAPTION):
        raise BadRow("without a caption", "no caption: give data.prompt, NAME.txt beside it, or data.instance_prompt")
    return str(row[CAPTION])
