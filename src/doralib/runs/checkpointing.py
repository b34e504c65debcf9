"""Checkpoints that are whole or not there: written beside their place, sealed by a list of sizes, then renamed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .. import files
from ..errors import DoraError

_NAME = re.compile(r"checkpoint-(\d+)")
_SEAL = "whole.json"


@contextmanager
def new_checkpoint(final: Path) -> Iterator[Path]:
    """An empty folder that becomes the checkpoint ``final`` when the block ends well.

    Raises:
        DoraError: if it cannot be written, with what to do; no part of it is left behind.
    """
    try:
        with files.replacing(final) as part:
            part.mkdir()
            yield part
            seal(part)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's own writer reports a full disk as a RuntimeError without a number
        if isinstance(error, RuntimeError) and not re.search("write|iostream", str(error), re.IGNORECASE):
            raise
        last = find_newest(final.parent)
        kept = f"the last whole checkpoint is {last}" if last else "there is no earlier checkpoint"
        free = files.format_bytes(files.free_bytes(final.parent))
        raise DoraError(
            f"the checkpoint {final} could not be written: {str(error).splitlines()[0]}\n"
            f"  {free} are free there; {kept}; make room, then go on with --resume"
        ) from error


def seal(folder: Path) -> None:
    """Write down what a finished checkpoint consists of."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name != _SEAL}
    files.write_json(folder / _SEAL, sizes)


def find_newest(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; what was cut short or damaged is passed over."""
    return next((found for found in reversed(_by_step(folder)) if is_whole(found)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of it is there in its full size."""
    if not (checkpoint / _SEAL).is_file():
        return False
    try:
        sizes = files.read_json(checkpoint / _SEAL)
    except DoraError:
        return False
    there = {name: checkpoint / name for name in sizes}
    return all(file.is_file() and file.stat().st_size == sizes[name] for name, file in there.items())


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps done before it."""
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def prune(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete all but the newest ``keep`` whole checkpoints and the best one; None keeps all."""
    if not keep:
        return
    found = _by_step(folder)
    # one that was cut short may have a later step than the newest whole one, and must not count in its place
    kept = [path.name for path in found if is_whole(path)][-keep:]
    for old in found:
        if old.name not in kept and (best is None or old.name != best.name):
            # a folder killed half-way through its deletion must not look like a checkpoint
            (old / _SEAL).unlink(missing_ok=True)
            files.delete(old)


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)
