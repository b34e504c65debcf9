"""Rows of CSV and TSV, every value as it is written."""

import contextlib
import csv
import itertools
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from ..errors import DoraError, UsageError

log = logging.getLogger(__name__)

_SEPARATORS = (",", "\t", ";", "|")
_LOOKED_AT = 20


def read_columns(file: TextIO, usual: str, where: str) -> dict[str, list[str | None]]:
    """The columns of a table by the names in its first line; an empty cell is None.

    The separator is the `usual` one, or the one that divides the first lines where that does not; `sep=;`, which Excel
    writes before the header, names it.

    Raises:
        UsageError: if there is no header.
        DoraError: if a name comes twice, a row has more cells than the header, or a quote is never closed.
    """
    lines: Iterator[str] = iter(file)
    first = list(itertools.islice(lines, _LOOKED_AT))
    dropped = 0
    if first and first[0].lower().startswith("sep=") and len(first[0].strip("\r\n")) == len("sep=;"):
        separator, dropped = first.pop(0)[4], 1
    else:
        separator = _find_separator(first, usual)
    if separator != usual:
        log.info(f"{where}: its cells are separated by {separator!r}")
    spaced = any(re.search(rf'{re.escape(separator)} +"', line) for line in first) and _is_spaced(first, separator)
    if spaced:
        log.info(f"{where}: the blanks behind {separator!r} belong to it, as its header shows")
    with _long_cells():
        rows = csv.reader(itertools.chain(first, lines), delimiter=separator, strict=True, skipinitialspace=spaced)
        try:
            return _columns(rows, where)
        except csv.Error as error:
            raise DoraError(
                f"{where} cannot be read: near line {rows.line_num + dropped}: {error} "
                "(a quote inside quotes is written twice)"
            ) from None


def _columns(rows: Iterator[list[str]], where: str) -> dict[str, list[str | None]]:
    header = next((row for row in rows if row), None)
    if header is None:
        raise UsageError(f"{where} has no header, a first line with the names of the columns")
    names = [name.strip() or f"column {i}" for i, name in enumerate(header, 1)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DoraError(f"{where} has two columns of one name, {', '.join(twice)}; rename one of them")
    columns: list[list[str | None]] = [[] for _ in names]
    for number, row in enumerate(filter(None, rows), 1):
        if any(row[len(names) :]):
            which = "the first row" if number == 1 else f"row {number} has"
            raise DoraError(
                f"{where} cannot be read: its header has {len(names)} columns and {which} {len(row)}; "
                "put values that hold the separator in quotes"
            )
        for column, cell in itertools.zip_longest(columns, row[: len(names)]):
            column.append(cell or None)
    return dict(zip(names, columns, strict=True))


def _is_spaced(lines: Sequence[str], separator: str) -> bool:
    """Does a blank stand before every name of the header but the first?"""
    header = next(csv.reader(lines, delimiter=separator), [])
    return len(header) > 1 and all(name.startswith(" ") for name in header[1:])


def _find_separator(lines: Sequence[str], usual: str) -> str:
    """The separator that gives every line as many cells as the header, two or more; the usual one if there is none."""
    for separator in (usual, *(one for one in _SEPARATORS if one != usual)):
        with contextlib.suppress(csv.Error), _long_cells():
            widths = [len(row) for row in csv.reader(lines, delimiter=separator) if row]
            # the last line looked at may be half of a quoted cell
            if widths and widths[0] > 1 and (separator == usual or set(widths[:-1]) <= {widths[0]}):
                return separator
    return usual


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """No limit of 128 kB to a cell, which a text may well exceed."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
