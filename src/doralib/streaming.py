"""From a checkpoint's files to those of the merged model: row blocks in, row blocks out, and the rest as bytes."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoints import Checkpoint, Shard, Slot, cast_to, copy_bytes, laid_out, read_rows, write_at
from .files import read_json, write_json
from .folding import Change, changed
from .functional import row_blocks
from .packed import PackedLayer, plain_metadata, write_layer
from .requantised import Requantised

Progress = Callable[[int, int], None]
_COPY_BYTES = 32 << 20  # copied at once, between two reports of progress
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Plan:
    """What is to become of the base's tensors."""

    changes: Mapping[str, Sequence[Change]]
    """By the name of the weight."""
    code: str | None
    """The dtype of every floating-point tensor, quantised ones included; None: each keeps its own."""
    packed: Mapping[str, PackedLayer]
    """Quantised layers to be written anew, by the name of each of their tensors."""

    def wanted(self, slot: Slot) -> Slot | None:
        """A tensor as it will be; None where it is left out."""
        layer = self.packed.get(slot.name)
        if layer is None:
            return slot.cast(self.code) if self.code and slot.plain else slot
        if not self.code:
            return layer.written(slot)
        first = next(iter(layer.slots))
        return replace(slot, name=layer.name, shape=layer.shape).cast(self.code) if slot.name == first else None


@dataclass(frozen=True)
class _Piece:
    """One tensor of the output: where it comes from, where it goes, what is done to it."""

    slot: Slot
    out: Slot
    changes: tuple[Change, ...] = ()

    @property
    def untouched(self) -> bool:
        return not self.changes and self.slot.code == self.out.code

    @property
    def blocks(self) -> Iterable[slice]:
        """Rows that are read, computed and written together."""
        whole = any(change.needs_all for change in self.changes)
        return [slice(None)] if whole else row_blocks(*self.slot.matrix)


@dataclass(frozen=True)
class NewFile:
    """One file of the output."""

    path: Path
    header: bytes
    pieces: Sequence[_Piece | None]
    """In the order of the base; None where a part of a quantised layer was."""
    packed: Mapping[str, Slot]
    """Parts of quantised layers to be written, by their names in the base."""

    @property
    def outs(self) -> list[Slot]:
        """Every tensor."""
        return [*(piece.out for piece in self.pieces if piece), *self.packed.values()]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(out.nbytes for out in self.outs)


def silent(done: int, total: int) -> None:
    """Nobody asked."""


def new_file(shard: Shard, plan: Plan, folder: Path) -> NewFile:
    """What becomes of one file of the base."""
    path = folder / shard.path.name
    wanted = {slot.name: new for slot in shard.slots if (new := plan.wanted(slot)) is not None}
    kept = list(wanted.values())
    header, placed = laid_out(kept, path, plain_metadata(shard.metadata) if plan.code else shard.metadata)
    if kept == list(shard.slots):  # the same sizes at the same places: the very same header
        header, placed = shard.header(), [replace(slot, file=path) for slot in kept]
    outs = dict(zip(wanted, placed, strict=True))
    pieces = [
        None if slot.name in plan.packed else _Piece(slot, outs[slot.name], tuple(plan.changes.get(slot.name, ())))
        for slot in shard.slots
    ]
    return NewFile(path, header, pieces, {name: out for name, out in outs.items() if name in plan.packed})


def write_weights(files: Sequence[NewFile], plan: Plan, progress: Progress) -> tuple[Requantised, ...]:
    """Every file's header, then all tensors, in blocks that do not depend on each other; what quantising again cost."""
    for file in files:
        with file.path.open("wb") as handle:
            handle.write(file.header)
            handle.truncate(len(file.header) + file.nbytes)
    total = sum(file.nbytes for file in files)
    jobs = [job for file in files for job in _jobs(file.pieces)]
    threads = torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS)
    done = 0
    try:
        # a thread a core, each with blocks of its own: reading, arithmetic and writing overlap without a queue
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for written in pool.map(lambda job: job(), jobs):
                done += written
                progress(done, total)
    finally:
        torch.set_num_threads(threads)
    # quantised layers are computed whole: one at a time, on all cores
    outs = {name: out for file in files for name, out in file.packed.items()}
    errors = []
    for layer in {layer.name: layer for layer in plan.packed.values()}.values():
        error = write_layer(layer, plan.changes.get(layer.name, ()), outs, plan.code)
        errors.extend([error] if error else [])
        done += sum(outs[name].nbytes for name in layer.slots if name in outs)
        progress(done, total)
    return tuple(errors)


def _jobs(pieces: Sequence[_Piece | None]) -> Iterator[Callable[[], int]]:
    """Calls that write one block each and return its bytes; neighbours that stay as they are go together."""
    for untouched, group in itertools.groupby(pieces, key=lambda piece: piece is not None and piece.untouched):
        run = [piece for piece in group if piece]
        if untouched:
            first, count = run[0], sum(piece.out.nbytes for piece in run)
            for offset in range(0, count, _COPY_BYTES):
                yield partial(_copy, first, offset, min(_COPY_BYTES, count - offset))
            continue
        for piece in run:
            yield from (partial(_write, piece, rows) for rows in piece.blocks)


def _copy(piece: _Piece, offset: int, count: int) -> int:
    copy_bytes(piece.slot.file, piece.slot.start + offset, count, piece.out.file, piece.out.start + offset)
    return count


def _write(piece: _Piece, rows: slice) -> int:
    block = changed(read_rows(piece.slot, rows), piece.changes, rows, piece.slot.shape)
    cast = cast_to(piece.slot.name, block, piece.out.code)
    first, _, _ = rows.indices(piece.slot.matrix[0])
    write_at(piece.out.file, piece.out.start + first * piece.out.row_bytes, cast)
    return cast.nbytes


def write_companions(
    folder: Path, checkpoint: Checkpoint, dtype: str | None, files: Sequence[NewFile]
) -> tuple[str, ...]:
    """Config, tokenizer and all else that is not weights; dtype, names and sizes brought up to date.

    Returns the files of the base that were left out.
    """
    keep, left_out = checkpoint.companions()
    for name in keep:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
    if checkpoint.index:
        shutil.copyfile(checkpoint.index, folder / checkpoint.index.name)
    total = sum(file.nbytes for file in files)
    names = {out.name: file.path.name for file in files for out in file.outs}
    if checkpoint.index and (dtype or total != sum(slot.nbytes for slot in checkpoint.slots.values())):
        content = read_json(checkpoint.index)
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": total}
        if names.keys() != content["weight_map"].keys():
            content["weight_map"] = dict(sorted(names.items()))
        write_json(folder / checkpoint.index.name, content)
    if dtype and (folder / "config.json").is_file():
        config = {key: value for key, value in checkpoint.config().items() if key != "quantization_config"}
        write_json(folder / "config.json", _with_dtype({"torch_dtype": dtype, **config}, dtype))
    return tuple(map(str, left_out))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same settings with every dtype in them changed, those of models inside the model too."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and value
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
