"""Rows of files, folders and hub data sets, as they are written there; what cannot be read is named."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..errors import DoraError, UsageError
from ..files import hash_file, hash_texts
from ..recipe import DataSettings
from .json_rows import ParseColumns, is_storable
from .large_rows import read_large_rows
from .layouts import list_layout_files, read_layout
from .picture_rows import list_captioned
from .prepare import RowNumber
from .problems import make_problems
from .sources import is_problems, is_saved_dataset, list_files, match_hub
from .tables import RowTable, forget, is_large, is_parquet, read_table


@dataclass(frozen=True)
class RawRows:
    """The rows as they stand in the files, nothing left out yet."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    train_numbers: tuple[RowNumber, ...]
    """Place of each row of `train` in its file."""
    validation_numbers: tuple[RowNumber, ...] = ()
    settings: DataSettings | None = None
    """The data's settings with what style auto stands for; None: as the recipe has them."""
    others: tuple["RawRows", ...] = ()
    """Further sets of rows, each with its own settings; only for who asked for sets (`read_sets`)."""


def read_dataset(source: str, setting: str, split: str = "train") -> datasets.Dataset:
    """Every row of a file or folder, or of one split of a hub data set or of a JSON file that holds several.

    Its columns are read by index or by iteration: `to_list` would give some values as the JSON that they are stored as.

    Raises:
        UsageError: if there is no such file or it holds no row.
        DoraError: if it is cut short or not what its name says, with the line where it breaks.
    """
    return _read(source, setting, split)[0]


def keep_undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows whose columns of pictures, videos and sounds are as they are stored, where `datasets` would open them."""
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        for kind in (datasets.Image, datasets.Video, datasets.Audio):
            if isinstance(inner, kind):
                closed = kind(decode=False)
                rows = rows.cast_column(name, closed if inner is feature else datasets.List(closed))
    return rows


def read_both(settings: DataSettings, seed: int) -> RawRows:
    """The rows of training and, if asked for, of validation; a fraction is drawn by the seed.

    Several sets are one, and have the same columns.

    Raises:
        UsageError: as `read_sets`, or if the sets have different columns.
        DoraError: if a file is damaged.
    """
    sets = read_sets(settings, seed)
    if len(sets) == 1:
        return sets[0]
    validation = [each for each in sets if each.validation is not None]
    return RawRows(
        _join([each.train for each in sets], settings),
        _join([each.validation for each in validation], settings) if validation else None,
        tuple(number for each in sets for number in each.train_numbers),
        tuple(number for each in validation for number in each.validation_numbers),
    )


def read_sets(settings: DataSettings, seed: int) -> list[RawRows]:
    """The rows of each set of training, as often as its weight says, and what is held out of it; settings as its own.

    A fraction is held out of each set before its rows are repeated; a file of validation is with the first set.

    Raises:
        UsageError: if a source is missing or empty, or the fraction leaves one part empty.
        DoraError: if a file is damaged.
    """
    sources, made = settings.sources(), []
    for i, source in enumerate(sources):
        own, setting = settings.of_source(source), "data.train" if len(sources) == 1 else f"data.train[{i}]"
        rows, numbers = _read_source(own, source.path, setting, own.split)
        if not settings.has_tasks:
            rows = rows.select(range(min(settings.limit or len(rows), len(rows))))
        if len(sources) > 1 and isinstance(next(iter(numbers)), int):
            numbers = [f"{Path(source.path).name}:{number}" for number in numbers]
        kept, held = hold_out(rows, settings.validation, seed)
        kept = repeat_rows(kept, source.weight, seed)
        if not kept:
            raise UsageError(f"{setting}: weight {source.weight:g} of {len(rows)} rows leaves none; give a larger one")
        part = RawRows(
            rows.select(kept),
            rows.select(held) if held else None,
            tuple(numbers[i] for i in kept),
            tuple(numbers[i] for i in held),
            None if len(sources) == 1 else own,
        )
        made.append(part)
    if isinstance(settings.validation, str):
        rows, numbers = _read_source(settings, settings.validation, "data.validation", settings.validation_split)
        made[0] = replace(made[0], validation=rows, validation_numbers=tuple(numbers))
    forget()
    return made


def _read_source(
    settings: DataSettings, source: str, setting: str, split: str
) -> tuple[datasets.Dataset, Sequence[RowNumber]]:
    if settings.has_tasks:
        return read_layout(settings, source, split, setting)
    if settings.layout == "caption" and (found := list_captioned(source)) is not None:
        return found, found["image"][:]
    return _read(source, setting, split, settings.documents)


def hold_out(rows: datasets.Dataset, fraction: str | float | None, seed: int) -> tuple[list[int], list[int]]:
    """Places of the rows that are kept, and of those that a fraction takes out.

    Raises:
        UsageError: if nothing would be kept.
    """
    if fraction is None or isinstance(fraction, str):
        return list(range(len(rows))), []
    num_held = max(1, round(fraction * len(rows)))
    if num_held >= len(rows):
        raise UsageError(
            f"data.validation: {fraction} of {len(rows)} rows leaves nothing to train on; "
            "give more rows, a smaller fraction or a file"
        )
    drawn = np.random.default_rng(seed).permutation(len(rows))
    return sorted(drawn[num_held:].tolist()), sorted(drawn[:num_held].tolist())


def repeat_rows(places: list[int], weight: float, seed: int) -> list[int]:
    """Each place as often as the weight says; of a fraction of it some, drawn by the seed."""
    whole = int(weight)
    drawn = np.random.default_rng(seed).permutation(len(places))[: round((weight - whole) * len(places))]
    return places * whole + sorted(places[i] for i in drawn.tolist())


def _join(parts: Sequence[datasets.Dataset], settings: DataSettings) -> datasets.Dataset:
    """Sets of the same columns as one.

    Raises:
        UsageError: if they differ.
    """
    first, names = parts[0], [source.path for source in settings.sources()]
    for part, name in zip(parts[1:], names[1:], strict=False):
        if part.features != first.features or _find_parsed(part) != _find_parsed(first):
            told = "; ".join(
                f"{each}: {', '.join(rows.column_names)}" for each, rows in ((names[0], first), (name, part))
            )
            raise UsageError(f"data.train: the sets have different columns, or values of different kinds: {told}")
    joined = datasets.concatenate_datasets([part.with_format(None) for part in parts])
    parsed = _find_parsed(first)
    return joined if parsed is None else joined.with_transform(parsed)


def _find_parsed(rows: datasets.Dataset) -> ParseColumns | None:
    transform = rows.format["format_kwargs"].get("transform") if rows.format["type"] == "custom" else None
    return transform if isinstance(transform, ParseColumns) else None


def as_written(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows without what Arrow adds to them: keys that other rows of a column have, with None as value."""
    plain = all(isinstance(feature, datasets.Value) for feature in rows.features.values())
    return rows if plain or rows.format["type"] is not None else rows.with_transform(_drop_missing)


def list_inputs(settings: DataSettings) -> dict[str, list[Path]]:
    """The files of data, by the setting that names them; a hub data set has none."""
    if settings.has_tasks:
        return list_layout_files(settings)
    sources = [source.path for source in settings.sources()]
    named = {"data.train" if len(sources) == 1 else f"data.train[{i}]": path for i, path in enumerate(sources)}
    splits = dict.fromkeys(named, settings.split)
    if isinstance(settings.validation, str):
        named["data.validation"], splits["data.validation"] = settings.validation, settings.validation_split
    found: dict[str, list[Path]] = {}
    for setting, path in named.items():
        with contextlib.suppress(UsageError):  # told by who reads it
            found[setting] = list_files(path, setting, splits[setting])
    return found


def hash_sources(settings: DataSettings) -> dict[str, str]:
    """The hash of each file of data, by its setting, and its name where there are several; a hub data set has none."""
    return {
        setting if len(files) == 1 else f"{setting} {file}": hash_file(file)
        for setting, files in list_inputs(settings).items()
        for file in files
    }


def _drop_missing(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [_without_none(value) for value in column] for name, column in batch.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _read(
    source: str, setting: str, split: str, documents: str | None = None
) -> tuple[datasets.Dataset, Sequence[RowNumber]]:
    """Every row of a source, and its place."""
    files = list_files(source, setting, split)
    if not files:
        rows = make_problems(source, setting) if is_problems(source) else _read_hub(source, setting, split)
    elif is_large(files) and (found := read_large_rows(files[0], setting)) is not None:
        rows = found
    elif not any(map(is_parquet, files)):
        table = read_table(files, setting, split, documents)
        return _from_table(table, f"{setting}: {source}"), table.numbers
    elif all(map(is_parquet, files)):
        rows = _read_parquet(files, f"{setting}: {source}")
    else:
        others = ", ".join(sorted({file.suffix for file in files} - {".parquet"}))
        raise UsageError(f"{setting}: {source} holds Parquet files beside others ({others}); name one kind, *.parquet")
    if not len(rows):
        raise UsageError(f"{setting}: {source} has no rows")
    return rows, range(1, len(rows) + 1)


def _from_table(table: RowTable, where: str) -> datasets.Dataset:
    if wrong := [name for name in table.columns if not is_storable(name)]:
        raise DoraError(f"{where} has columns whose names cannot be stored: {', '.join(map(ascii, wrong))}")
    kinds = {name: "large_string" if kind == "json" else kind for name, kind in table.types.items()}
    columns = {name: pa.array(column, pa.type_for_alias(kinds[name])) for name, column in table.columns.items()}
    rows = datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))
    return rows.with_transform(table.parse) if table.parse.columns else rows


def _read_parquet(files: Sequence[Path], where: str) -> datasets.Dataset:
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise UsageError(f"{where.partition(':')[0]}: {empty[0]} is empty")
    try:
        return _load("parquet", files)
    except Exception as error:  # `datasets` lets errors of any kind through
        if "corresponds to no data" in str(error):
            raise UsageError(f"{where} has no rows") from None
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        raise DoraError(f"{where} cannot be read: {_first_line(deepest)} (is it whole?)") from error


def _read_hub(source: str, setting: str, split: str) -> datasets.Dataset:
    path = Path(source).expanduser()
    name = match_hub(source)
    try:
        with _quiet():
            if is_saved_dataset(path):
                saved = datasets.load_from_disk(str(path))
                return saved if isinstance(saved, datasets.Dataset) else saved[split]
            assert name is not None, "checked by list_files"
            return datasets.load_dataset(name["name"], name["config"], split=split)
    except Exception as error:  # the hub, the network and each data set fail in their own ways
        if path.is_dir():
            raise DoraError(f"{setting}: {source}, split {split!r}, cannot be read: {_first_line(error)}") from error
        raise DoraError(
            f"{setting}: {source!r} is no file here (looked for {Path(source).absolute()}), "
            f"and as a hub data set, split {split!r}, it cannot be read: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _literal(path: Path) -> str:
    """The path with nothing in it that `datasets` would read as a pattern."""
    return re.sub(r"([*?\[\]])", r"[\1]", str(path.absolute()))


def _load(reader: str, files: Sequence[Path], **options: Any) -> datasets.Dataset:
    """Read local files by `datasets`, from a cache that goes by its content, and without a request to anybody.

    The library's own cache goes by a file's time, which a copy may share with an older file; and it tells the hub's
    download counter of local files too.
    """
    digest = hash_file(files[0]) if len(files) == 1 else hash_texts(map(hash_file, files))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "doralib", digest)
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with _quiet():
            return datasets.load_dataset(
                reader, data_files=[_literal(path) for path in files], split="train", cache_dir=str(cache), **options
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
