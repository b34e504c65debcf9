"""Files of rows as columns, every value as it is written; without `datasets` and pyarrow, which are slow to import."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DoraError, UsageError
from .csv_rows import read_columns
from .detect import LOOKED_AT
from .json_rows import ParseColumns, find_type, parse_json, split_columns
from .prepare import RowNumber
from .sources import READERS, find_ending, list_files, open_text
from .tsf_rows import read_tsf

log = logging.getLogger(__name__)

LARGE = 64 << 20
"""Bytes: a smaller file is read at once."""

Columns = dict[str, list[str | None]]


@dataclass(frozen=True)
class RowTable:
    """The rows of one or several files."""

    columns: Mapping[str, Sequence[Any]]
    """Texts and whole numbers, or JSON where `types` says so; None for what is missing."""
    types: Mapping[str, str]
    """How each column is stored: large_string, int64 or json."""
    numbers: Sequence[RowNumber]

    @property
    def parse(self) -> ParseColumns:
        """Makes values of the columns that hold JSON."""
        return ParseColumns(frozenset(name for name, kind in self.types.items() if kind == "json"))

    def read_head(self) -> dict[str, list[Any]]:
        """The first values of each column."""
        return self.parse({name: column[:LOOKED_AT] for name, column in self.columns.items()})


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet by its name."""
    return find_ending(path) == ".parquet"


def is_large(files: Sequence[Path]) -> bool:
    """Whether it is one JSONL file that is better not held in memory."""
    lone = files[0] if len(files) == 1 else None
    by_lines = lone is not None and READERS[find_ending(lone)] == "json" and find_ending(lone) != ".json"
    return lone is not None and by_lines and lone.stat().st_size > LARGE


def _read_large_head(path: Path, setting: str) -> dict[str, list[Any]] | None:
    """The first values of each column; None where they do not stand a row a line."""
    with open_text(path, setting) as file:
        text = "".join(islice(file, LOOKED_AT))
    try:
        columns = split_columns(text, "", setting, by_lines=True)
    except ValueError:
        return None
    return ParseColumns(frozenset(columns))(columns)


def read_head(source: str, setting: str, split: str, documents: str | None) -> dict[str, list[Any]] | None:
    """The first values of each column of a source; None where only `datasets` can tell.

    Raises:
        UsageError: if there is no such file or it holds no row.
        DoraError: if it is damaged.
    """
    files = list_files(source, setting, split)
    if not files:
        return None
    if is_large(files) and (head := _read_large_head(files[0], setting)):
        return head
    if not any(map(is_parquet, files)):
        return read_table(files, setting, split, documents).read_head()
    import pyarrow  # noqa: PLC0415  see above
    import pyarrow.parquet  # noqa: PLC0415

    try:
        batches = pyarrow.parquet.ParquetFile(files[0]).iter_batches(LOOKED_AT)
        return next(batches).to_pydict()
    except (pyarrow.ArrowException, OSError, StopIteration):
        # `datasets` tries again, and says what is wrong
        return None


def read_table(files: Sequence[Path], setting: str, split: str, documents: str | None) -> RowTable:
    """Every row of these files, one after the other; none is Parquet.

    What was read is kept until `forget`: a command first looks at the columns, and takes the rows later.

    Raises:
        UsageError: if a file holds no row.
        DoraError: if one is cut short or not what its name says, with the line where it breaks.
    """
    states = tuple((file, *_describe(file)) for file in files)
    return _read(states, setting, split, documents)


def forget() -> None:
    """Let go of what was read."""
    _read.cache_clear()


def _describe(file: Path) -> tuple[int, ...]:
    """What changes whenever somebody writes to the file."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


@lru_cache(maxsize=8)
def _read(states: Sequence[tuple[Any, ...]], setting: str, split: str, documents: str | None) -> RowTable:
    parts: list[tuple[Path, Columns, bool]] = []
    for file, size, *_ in states:
        where = f"{setting}: {file}"
        if size == 0:
            raise UsageError(f"{where} is empty")
        columns, as_json = _read_columns(file, setting, where, split, documents)
        if not any(columns.values()):
            raise UsageError(f"{where} has no rows")
        parts.append((file, columns, as_json))
    return _join(parts)


def _read_columns(path: Path, setting: str, where: str, split: str, documents: str | None) -> tuple[Columns, bool]:
    """The columns of one file, and whether their values are JSON."""
    kind = READERS[find_ending(path)]
    with open_text(path, setting) as file:
        if kind == "json":
            return _read_json(file.read(), path, where, split), True
        if kind == "csv":
            return read_columns(file, "\t" if find_ending(path) == ".tsv" else ",", where), False
        if kind == "tsf":
            return read_tsf(file, where), False
        return {"text": list(split_documents(file.read(), documents, where))}, False


def split_documents(text: str, documents: str | None, where: str) -> list[str]:
    """The texts of a .txt file: see `DataSettings.documents`."""
    lines = text.splitlines(keepends=True)
    if documents is None:
        paragraphs = re.split(r"\n[ \t\r]*\n", text.strip())
        whole = len(paragraphs) > 1 and any("\n" in each.strip() for each in paragraphs)
        documents = "file" if whole else "line"
        if whole:
            log.info(
                f"{where} is read as one text, as it has paragraphs; data.documents: line makes a row of each line"
            )
    if documents == "line":
        return [line.rstrip("\r\n") for line in lines if line.strip()]
    texts = [text] if documents == "file" else re.split(r"\n[ \t\r]*\n", text)
    return [each.strip("\r\n") for each in texts if each.strip()]


def _join(parts: Sequence[tuple[Path, Columns, bool]]) -> RowTable:
    """The files' columns one below the other; what a file lacks is missing in its rows."""
    as_json = any(is_json for *_, is_json in parts)
    names = list(dict.fromkeys(name for _, columns, _ in parts for name in columns))
    joined: Columns = {name: [] for name in names}
    numbers: list[RowNumber] = []
    for file, columns, is_json in parts:
        count = len(next(iter(columns.values())))
        numbers += range(1, count + 1) if len(parts) == 1 else (f"{file.name}:{i}" for i in range(1, count + 1))
        for name in names:
            values = columns.get(name, [None] * count)
            more = values if is_json or not as_json else [None if each is None else json.dumps(each) for each in values]
            joined[name] += more
    if not as_json:
        return RowTable(joined, dict.fromkeys(joined, "large_string"), numbers)
    types = {name: find_type(column) for name, column in joined.items()}
    plain = {
        name: column if types[name] == "json" else [None if text is None else _read_plain(text) for text in column]
        for name, column in joined.items()
    }
    return RowTable(plain, types, numbers)


def _read_plain(text: str) -> Any:
    # a million texts of which most are as they are written
    return text[1:-1] if text[0] == '"' and "\\" not in text else json.loads(text)


def _read_json(text: str, path: Path, where: str, split: str) -> Columns:
    by_lines = find_ending(path) != ".json"
    try:
        return split_columns(text, split, where, by_lines=by_lines)
    except ValueError as error:
        why = _bad_line(text, lines=by_lines or not text.lstrip().startswith("["))
        raise DoraError(f"{where} cannot be read: {why or error}") from error


def _bad_line(text: str, *, lines: bool) -> str:
    """Where a JSON text breaks, by its lines or as a whole; empty if it does not."""
    if text.startswith("version https://git-lfs"):
        return "it is the place holder that Git LFS leaves; `git lfs pull` fetches the file itself"
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
