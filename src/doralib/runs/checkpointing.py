"""Checkpoints that are whole or not there: written beside their place, sealed by what is in them, then renamed."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import disk, files
from ..errors import DoraError

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_SEAL = "whole.json"
# what a checkpoint without a seal may hold: one that several processes wrote in its place, and did not end
_KINDS = (".pt", ".pth", ".bin", ".json", ".safetensors", ".jinja", ".txt", ".model")


@contextmanager
def new_checkpoint(final: Path) -> Iterator[Path]:
    """An empty folder that becomes the checkpoint ``final`` when the block ends well.

    Raises:
        DoraError: if it cannot be written, with what to do; no part of it is left behind.
    """
    with explaining_write_errors(final), disk.replacing(final) as part:
        part.mkdir()
        yield part
        seal(part)


@contextmanager
def explaining_write_errors(final: Path) -> Iterator[None]:
    """Say which checkpoint is left, where one cannot be written."""
    try:
        yield
    except Exception as error:
        if not disk.is_write_error(error):
            raise
        last = find_newest(final.parent)
        kept = f"the last whole checkpoint is {last}" if last else "there is no earlier checkpoint"
        free = disk.format_bytes(disk.free_bytes(final.parent))
        raise DoraError(
            f"the checkpoint {final} could not be written: {str(error).splitlines()[0]}\n"
            f"  {free} are free there; {kept}; make room, then go on with --resume"
        ) from error


def seal(folder: Path) -> None:
    """Write down what a finished checkpoint consists of: each file's size and hash."""
    whole = {
        file.name: {"bytes": file.stat().st_size, "sha256": files.hash_file(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != _SEAL and not disk.is_scratch(file)
    }
    files.write_json(folder / _SEAL, whole)


def find_newest(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; what was cut short is passed over."""
    return next((found for found in reversed(_by_step(folder)) if is_whole(found)), None)


def find_sound(folder: Path) -> Path | None:
    """The last whole checkpoint whose every byte is as it was written; one that is damaged is named and passed over."""
    return next((found for found in reversed(_by_step(folder)) if is_sound(found)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of it is there in its full size."""
    seal = _read_seal(checkpoint)
    sizes = {checkpoint / name: _size_of(entry) for name, entry in seal.items()}
    return bool(sizes) and all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())


def is_sound(checkpoint: Path) -> bool:
    """Whether it is whole, and every file has the hash that its seal says; a damaged file is logged."""
    if not is_whole(checkpoint):
        return False
    hashes = {checkpoint / name: entry for name, entry in _read_seal(checkpoint).items() if isinstance(entry, dict)}
    bad = [file.name for file, entry in hashes.items() if files.hash_file(file) != entry.get("sha256")]
    if bad:
        log.warning(f"{checkpoint} is damaged ({', '.join(bad)}: not the bytes that were written) and is passed over")
    return not bad


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps done before it."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def at_step(folder: Path, step: int) -> Path:
    """The place of the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def list_sound(folder: Path) -> list[Path]:
    """Every checkpoint that is as it was written, by step."""
    return [path for path in _by_step(folder) if is_sound(path)]


def list_others(checkpoint: Path) -> list[Path]:
    """What lies in a checkpoint's folder and is no part of it."""
    sealed = {*_read_seal(checkpoint), _SEAL} if (checkpoint / _SEAL).is_file() else None
    return [
        path
        for path in sorted(checkpoint.iterdir())
        if not (path.name in sealed if sealed is not None else path.suffix in _KINDS and path.is_file())
        and not disk.is_scratch(path)
    ]


def prune(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete all but the newest ``keep`` whole checkpoints and the best one; None keeps all."""
    if not keep:
        return
    found = _by_step(folder)
    # one that was cut short may have a later step than the newest whole one, and must not count in its place
    kept = [path.name for path in found if is_whole(path)][-keep:]
    for old in found:
        if old.name not in kept and (best is None or old.name != best.name):
            _delete(old)


def keep_alone(best: Path | None) -> None:
    """Delete all checkpoints beside the best one."""
    for old in _by_step(best.parent) if best is not None else []:
        if old != best:
            _delete(old)


def _delete(checkpoint: Path) -> None:
    # a folder killed half-way through its deletion must not look like a checkpoint
    (checkpoint / _SEAL).unlink(missing_ok=True)
    disk.delete(checkpoint)


def _read_seal(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint should hold, by name; nothing where the seal is missing or damaged."""
    if not (checkpoint / _SEAL).is_file():
        return {}
    try:
        seal = files.read_json(checkpoint / _SEAL)
    except DoraError:
        return {}
    right = isinstance(seal, dict) and all(Path(name).name == name for name in seal)
    return seal if right else {}


def _size_of(entry: Any) -> Any:
    """The size that a seal says; seals without hashes are numbers."""
    return entry.get("bytes") if isinstance(entry, dict) else entry


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)
