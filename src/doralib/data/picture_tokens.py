"""Rows with pictures and videos as tokens and labels, and batches that read the pictures."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor

from ..errors import DoraError
from ..progress import Tick
from ..recipe import DataSettings
from .picture_encoder import PictureEncoder, PictureText, measure_seen
from .picture_rows import PictureRow, Seen, read_picture_row
from .pictures import Picture, Size
from .prepare import IGNORED, BadRow, PreparedRows, Row, RowNumber, RowReport, check_length
from .videos import Film, Video

_ROWS_AT_ONCE = 1000
_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "suffix": datasets.Value("string"),
        "pictures": datasets.List(
            {
                "path": datasets.Value("string"),
                "data": datasets.Value("binary"),
                # of a video, as JSON
                "film": datasets.Value("string"),
            }
        ),
        "num_pictures": datasets.Value("int32"),
        "num_videos": datasets.Value("int32"),
        "pictures_hash": datasets.Value("int64"),
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "length": datasets.Value("int32"),
    }
)


def tokenize_pictures(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    encoder: PictureEncoder,
    root: Path,
    tick: Tick | None = None,
) -> PreparedRows:
    """The usable rows as tokens and labels, with the names of their pictures, each of which was opened once.

    Raises:
        UsageError: if no row is usable.
        DoraError: if a row is bad and bad rows are errors.
    """
    report, kept = RowReport(len(rows)), list[RowNumber]()
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        read: list[tuple[RowNumber, PictureRow]] = []
        for number, row in zip(numbers[start:], chunk, strict=False):
            try:
                read.append((number, read_picture_row(row, settings, root)))
            except BadRow as bad:
                report.drop(number, bad)
        sizes = measure_seen((seen for _, row in read for seen in row.pictures), encoder.frames)
        for number, row in read:
            try:
                made = _encode_row(row, sizes, settings, encoder, number, report)
            except BadRow as bad:
                report.drop(number, bad)
                continue
            kept.append(number)
            for name, value in made.items():
                columns[name].append(value)
        parts.append(datasets.Dataset.from_dict(columns, features=_FEATURES))
        if tick is not None:
            tick("reading pictures", len(chunk), len(rows))
    report.check(settings.bad_rows)
    return PreparedRows(datasets.concatenate_datasets(parts), report, kept)


def _encode_row(
    row: PictureRow,
    sizes: Mapping[Seen, Size | Film | BadRow],
    settings: DataSettings,
    encoder: PictureEncoder,
    number: RowNumber,
    report: RowReport,
) -> dict[str, Any]:
    found: list[Size | Film] = []
    for picture in row.pictures:
        size = sizes[picture]
        if isinstance(size, BadRow):
            raise size
        found.append(size)
    given, rendered = encoder.write(row, learn_all=settings.loss_on == "all")
    ids, labels, lost = encoder.encode(given, rendered, found)
    if lost:
        raise BadRow("malformed", f"the tokenizer has no token for {lost!r}")
    length = len(ids)
    if settings.too_long != "truncate":
        check_length(length, settings.max_length)
    elif length > settings.max_length:
        if encoder.holds_picture(ids[settings.max_length :]):
            raise BadRow(f"whose pictures do not end within {settings.max_length} tokens", f"{length} tokens")
        ids, labels = ids[: settings.max_length], labels[: settings.max_length]
        report.cut(number, length)
    if all(label == IGNORED for label in labels[1:]):
        raise BadRow(f"no answer within {settings.max_length} tokens", f"{length} tokens")
    report.keep(labels)
    for note in rendered.notes:
        report.note(number, note)
    pictures = list(map(_write_seen, row.pictures, found))
    videos = sum(isinstance(each, Film) for each in found)
    counts = (len(pictures) - videos, videos)
    values = (given.text, given.suffix, pictures, *counts, _hash(row.pictures), ids, labels, len(ids))
    return dict(zip(_FEATURES, values, strict=True))


def _write_seen(seen: Seen, look: "Size | Film") -> dict[str, Any]:
    if isinstance(seen, Video):
        return {"path": seen.path, "data": None, "film": json.dumps(asdict(cast("Film", look)))}
    return {"path": seen.path, "data": seen.data, "film": None}


def _read_seen(written: Mapping[str, Any]) -> Seen:
    if written["film"] is None:
        return Picture(written["path"] or "", written["data"])
    film = json.loads(written["film"])
    return Video(written["path"], Film(**{**film, **{name: tuple(film[name]) for name in ("size", "places")}}))


def read_text(row: Row) -> PictureText:
    """What the processor is given for a prepared row."""
    return PictureText(row["text"], tuple(map(_read_seen, row["pictures"])), row["suffix"])


def _hash(pictures: Sequence[Seen]) -> int:
    """Tells rows with other pictures apart."""
    digest = hashlib.sha256()
    for seen in pictures:
        digest.update((seen.data if isinstance(seen, Picture) else None) or seen.path.encode())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


@dataclass(frozen=True)
class PictureCollator:
    """Rows of one batch as the arguments of the model: pictures are read now.

    Rows with and without pictures or videos may stand in one batch; each kind is a call of the processor.
    """

    encoder: PictureEncoder
    pad_id: int
    dtype: torch.dtype = torch.float32
    """Of the model, and so of its pictures."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Keys input_ids, attention_mask, labels, (rows, longest), and what else this model takes.

        Raises:
            DoraError: if the processor makes other tokens of a row than were foreseen.
        """
        texts = [read_text(row) for row in rows]
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i, text in enumerate(texts):
            kinds.setdefault(text.kind, []).append(i)
        parts = [(places, self.encoder.call([texts[i] for i in places])) for places in kinds.values()]
        batch = parts[0][1] if len(parts) == 1 else self._join(parts)
        longest = max(len(row["input_ids"]) for row in rows)
        width = batch["input_ids"].shape[1]
        batch = {
            name: value[:, :longest] if value.shape[:2] == (len(rows), width) and value.dim() == 2 else value
            for name, value in batch.items()
        }
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            if batch["input_ids"][i, :count].tolist() != row["input_ids"]:
                raise DoraError(
                    f"{type(self.encoder.processor).__name__} makes other tokens of a row than its own template says; "
                    f"the row begins {row['text'][:200]!r}"
                )
            batch["attention_mask"][i, count:] = 0
        fill = lambda labels: [*labels, *[IGNORED] * (longest - len(labels))]
        placed = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        return {**placed, "labels": torch.tensor([fill(row["labels"]) for row in rows])}

    def _join(self, parts: Sequence[tuple[list[int], dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Rows with and without pictures in their order; what is no number of a token stays as it is."""
        made: dict[str, Tensor] = {}
        count, width = sum(len(places) for places, _ in parts), max(part["input_ids"].shape[1] for _, part in parts)
        for places, part in parts:
            shape = part["input_ids"].shape
            alone = {name: value for name, value in part.items() if value.shape != shape}
            if made.keys() & alone.keys():
                raise DoraError(
                    f"{type(self.encoder.processor).__name__} calls pictures and videos alike, so rows with one and "
                    "with the other cannot share a batch; set training.per_device_eval_batch_size: 1"
                )
            made |= alone
            for name in part.keys() - alone.keys():
                fill = self.pad_id if name == "input_ids" else 0
                whole = made.setdefault(name, torch.full((count, width), fill, dtype=part[name].dtype))
                whole[torch.tensor(places), : shape[1]] = part[name]
        return made
