"""Files of rows: found by name, folder or pattern, their kinds by the ends of their names, opened as text."""

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import logging
import lzma
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import DoraError, UsageError, did_you_mean, list_some

log = logging.getLogger(__name__)

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".tsf": "tsf",
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


def _open_zst(path: Path) -> Any:
    import pyarrow  # noqa: PLC0415  its import takes long, and few files are so

    return pyarrow.input_stream(str(path), compression="zstd")


_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
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


_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
_SPLITS = {
    "train": re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)"),
    "validation": re.compile(r"(^|[^a-z])(validation|valid|val|dev|eval)([^a-z]|$)"),
    "test": re.compile(r"(^|[^a-z])test(ing)?([^a-z]|$)"),
}
"""What the name of a file in a folder says of its split."""


def match_hub(source: str) -> re.Match[str] | None:
    """The parts of a hub name, `name` and `config`, if it can be one."""
    return _HUB_NAME.fullmatch(source)


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this folder (`save_to_disk`)."""
    return path.is_dir() and any((path / name).is_file() for name in _SAVED)


def is_problems(source: str) -> bool:
    """Whether rows are made by reasoning-gym: ``reasoning-gym:TASK`` or ``reasoning-gym:TASK?setting=value&...``."""
    return source.startswith("reasoning-gym:")


def list_files(source: str, setting: str, split: str = "train") -> list[Path]:
    """The files of rows that a source names, in the order of their names; none of what could be a hub name, or is made.

    A folder stands for the files in it, at any depth, whose kind is known; where their names say splits, for those of
    this split.

    Raises:
        UsageError: if there is none, with what was looked for.
    """
    if is_problems(source):
        return []
    path = Path(source).expanduser()
    known = f"{', '.join(sorted(READERS))}, and the same with {', '.join(_COMPRESSED)} behind it"
    if path.is_file():
        if not find_ending(path):
            raise UsageError(f"{setting}: {source} ends in {path.suffix!r}; the kinds read are {known}")
        return [path]
    if path.is_dir():
        if is_saved_dataset(path):
            return []
        files = [file for file in sorted(path.rglob("*")) if _is_visible(file.relative_to(path)) and file.is_file()]
        if found := [file for file in files if find_ending(file)]:
            return _choose_split(found, path, split, setting)
        raise UsageError(f"{setting}: {source} is a folder without a file of rows; the kinds read are {known}")
    if glob.has_magic(source):
        there = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  of a whole path
        if found := [file for file in there if file.is_file() and find_ending(file)]:
            return found
        hint = f"; of another kind: {list_some([file.name for file in there], 5, ', ')}" if there else ""
        raise UsageError(f"{setting}: no file of rows matches {source!r} (looked in {Path.cwd()}){hint}; {known}")
    if find_ending(path) or not match_hub(source):
        folder = path.absolute().parent
        there_names = [found.name for found in folder.iterdir()] if folder.is_dir() else []
        hint = did_you_mean(path.name, there_names) if there_names else f"; there is no folder {folder}"
        raise UsageError(f"{setting}: no file {source!r} (looked for {path.absolute()}){hint}")
    return []


def _is_visible(path: Path) -> bool:
    return not any(part.startswith((".", "__")) for part in path.parts)


def _choose_split(files: list[Path], folder: Path, split: str, setting: str) -> list[Path]:
    """Those whose names say the split, where several splits lie in a folder; which is logged."""
    said = {
        name: [file for file in files if pattern.search(file.relative_to(folder).as_posix().lower())]
        for name, pattern in _SPLITS.items()
    }
    said = {name: found for name, found in said.items() if found}
    if len(said) < 2 or not said.get(split):
        return files
    left = [file.relative_to(folder).as_posix() for file in files if file not in said[split]]
    log.info(f"{setting}: of {folder} the files of split {split!r}, without {list_some(left, 5, ', ')}")
    return said[split]


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
