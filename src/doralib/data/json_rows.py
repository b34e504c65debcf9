"""Rows of JSON, each value kept as it is written: 1.0 is not 1, a long number loses no digit, a date is text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..documents import check_depth, explain_depth
from ..errors import UsageError

_SPACE = re.compile(r"[ \t\r\n]*")
_SMALL = re.compile(r"-?[1-9]\d{0,17}|0")
_MOST_DIGITS = 4300
"""Python makes no number of more."""

_BLANK = r"[ \t\r\n]*+"
_STRING = r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_VALUE = rf"(?>{_STRING}|-?(?:0|[1-9]\d*+)(?:\.\d++)?(?:[eE][-+]?\d++)?|true|false|null)"
_PAIR = re.compile(rf"{_BLANK}({_STRING}){_BLANK}:{_BLANK}({_VALUE}){_BLANK},?", re.ASCII)
_FLAT = re.compile(
    rf'\{{(?:{_BLANK}{_STRING}{_BLANK}:{_BLANK}{_VALUE}{_BLANK}(?:,(?={_BLANK}")|(?=\}})))++\}}', re.ASCII
)
"""An object of texts, numbers and words alone, which most rows are: three times as fast as value by value."""

_SHORTEST_DEEP = 200
"""Characters: a shorter text cannot be nested too deep."""

_TABLES = {"data", "rows", "examples", "records", "items", "samples", "instances"}
"""Names under which a file keeps its rows, beside others for what it says of itself."""

Row = dict[str, str]
"""A column's name to the JSON of its value."""


class WrittenNumber(float):
    """A number that is printed as it was written."""

    written: str

    def __new__(cls, written: str) -> Self:
        """The number in a text."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.written,)


def _whole(written: str) -> int | WrittenNumber:
    return WrittenNumber(written) if written == "-0" or len(written) > _MOST_DIGITS else int(written)


_DECODER = json.JSONDecoder(parse_float=WrittenNumber, parse_int=_whole)


def parse_json(text: str) -> Any:
    """The value of a JSON text; its numbers print as they are written.

    Raises:
        ValueError: if it is not JSON, or nested too deep.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(explain_depth()) from None
    check_depth(text, value)
    return value


@dataclass(frozen=True)
class ParseColumns:
    """What makes values of the columns that hold JSON, whenever rows are read from a data set."""

    columns: frozenset[str]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The same columns, with values for JSON texts."""
        parse = lambda column: [None if text is None else parse_json(text) for text in column]
        return {name: parse(column) if name in self.columns else list(column) for name, column in batch.items()}


def parse_plain(text: str) -> Any:
    """The value of a JSON text that is a text or a small number."""
    # most are as they are written
    return text[1:-1] if text[0] == '"' and "\\" not in text else json.loads(text)


def is_storable(name: str) -> bool:
    """Whether Arrow can store a column of this name."""
    # a C string ends at a NUL, and half of a pair of surrogates has no UTF-8
    return "\0" not in name and name.encode("utf-8", "replace").decode() == name


def find_type(column: Sequence[str | None]) -> str:
    """How values given as JSON are stored: as what they are if all are texts or small numbers, else as `json`."""
    given = [text for text in column if text is not None]
    if all(text.startswith('"') for text in given):
        # half of a pair of surrogates is no text that can be stored
        return "json" if any("\\ud" in text.lower() for text in given) else "large_string"
    return "int64" if all(_SMALL.fullmatch(text) for text in given) else "json"


def split_columns(text: str, split: str, where: str, *, by_lines: bool) -> dict[str, list[str | None]]:
    """The columns of a JSON or JSONL file, each value as the JSON that stands there, None for null or nothing.

    The text is a list of rows, rows one after the other, or one object that holds them: a list under one of its keys,
    or a list or a mapping for each column. `split` chooses among several lists.

    Args:
        by_lines: each object is a row, also where there is one alone: a JSONL file.

    Raises:
        ValueError: if it is not JSON, or a row is no object.
        UsageError: if the file holds several lists of rows and none is called `split`.
    """
    rows = _read_rows(text)
    if not by_lines and len(rows) == 1 and text.lstrip().startswith("{"):
        rows = _unwrap(rows[0], split, where)
    names = list(dict.fromkeys(name for row in rows for name in row))
    taken = lambda value: None if value == "null" else value
    return {name: [taken(row.get(name)) for row in rows] for name in names}


def _read_rows(text: str) -> list[Row]:
    """The rows of a list, or those that stand one after the other."""
    at, rows = _skip(text, 0), []
    # a line of a JSONL file may be a list too: a conversation and nothing else
    listed = text.startswith("[", at) and not _is_conversation(text, at)
    at = _skip(text, at + 1) if listed else at
    while at < len(text) and not (listed and text[at] == "]"):
        row, at = _read_row(text, at)
        rows.append(row)
        at = _skip_comma(text, at, "]") if listed else _skip(text, at)
    if listed and _skip(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return rows


def _read_row(text: str, at: int) -> tuple[Row, int]:
    """The row that begins here, and where it ends."""
    if text[at] == "{":
        return _read_pairs(text, at)
    end = _end(text, at)
    if _is_conversation(text, at):
        return {"messages": text[at:end]}, end
    raise ValueError(f"a row is no object with columns, {{...}}, but {text[at:end]:.40}")


def _unwrap(found: Row, split: str, where: str) -> list[Row]:
    """The rows of a file that holds one object; the object itself if it is a row."""
    tables = {name: value for name, value in found.items() if _is_table(value)}
    if len(tables) < len(found):
        # one row may hold a list of objects too, such as its tools
        tables = {name: value for name, value in tables.items() if name in {*_TABLES, split}}
    if tables:
        if len(tables) > 1 and split not in tables:
            raise UsageError(
                f"{where} holds several lists of rows, {', '.join(tables)}, and none is called {split!r}; "
                "name one by data.split (or validation_split)"
            )
        return _read_rows(tables.get(split, next(iter(tables.values()))))
    kinds = {value[0] for value in found.values()}
    if set(found) >= {"columns", "data"} and kinds == {"["}:
        names = [json.loads(name) for name in _items(found["columns"])]
        return [dict(zip(names, _items(row), strict=False)) for row in _items(found["data"])]
    if kinds == {"["} and not any(_is_conversation(value) for value in found.values()):
        columns = {name: list(_items(value)) for name, value in found.items()}
        if len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kinds == {"{"}:
        inner = {name: _read_pairs(value, 0)[0] for name, value in found.items()}
        if all(name.isdecimal() for name in inner):
            return list(inner.values())
        keys = next(iter(inner.values()))
        if all(key.isdecimal() for key in keys) and all(list(one) == list(keys) for one in inner.values()):
            return [{name: one[key] for name, one in inner.items()} for key in keys]
    return [found]


def _is_table(value: str) -> bool:
    """Is it a list of objects, which are no turns of a conversation?"""
    return value.startswith("[") and value.startswith("{", _skip(value, 1)) and not _is_conversation(value)


def _is_conversation(text: str, at: int = 0) -> bool:
    """Is what begins here a list of turns, by the first of them?"""
    first = _skip(text, at + 1)
    if not (text.startswith("[", at) and text.startswith("{", first)):
        return False
    return not {"role", "from"}.isdisjoint(_read_pairs(text, first)[0])


def _items(array: str) -> Iterator[str]:
    """The JSON of each element of a list."""
    at = _skip(array, 1)
    while array[at] != "]":
        end = _end(array, at)
        yield array[at:end]
        at = _skip_comma(array, end, "]")


def _read_pairs(text: str, at: int) -> tuple[Row, int]:
    """The keys of the object that begins here with the JSON of their values, and where it ends."""
    if flat := _FLAT.match(text, at):
        pairs = _PAIR.findall(text, at + 1, flat.end())
        return {key[1:-1] if "\\" not in key else json.loads(key): value for key, value in pairs}, flat.end()
    found: Row = {}
    at = _skip(text, at + 1)
    while not text.startswith("}", at):
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if not isinstance(key, str) or not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting a name in quotes and ':'", text, at)
        start = _skip(text, at + 1)
        end = _end(text, start)
        found[key] = text[start:end]
        at = _skip_comma(text, end, "}")
    return found, at + 1


def _skip_comma(text: str, at: int, closing: str) -> int:
    """Where the next element begins, or the closing bracket stands."""
    at = _skip(text, at)
    if text.startswith(closing, at):
        return at
    if not text.startswith(",", at):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return _skip(text, at + 1)


def _end(text: str, start: int) -> int:
    """Where the JSON value that begins here ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(explain_depth()) from None
    if end - start > _SHORTEST_DEEP:
        check_depth(text[start:end], value)
    return end


def _skip(text: str, at: int) -> int:
    """The next place that is not blank."""
    if at < len(text) and text[at] > " ":
        return at
    found = _SPACE.match(text, at)
    assert found is not None, "it matches nothing too"
    return found.end()
