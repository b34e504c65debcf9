"""Rows of sounds with a text or a label: each sound is heard once before training, and read again when it is needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from ..errors import UsageError, did_you_mean
from ..progress import Tick
from ..recipe import DataSettings
from .prepare import IGNORED, BadRow, PreparedRows, Row, RowNumber, RowReport
from .rows import RawRows, keep_undecoded
from .sounds import Clip, Hearing, name_clip
from .sources import list_files
from .templates import value_text

_FRAMES = 50
"""Frames of a second, by which rows are grouped: what Whisper and wav2vec2 make of it."""


@dataclass(frozen=True)
class Clips:
    """Usable rows: sounds, and what is learned of them."""

    prepared: PreparedRows
    """Columns audio (a `Clip`), labels, length."""
    texts: list[str]
    """What the rows have in data.target."""
    seconds: float
    """Of all sounds together."""


def check_clips(rows: RawRows, settings: DataSettings) -> RawRows:
    """The rows with the files of sounds found, each as a path from the root.

    Raises:
        UsageError: if the columns of sounds and answers are not there.
    """
    sources = [(rows.train, settings.sources()[0].path, "data.train")]
    if rows.validation is not None and isinstance(settings.validation, str):
        sources.append((rows.validation, settings.validation, "data.validation"))
    problems = []
    for part, source, _ in sources:
        for name in ("audio", "target"):
            column = getattr(settings, name)
            if column not in part.column_names:
                hint = did_you_mean(column, part.column_names)
                problems.append(f"data.{name}: {source} has no column {column!r}{hint}")
        if problems:
            raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(part.column_names)}"]))
    train = _place(rows.train, settings, *sources[0][1:])
    validation = rows.validation and _place(rows.validation, settings, *sources[-1][1:])
    return replace(rows, train=train, validation=validation)


def _place(rows: datasets.Dataset, settings: DataSettings, source: str, setting: str) -> datasets.Dataset:
    """The rows with undecoded sounds, and whole paths."""
    column = settings.audio
    if isinstance(rows.features.get(column), datasets.Audio):
        return keep_undecoded(rows)
    files = list_files(source, setting, settings.split)
    root = Path(settings.root).expanduser() if settings.root else files[0].parent if files else Path()
    if getattr(rows.features.get(column), "dtype", "") not in ("string", "large_string"):
        return rows
    # what is no text is no path, and counts as missing
    whole = [str(root.absolute() / each) if isinstance(each, str) else None for each in rows[column]]
    return rows.with_format(None).remove_columns(column).add_column(column, whole)


def encode_clips(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    hearing: Hearing,
    label: Callable[[Row, float], list[int] | int],
    tick: Tick | None = None,
) -> Clips:
    """The usable rows with their labels; every sound is read, so that none fails in the middle of training.

    Args:
        label: Of a row and the seconds of its sound: tokens, or the number of a class.

    Raises:
        UsageError: if no row is usable.
        DoraError: if a row is bad and bad rows are errors.
    """
    report, kept, places = RowReport(len(rows)), list[RowNumber](), list[int]()
    columns: dict[str, list[Any]] = {"labels": [], "length": []}
    texts, total = list[str](), 0.0
    for place, (number, row) in enumerate(zip(numbers, rows, strict=True)):
        if tick is not None:
            tick("listening to the sounds", 1, len(rows))
        try:
            seconds = _hear(row[settings.audio], settings, hearing, report, number)
            labels = label(row, seconds)
        except BadRow as bad:
            report.drop(number, bad)
            continue
        many = labels if isinstance(labels, list) else [labels]
        report.kept, total = report.kept + 1, total + seconds
        report.tokens, report.label_tokens = report.tokens + len(many), report.label_tokens + len(many)
        kept.append(number)
        places.append(place)
        texts.append(value_text(row[settings.target]).strip())
        columns["labels"].append(labels)
        columns["length"].append(round(seconds * _FRAMES))
    report.check(settings.bad_rows)
    sounds = rows.select(places).select_columns(settings.audio)
    sounds = sounds if settings.audio == "audio" else sounds.rename_column(settings.audio, "audio")
    made = datasets.concatenate_datasets([sounds, datasets.Dataset.from_dict(columns)], axis=1)
    return Clips(PreparedRows(made, report, kept), texts, total)


def _hear(clip: Clip | None, settings: DataSettings, hearing: Hearing, report: RowReport, number: RowNumber) -> float:
    """The seconds of a sound that can be used."""
    if not clip:
        raise BadRow("empty", f"nothing in {settings.audio!r}")
    seconds = len(hearing.read(clip)) / hearing.rate
    limit = hearing.window or settings.audio_seconds
    if limit is None or seconds <= limit:
        return seconds
    if settings.too_long != "truncate":
        raise BadRow(f"longer than {limit} seconds", f"{name_clip(clip)} has {seconds:.1f} seconds")
    report.cut(number, round(seconds))
    return float(limit)


@dataclass(frozen=True)
class ClipCollator:
    """Rows of one batch: the features of their sounds, `labels` and the number of labels."""

    hearing: Hearing
    masked: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        sounds = [self.hearing.read(row["audio"]) for row in rows]
        if self.hearing.window:
            sounds = [sound[: self.hearing.window * self.hearing.rate] for sound in sounds]
        features = self.hearing.make_features(sounds, masked=self.masked)
        labels = [row["labels"] for row in rows]
        if not isinstance(labels[0], list):
            return {**features, "labels": torch.tensor(labels), "num_tokens": torch.tensor(len(labels))}
        longest = max(map(len, labels))
        padded = torch.tensor([[*each, *[IGNORED] * (longest - len(each))] for each in labels])
        return {**features, "labels": padded, "num_tokens": torch.tensor(sum(map(len, labels)))}
