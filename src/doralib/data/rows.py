"""Rows of JSON, JSONL, CSV, Parquet or a hub data set, read by `datasets`; what cannot be read is named."""

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..errors import DoraError, UsageError, did_you_mean
from ..files import hash_file
from ..recipe import DataSettings

READERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""File name ending to the reader of `datasets` that takes it."""

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class RawRows:
    """The rows as they stand in the files, nothing left out yet."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    train_numbers: tuple[int, ...]
    """Place of each row of `train` in its file, from 1."""
    validation_numbers: tuple[int, ...] = ()


def check_source(source: str, setting: str) -> None:
    """Check that the file is there and of a known kind, or the name could be one of the hub.

    Raises:
        UsageError: if not, with what was looked for.
    """
    path = Path(source).expanduser()
    known = ", ".join(sorted(READERS))
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UsageError(f"{setting}: {source} ends in {path.suffix!r}; the kinds read are {known}")
        return
    if path.is_dir():
        raise UsageError(f"{setting}: {source} is a folder; name a file in it ({known})")
    if path.suffix.lower() in READERS or not _HUB_NAME.fullmatch(source):
        folder = path.absolute().parent
        there = [found.name for found in folder.iterdir()] if folder.is_dir() else []
        hint = did_you_mean(path.name, there) if there else f"; there is no folder {folder}"
        raise UsageError(f"{setting}: no file {source!r} (looked for {path.absolute()}){hint}")


def read_dataset(source: str, setting: str, split: str = "train") -> datasets.Dataset:
    """Every row of a file, or of one split of a hub data set.

    Raises:
        UsageError: if there is no such file or it holds no row.
        DoraError: if it is cut short or not what its name says, with the line where it breaks.
    """
    check_source(source, setting)
    path = Path(source).expanduser()
    rows = _read_file(path, setting) if path.is_file() else _read_hub(source, setting, split)
    if not len(rows):
        raise UsageError(f"{setting}: {source} has no rows")
    return rows


def read_both(settings: DataSettings, seed: int) -> RawRows:
    """The rows of training and, if asked for, of validation; a fraction is drawn by the seed.

    Raises:
        UsageError: if either source is missing or empty, or the fraction leaves one part empty.
        DoraError: if a file is damaged.
    """
    train = read_dataset(settings.train, "data.train", settings.split)
    if settings.limit is not None:
        train = train.select(range(min(settings.limit, len(train))))
    numbers = range(1, len(train) + 1)
    if settings.validation is None:
        return RawRows(train, None, tuple(numbers))
    if isinstance(settings.validation, str):
        held_out = read_dataset(settings.validation, "data.validation", settings.validation_split)
        return RawRows(train, held_out, tuple(numbers), tuple(range(1, len(held_out) + 1)))
    num_held = max(1, round(settings.validation * len(train)))
    if num_held >= len(train):
        raise UsageError(
            f"data.validation: {settings.validation} of {len(train)} rows leaves nothing to train on; "
            "give more rows, a smaller fraction or a file"
        )
    drawn = np.random.default_rng(seed).permutation(len(train))
    held, kept = sorted(drawn[:num_held].tolist()), sorted(drawn[num_held:].tolist())
    return RawRows(train.select(kept), train.select(held), tuple(i + 1 for i in kept), tuple(i + 1 for i in held))


def hash_sources(settings: DataSettings) -> dict[str, str]:
    """The hash of each file of data, by its setting; a hub data set has none."""
    sources = {"data.train": settings.train, "data.validation": settings.validation}
    paths = {key: Path(source).expanduser() for key, source in sources.items() if isinstance(source, str)}
    return {key: hash_file(path) for key, path in paths.items() if path.is_file()}


def _read_file(path: Path, setting: str) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise UsageError(f"{setting}: {path} is empty")
    reader = READERS[path.suffix.lower()]
    if reader != "parquet":
        _refuse_other_bytes(path, setting)
    options = _as_text(path, setting) if reader == "csv" else {}
    try:
        return _load(reader, path, **options)
    except Exception as error:  # `datasets` lets errors of any kind through
        if "corresponds to no data" in str(error):
            raise UsageError(f"{setting}: {path} has no rows") from None
        raise DoraError(f"{setting}: {path} cannot be read: {_why(path, error)}") from error


def _as_text(path: Path, setting: str) -> dict[str, Any]:
    """What makes the reader of CSV take every value as it is written.

    Left alone it makes numbers of 007 and 1.10, True of true, 1.0 of 1 beside an empty cell, nothing of NA; and it
    drops the first value of rows that are one longer than the header.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = (line for line in csv.reader(file, delimiter=separator) if line)
        header: list[str] = []
        first: list[str] = []
        # it takes no field above 128 kB, which a text may well be; the reader of `datasets` does
        with contextlib.suppress(csv.Error):
            header = next(lines, [])
            first = next(lines, [])
    if not header:
        raise UsageError(f"{setting}: {path} has no header, a first line with the names of the columns")
    names = [name or f"column {i}" for i, name in enumerate(header, 1)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DoraError(f"{setting}: {path} has two columns of one name, {', '.join(twice)}; rename one of them")
    if len(first) > len(names):
        raise DoraError(
            f"{setting}: {path} cannot be read: its header has {len(names)} columns and the first row {len(first)}; "
            "put values that hold the separator in quotes"
        )
    features = datasets.Features({name: datasets.Value("string") for name in names})
    missing = {"keep_default_na": False, "na_values": [""]}
    return {"sep": separator, "names": names, "header": 0, "features": features, **missing}


def _refuse_other_bytes(path: Path, setting: str) -> None:
    """The reader of JSON takes bytes that are not UTF-8, and fails later without a name."""
    decode, done = codecs.getincrementaldecoder("utf-8")().decode, 0
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DoraError(
                f"{setting}: {path} is UTF-16 text; save it again as UTF-8, for example with "
                f"iconv -f utf-16 -t utf-8 {path.name}"
            )
        file.seek(0)
        while True:
            block = file.read(1 << 20)
            try:
                decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DoraError(
                    f"{setting}: {path} is not UTF-8 text (near byte {done + error.start}); save it again as UTF-8, "
                    f"for example with iconv -f latin1 -t utf-8 {path.name}"
                ) from None
            if not block:
                return
            done += len(block)


def _read_hub(source: str, setting: str, split: str) -> datasets.Dataset:
    name = _HUB_NAME.fullmatch(source)
    assert name is not None, "checked by check_source"
    try:
        with _quiet():
            return datasets.load_dataset(name["name"], name["config"], split=split)
    except Exception as error:  # the hub, the network and each data set fail in their own ways
        raise DoraError(
            f"{setting}: {source!r} is no file here (looked for {Path(source).absolute()}), "
            f"and as a hub data set, split {split!r}, it cannot be read: {_first_line(error)}"
        ) from error


def _why(path: Path, error: Exception) -> str:
    """Where a JSON file breaks, which its reader does not say; for the others the deepest error's own words."""
    if READERS[path.suffix.lower()] == "json" and (found := _bad_line(path)):
        return found
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{_first_line(error)} (is it whole, and the same kind of value in every row of a column?)"


def _bad_line(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text at byte {error.start}"
    lines = text.splitlines()
    whole = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    for number, line in [(1, text)] if whole else enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if not whole and not isinstance(found, dict):
                return f"line {number} is no object with columns, {{...}}, but {line.strip():.40}"
        except json.JSONDecodeError as error:
            where = error.lineno if whole else number
            end = "; the file ends there, so it may be cut short" if where >= len(lines) else ""
            return f"line {where} is not JSON: {error.msg}{end}"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _literal(path: Path) -> str:
    """The path with nothing in it that `datasets` would read as a pattern."""
    return re.sub(r"([*?\[\]])", r"[\1]", str(path.absolute()))


def _load(reader: str, path: Path, **options: Any) -> datasets.Dataset:
    """Read a local file by `datasets`, from a cache that goes by its content, and without a request to anybody.

    The library's own cache goes by a file's time, which a copy may share with an older file; and it tells the hub's
    download counter of local files too.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE, "doralib", hash_file(path))
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with _quiet():
            return datasets.load_dataset(
                reader, data_files=_literal(path), split="train", cache_dir=str(cache), **options
            )
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no log lines from `datasets`: what matters of them is in our errors."""
    had_bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not had_bars:
            datasets.enable_progress_bars()
