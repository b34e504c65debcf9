"""Rows of .tsf, the format of the Monash archive: a series a row, its attributes and values as they are written."""

from typing import TextIO

from ..errors import DoraError, UsageError


def read_tsf(file: TextIO, where: str) -> dict[str, list[str | None]]:
    """The attributes of each series, `frequency` where the file says one, and `values`, parted by commas.

    Raises:
        UsageError: if no series follows `@data`.
        DoraError: if a line has fewer parts than there are attributes.
    """
    names: list[str] = []
    told: dict[str, str] = {}
    columns: dict[str, list[str | None]] = {}
    in_data = False
    for number, line in enumerate(file, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not in_data:
            key, *words = text.split()
            in_data = key.lower() == "@data"
            if key.lower() == "@attribute" and words:
                names.append(words[0])
            elif key.lower() == "@frequency" and words:
                told["frequency"] = words[0]
            if in_data:
                columns = {name: [] for name in (*names, *told, "values")}
            continue
        parts = text.split(":")
        if len(parts) <= len(names):
            raise DoraError(
                f"{where}: line {number} has {len(parts) - 1} attributes before its values, and {len(names)} are needed"
            )
        cells = [*parts[: len(names)], *told.values(), ":".join(parts[len(names) :])]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell or None)
    if not columns:
        raise UsageError(f"{where} has no line @data, which series follow in a .tsf file")
    return columns
