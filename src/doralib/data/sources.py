"""Files of rows: their kinds by the ends of their names, compressed or not, opened as text."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from ..errors import DoraError, UsageError, did_you_mean

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}
"""The end of a file's name to its kind."""


def _open_zip(path: Path) -> Any:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
    if len(names) != 1:
        raise DoraError(f"{path} holds {len(names)} files, and one is needed; unpack it and name the file")
    return archive.open(names[0])


_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
    ".zip": _open_zip,
}


def find_ending(name: str | Path) -> str:
    """The ending that tells a file's kind, `.csv` of `a.csv.gz`; empty if the kind is none that is read."""
    ends = [suffix.lower() for suffix in Path(name).suffixes]
    packed = bool(ends) and ends[-1] in _COMPRESSED
    ending = (ends[:-1] if packed else ends)[-1:]
    # Parquet compresses its own columns
    known = bool(ending) and ending[0] in READERS and not (packed and READERS[ending[0]] == "parquet")
    return ending[0] if known else ""


def check_file(source: str, setting: str, could_be_hub: Callable[[str], object]) -> None:
    """Check that the file is there and of a known kind, or the name could be one of the hub.

    Raises:
        UsageError: if not, with what was looked for.
    """
    path = Path(source).expanduser()
    known = f"{', '.join(sorted(READERS))}, and the same with {', '.join(_COMPRESSED)} behind it"
    if path.is_file():
        if not find_ending(path):
            raise UsageError(f"{setting}: {source} ends in {path.suffix!r}; the kinds read are {known}")
        return
    if path.is_dir():
        raise UsageError(f"{setting}: {source} is a folder; name a file in it ({known})")
    if find_ending(path) or not could_be_hub(source):
        folder = path.absolute().parent
        there = [found.name for found in folder.iterdir()] if folder.is_dir() else []
        hint = did_you_mean(path.name, there) if there else f"; there is no folder {folder}"
        raise UsageError(f"{setting}: no file {source!r} (looked for {path.absolute()}){hint}")


@contextlib.contextmanager
def open_text(path: Path, setting: str) -> Iterator[TextIO]:
    """The text of a file, unpacked if it is compressed; a mark of the byte order is left out.

    Raises:
        DoraError: if it is not UTF-8, with the place, or what is compressed is damaged.
    """
    try:
        with _open_bytes(path) as file:
            _refuse_other_bytes(file, path, setting)
        with _open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            yield text
    except (EOFError, OSError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DoraError(f"{setting}: {path} cannot be read: {error}; is it whole?") from error


def _open_bytes(path: Path) -> Any:
    return _COMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))(path)


def _refuse_other_bytes(file: BinaryIO, path: Path, setting: str) -> None:
    decode, done = codecs.getincrementaldecoder("utf-8")().decode, 0
    while True:
        block = file.read(1 << 20)
        if not done and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DoraError(
                f"{setting}: {path} is UTF-16 text; save it again as UTF-8, for example with "
                f"iconv -f utf-16 -t utf-8 {path.name}"
            )
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
