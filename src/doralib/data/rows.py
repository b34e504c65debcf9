"""Rows of a file or a hub data set, as they are written there; what cannot be read is named."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..errors import DoraError, UsageError
from ..files import hash_file
from ..recipe import DataSettings
from .csv_rows import read_columns
from .json_rows import ParseColumns, find_type, parse_json, split_columns
from .large_rows import LARGE, read_large_rows
from .sources import READERS, check_file, find_ending, open_text

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class RawRows:
    """The rows as they stand in the files, nothing left out yet."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    train_numbers: tuple[int, ...]
    """Place of each row of `train` in its file, from 1."""
    validation_numbers: tuple[int, ...] = ()
    settings: DataSettings | None = None
    """The data's settings with what style auto stands for; None: as the recipe has them."""


def check_source(source: str, setting: str) -> None:
    """Check that the file is there and of a known kind, or the name could be one of the hub.

    Raises:
        UsageError: if not, with what was looked for.
    """
    check_file(source, setting, could_be_hub=_HUB_NAME.fullmatch)


def read_dataset(source: str, setting: str, split: str = "train") -> datasets.Dataset:
    """Every row of a file, or of one split of a hub data set or of a JSON file that holds several.

    Its columns are read by index or by iteration: `to_list` would give some values as the JSON that they are stored as.

    Raises:
        UsageError: if there is no such file or it holds no row.
        DoraError: if it is cut short or not what its name says, with the line where it breaks.
    """
    check_source(source, setting)
    path = Path(source).expanduser()
    rows = _read_file(path, setting, split) if path.is_file() else _read_hub(source, setting, split)
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


def as_written(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows without what Arrow adds to them: keys that other rows of a column have, with None as value."""
    plain = all(isinstance(feature, datasets.Value) for feature in rows.features.values())
    return rows if plain or rows.format["type"] is not None else rows.with_transform(_drop_missing)


def hash_sources(settings: DataSettings) -> dict[str, str]:
    """The hash of each file of data, by its setting; a hub data set has none."""
    sources = {"data.train": settings.train, "data.validation": settings.validation}
    paths = {key: Path(source).expanduser() for key, source in sources.items() if isinstance(source, str)}
    return {key: hash_file(path) for key, path in paths.items() if path.is_file()}


def _drop_missing(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [_without_none(value) for value in column] for name, column in batch.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _read_file(path: Path, setting: str, split: str) -> datasets.Dataset:
    if path.stat().st_size == 0:
        raise UsageError(f"{setting}: {path} is empty")
    kind, where = READERS[find_ending(path)], f"{setting}: {path}"
    if kind == "parquet":
        return _read_parquet(path, where)
    by_lines = kind == "json" and find_ending(path) != ".json"
    if by_lines and path.stat().st_size > LARGE and (rows := read_large_rows(path, setting)) is not None:
        return rows
    with open_text(path, setting) as file:
        if kind == "json":
            return _read_json(file.read(), path, where, split)
        if kind == "csv":
            return _from_columns(read_columns(file, "\t" if find_ending(path) == ".tsv" else ",", where))
        return _from_columns({"text": [line.rstrip("\r\n") for line in file if line.strip()]})


def _read_json(text: str, path: Path, where: str, split: str) -> datasets.Dataset:
    by_lines = find_ending(path) != ".json"
    try:
        columns = split_columns(text, split, where, by_lines=by_lines)
    except ValueError as error:
        why = _bad_line(text, lines=by_lines or not text.lstrip().startswith("["))
        raise DoraError(f"{where} cannot be read: {why or error}") from error
    types = {name: find_type(column) for name, column in columns.items()}
    plain = {
        name: column if types[name] == "json" else [None if text is None else json.loads(text) for text in column]
        for name, column in columns.items()
    }
    rows = _from_columns(plain, {name: "large_string" if kind == "json" else kind for name, kind in types.items()})
    kept = frozenset(name for name, kind in types.items() if kind == "json")
    return rows.with_transform(ParseColumns(kept)) if kept else rows


def _read_parquet(path: Path, where: str) -> datasets.Dataset:
    try:
        return _load("parquet", path)
    except Exception as error:  # `datasets` lets errors of any kind through
        if "corresponds to no data" in str(error):
            raise UsageError(f"{where} has no rows") from None
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        raise DoraError(f"{where} cannot be read: {_first_line(deepest)} (is it whole?)") from error


def _from_columns(columns: Mapping[str, Sequence[Any]], types: Mapping[str, str] | None = None) -> datasets.Dataset:
    """A data set of these columns, text unless another type is named."""
    kinds = {name: pa.type_for_alias((types or {}).get(name, "large_string")) for name in columns}
    table = pa.table({name: pa.array(column, kinds[name]) for name, column in columns.items()})
    return datasets.Dataset(datasets.table.InMemoryTable(table))


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


def _bad_line(text: str, *, lines: bool) -> str:
    """Where a JSON text breaks, by its lines or as a whole; empty if it does not."""
    there = text.splitlines()
    for number, line in enumerate(there, 1) if lines else [(1, text)]:
        if not line.strip():
            continue
        try:
            found = parse_json(line)
            if lines and not isinstance(found, dict):
                return f"line {number} is no object with columns, {{...}}, but {line.strip():.40}"
        except json.JSONDecodeError as error:
            where = number if lines else error.lineno
            end = "; the file ends there, so it may be cut short" if where >= len(there) else ""
            return f"line {where} is not JSON: {error.msg}{end}"
        except ValueError as error:
            return f"line {number}: {error}"
    return ""


def _first_line(error: BaseException) -> str:
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
