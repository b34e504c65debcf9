"""Rows of a large JSONL file: read piece by piece, and kept in an Arrow file that is mapped and not held in memory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from ..disk import replacing
from ..files import hash_file
from .json_rows import ParseColumns, find_type, is_storable, parse_plain, split_columns
from .sources import open_text

_PIECE = 8 << 20
"""Characters that are held at a time, as text and as values."""


def read_large_rows(path: Path, setting: str) -> datasets.Dataset | None:
    """Every row of a JSONL file, by way of a file in the cache of `datasets` that goes by its content.

    None where a piece of lines does not stand for itself: a row goes over several, or one is no row.

    Raises:
        DoraError: if it is not UTF-8, or what is compressed is damaged.
    """
    place = Path(datasets.config.HF_DATASETS_CACHE, "doralib", hash_file(path), "rows.arrow")
    try:
        if not place.is_file():
            _write_rows(place, path, setting, _find_types(path, setting))
    except ValueError:
        return None
    rows = datasets.Dataset.from_file(str(place))
    with pa.OSFile(str(place)) as file:
        kept = frozenset(json.loads(pa.ipc.open_stream(file).schema.metadata[b"json"]))
    return rows.with_transform(ParseColumns(kept)) if kept else rows


def _read_pieces(path: Path, setting: str) -> Iterator[dict[str, list[str | None]]]:
    """The columns of some rows at a time, each value as the JSON that stands there."""
    with open_text(path, setting) as file:
        while lines := file.readlines(_PIECE):
            text = "".join(lines)
            if text.strip():
                yield split_columns(text, "", setting, by_lines=True)


def _find_types(path: Path, setting: str) -> dict[str, str]:
    """How each column is stored, as `find_type` says of the whole of it."""
    types: dict[str, str | None] = {}
    for columns in _read_pieces(path, setting):
        for name, column in columns.items():
            found = find_type(column) if any(text is not None for text in column) else None
            known = types.get(name)
            if not is_storable(name):
                raise ValueError(f"a column of the name {name!a} cannot be stored")
            types[name] = found if known is None else known if found in (None, known) else "json"
    return {name: kind or "large_string" for name, kind in types.items()}


def _write_rows(place: Path, path: Path, setting: str, types: Mapping[str, str]) -> None:
    kept = [name for name, kind in types.items() if kind == "json"]
    fields = [(name, pa.type_for_alias("large_string" if kind == "json" else kind)) for name, kind in types.items()]
    schema = pa.schema(fields, metadata={"json": json.dumps(kept)})
    with replacing(place) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for columns in _read_pieces(path, setting):
            count = max(map(len, columns.values()), default=0)
            if not count:
                raise ValueError("rows without columns cannot be counted")
            ready = [_make_values(columns.get(name, [None] * count), types[name]) for name in types]
            writer.write_table(pa.table(dict(zip(types, ready, strict=True)), schema=schema))


def _make_values(column: Sequence[str | None], kind: str) -> list[object]:
    return [text if text is None or kind == "json" else parse_plain(text) for text in column]
