"""Write a merged checkpoint tensor by tensor: what changes is computed, the rest is copied."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DoraError
from ..files import read_json, write_json
from ..functional import combined, is_finite, merge_weight, merged_change, row_blocks, sum_dtype, swapped_channels
from ..quantization.error import QuantizationCost
from ..state import LayerAdapter, RowValues
from .match import view_as_rows
from .quantized import QuantizedWeight, drop_torchao_metadata
from .safetensors import DTYPES, Checkpoint, Shard, Slot, cast_to, lay_out, read_rows


@dataclass(frozen=True)
class TensorChange:
    """What one adapter does to one tensor of a checkpoint."""

    weight: float
    """Its share: the tensor moves by this times the adapter's own change."""
    what: LayerAdapter | Tensor | RowValues
    """An adapter of its rows, the tensor as it was trained whole, or some rows as they were trained."""
    transposed: bool = False
    """Whether its rows are not stored as rows: HF Conv1D, embeddings, transposed convolutions, some experts."""

    @property
    def needs_all(self) -> bool:
        """Whether it takes the tensor at once: blocks of experts have all their rows, blocks of others do not."""
        return self.transposed and not (isinstance(self.what, LayerAdapter) and self.what.kind == "experts")


def apply_changes(block: Tensor, changes: Sequence[TensorChange], rows: slice, shape: tuple[int, ...]) -> Tensor:
    """Apply every change to a block, before the cast: ``W + Σ w (V - W)``; with one change of weight 1, V itself.

    Args:
        block: (rows, everything else) of the tensor as stored; all of it where a change needs all. Of a stack of
            experts each is one row.
        rows: which rows of the tensor these are.
        shape: the whole tensor's.
    """
    if not changes:
        return block
    if len(changes) == 1 and changes[0].weight == 1:
        change = changes[0]
        if isinstance(change.what, Tensor):
            return _view_matrix(change.what)[rows]
        if isinstance(change.what, RowValues):
            return _put_rows(block, change.what, rows)
        return _apply_to_rows(merge_weight, block, change, rows, shape)
    return combined(block, ((change.weight, _compute_difference(block, change, rows, shape)) for change in changes))


def _compute_difference(block: Tensor, change: TensorChange, rows: slice, shape: tuple[int, ...]) -> Tensor:
    if isinstance(change.what, LayerAdapter):
        return _apply_to_rows(merged_change, block, change, rows, shape)
    dtype = sum_dtype(block.dtype)
    if isinstance(change.what, RowValues):
        return _put_rows(block.to(dtype), change.what, rows) - block.to(dtype)
    return _view_matrix(change.what)[rows].to(dtype) - block.to(dtype)


def _put_rows(block: Tensor, values: RowValues, rows: slice) -> Tensor:
    """The block with the rows that are in it replaced, in the wider of the two dtypes."""
    first = rows.start or 0
    inside = (values.index_N >= first) & (values.index_N < first + len(block))
    dtype = torch.promote_types(block.dtype, values.rows_ND.dtype)
    return block.to(dtype).index_copy(0, values.index_N[inside] - first, values.rows_ND[inside].to(dtype))


def _view_matrix(value: Tensor) -> Tensor:
    """A tensor in the shape of `Slot.matrix`: the first axis by all others."""
    return value.reshape(len(value), -1) if value.dim() else value.reshape(1, 1)


def _apply_to_rows(
    formula: Callable[..., Tensor], block: Tensor, change: TensorChange, rows: slice, shape: tuple[int, ...]
) -> Tensor:
    """Apply the formula to output rows, and put them back as the block is stored."""
    adapter = change.what
    assert isinstance(adapter, LayerAdapter)
    (a_RI, b_OR), m_O = adapter.factors, adapter.m_O
    if adapter.kind == "experts":
        stored = block.view(-1, *shape[1:])
        W_EOI = view_as_rows(stored, adapter, transposed=change.transposed)
        lengths = [None] * len(W_EOI) if m_O is None else m_O[rows]
        weights = zip(W_EOI, a_RI[rows], b_OR[rows], lengths, strict=True)
        new_EOI = torch.stack([formula(*each, adapter.scale) for each in weights])
        return view_as_rows(new_EOI, adapter, transposed=change.transposed).flatten(1)
    if not change.transposed:
        return formula(block, a_RI, b_OR[rows], None if m_O is None else m_O[rows], adapter.scale)
    stored = block.view(shape)
    new_OI = formula(view_as_rows(stored, adapter, transposed=True), a_RI, b_OR, m_O, adapter.scale)
    if adapter.kind == "transposed_convolution":
        return swapped_channels(new_OI.view(adapter.shape), stored.shape[0] // adapter.shape[1]).flatten(1)
    return new_OI.T


@dataclass(frozen=True)
class Sink:
    """Where the bytes of the output go: into its files, or beside what stands there, to be compared."""

    put: Callable[[Path, int, Tensor], None]
    """Takes a file, a place in it and a contiguous tensor."""
    copy: Callable[[Path, int, int, Path, int], None]
    """Takes a file, a place, a number of bytes, and the file and the place where they go."""


_Check = Callable[[str, Callable[[], Tensor], Tensor], None]
"""Takes a tensor's name, what gives a block of it before the change, and the block after it."""


def write_quantized(
    layer: QuantizedWeight, changes: Sequence[TensorChange], outs: Mapping[str, Slot], plan: "Plan", sink: Sink
) -> QuantizationCost | None:
    """Write one layer with every change, and say what quantizing it again cost.

    Args:
        outs: The places of its tensors in the output, by their names in the base.
        plan: Whether it is made dense, and whether NaN passes.
    """
    parts = layer.read()
    W = layer.rows(parts)
    merged = ((rows, apply_changes(W[rows], changes, rows, layer.shape)) for rows in row_blocks(*layer.shape))
    if plan.code:
        out = outs[next(iter(layer.slots))]
        for rows, block in merged:
            plan.check(layer.name, partial(W.__getitem__, rows), block)
            sink.put(out.file, out.start + rows.start * out.row_bytes, cast_to(layer.name, block, plan.code))
        return None
    V_OI = torch.empty(layer.shape, dtype=sum_dtype(W.dtype))
    for rows, block in merged:
        plan.check(layer.name, partial(W.__getitem__, rows), block)
        V_OI[rows] = block
    made = layer.quantize_again(parts, V_OI)
    for name in layer.slots:
        if made[name].nbytes != outs[name].nbytes:
            raise DoraError(f"{name}: quantized again it takes {made[name].nbytes} bytes, not {outs[name].nbytes}")
        sink.put(outs[name].file, outs[name].start, made[name].contiguous())
    return QuantizationCost.measure(layer.name.removesuffix(".weight"), layer.storage, W, V_OI, layer.rows(made))


Progress = Callable[[int, int], None]
_COPY_BYTES = 32 << 20  # copied at once, between two reports of progress
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Plan:
    """What becomes of the base's tensors."""

    changes: Mapping[str, Sequence[TensorChange]]
    """By the name of the weight."""
    code: str | None
    """The dtype of every floating-point tensor, quantized ones included; None: each keeps its own."""
    quantized: Mapping[str, QuantizedWeight]
    """Quantized layers to be written anew, by the name of each of their tensors."""
    resized: Mapping[str, Tensor] = field(default_factory=dict)
    """What is changed instead of the base's tensor of this name, which has other sizes."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """New tensors, by the base's tensors that they start as."""
    dropped: frozenset[str] = frozenset()
    """The base's tensors that are left out."""
    allow_nonfinite: bool = False
    """Write NaN and infinite numbers too."""

    @property
    def check(self) -> _Check:
        """What looks at each block that is written."""
        return _ignore if self.allow_nonfinite else _check_finite

    def plan_new(self, slot: Slot, name: str) -> Slot:
        """A dense tensor of this name as it will be, made of this one."""
        slot = slot.cast(self.code) if self.code and slot.plain else slot
        shape = tuple(self.resized[name].shape) if name in self.resized else slot.shape
        return replace(slot, name=name, shape=shape).cast(slot.code)

    def plan_slot(self, slot: Slot) -> Slot | None:
        """A tensor as it will be; None where it is left out."""
        if slot.name in self.dropped:
            return None
        layer = self.quantized.get(slot.name)
        if layer is None and slot.name in self.resized:
            return self.plan_new(slot, slot.name)
        if layer is None:
            return slot.cast(self.code) if self.code and slot.plain else slot
        if not self.code:
            return layer.plan_slot(slot)
        first = next(iter(layer.slots))
        return replace(slot, name=layer.name, shape=layer.shape).cast(self.code) if slot.name == first else None


@dataclass(frozen=True)
class _Piece:
    """One tensor of the output: where it comes from, where it goes, what is done to it."""

    slot: Slot
    out: Slot
    changes: tuple[TensorChange, ...] = ()
    start: Tensor | None = None
    """What is changed instead of the slot."""

    @property
    def untouched(self) -> bool:
        same = self.slot.code == self.out.code and self.slot.name == self.out.name
        return same and not self.changes and self.start is None

    @property
    def blocks(self) -> Iterable[slice]:
        """Rows that are read, computed and written together."""
        whole = any(change.needs_all for change in self.changes)
        return [slice(None)] if whole else row_blocks(*self.out.matrix)


@dataclass(frozen=True)
class NewFile:
    """One file of the output."""

    path: Path
    header: bytes
    pieces: Sequence[_Piece | None]
    """In the order of the base; None where a part of a quantized layer was."""
    quantized: Mapping[str, Slot]
    """Parts of quantized layers to be written, by their names in the base."""

    @property
    def outs(self) -> list[Slot]:
        """Every tensor."""
        return [*(piece.out for piece in self.pieces if piece), *self.quantized.values()]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(out.nbytes for out in self.outs)


def ignore_progress(done: int, total: int) -> None:
    """Report to nobody."""


def plan_file(shard: Shard, plan: Plan, folder: Path) -> NewFile:
    """Plan what one file of the base becomes: its header, and the place of every tensor."""
    path = folder / shard.path.name
    wanted: dict[str, Slot] = {}
    sources: dict[str, Slot] = {}
    for slot in shard.slots:
        if (new := plan.plan_slot(slot)) is not None:
            wanted[slot.name] = new
        copies = [name for name, source in plan.copies.items() if source == slot.name]
        wanted |= {name: plan.plan_new(slot, name) for name in copies}
        sources |= dict.fromkeys([slot.name, *copies] if slot.name not in plan.dropped else copies, slot)
    kept = list(wanted.values())
    header, placed = lay_out(kept, path, drop_torchao_metadata(shard.metadata) if plan.code else shard.metadata)
    if kept == list(shard.slots):  # the same sizes at the same places: the very same header
        header, placed = shard.header(), [replace(slot, file=path) for slot in kept]
    outs = dict(zip(wanted, placed, strict=True))
    pieces = [
        None
        if name in plan.quantized
        else _Piece(slot, outs[name], tuple(plan.changes.get(name, ())), plan.resized.get(name))
        for name, slot in sources.items()
    ]
    return NewFile(path, header, pieces, {name: out for name, out in outs.items() if name in plan.quantized})


def write_headers(files: Sequence[NewFile]) -> None:
    """Write every file's header, and make it as long as it will be."""
    for file in files:
        with file.path.open("wb") as handle:
            handle.write(file.header)
            handle.truncate(len(file.header) + file.nbytes)


def stream_weights(
    files: Sequence[NewFile], plan: Plan, progress: Progress, sink: Sink
) -> tuple[QuantizationCost, ...]:
    """Make all tensors by independent blocks and hand them on; returns what quantizing again cost."""
    total = sum(file.nbytes for file in files)
    jobs = [job for file in files for job in _make_jobs(file.pieces, sink, plan.check)]
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
    # quantized layers are computed whole: one at a time, on all cores
    outs = {name: out for file in files for name, out in file.quantized.items()}
    errors = []
    for layer in {layer.name: layer for layer in plan.quantized.values()}.values():
        error = write_quantized(layer, plan.changes.get(layer.name, ()), outs, plan, sink)
        errors.extend([error] if error else [])
        done += sum(outs[name].nbytes for name in layer.slots if name in outs)
        progress(done, total)
    return tuple(errors)


def _make_jobs(pieces: Sequence[_Piece | None], sink: Sink, check: _Check) -> Iterator[Callable[[], int]]:
    """Calls that make one block each and return its size in bytes; neighbors that stay as they are go together."""
    for untouched, group in itertools.groupby(pieces, key=lambda piece: piece is not None and piece.untouched):
        run = [piece for piece in group if piece]
        if untouched:
            first, count = run[0], sum(piece.out.nbytes for piece in run)
            for offset in range(0, count, _COPY_BYTES):
                yield partial(_copy, sink, first, offset, min(_COPY_BYTES, count - offset))
            # beside the copy, while the file is at hand
            yield from (partial(_look, check, piece.slot, rows) for piece in run for rows in piece.blocks)
            continue
        for piece in run:
            yield from (partial(_write, sink, check, piece, rows) for rows in piece.blocks)


def _copy(sink: Sink, piece: _Piece, offset: int, count: int) -> int:
    sink.copy(piece.slot.file, piece.slot.start + offset, count, piece.out.file, piece.out.start + offset)
    return count


def _look(check: _Check, slot: Slot, rows: slice) -> int:
    if check is not _ignore and DTYPES[slot.code].is_floating_point:
        block = read_rows(slot, rows)
        check(slot.name, lambda: block, block)
    return 0


def _write(sink: Sink, check: _Check, piece: _Piece, rows: slice) -> int:
    start = piece.start
    read = read_rows(piece.slot, rows) if start is None else start[rows].to(DTYPES[piece.slot.code])
    block = apply_changes(read, piece.changes, rows, piece.out.shape)
    check(piece.out.name, lambda: read, block)
    cast = cast_to(piece.out.name, block, piece.out.code)
    first, _, _ = rows.indices(piece.out.matrix[0])
    sink.put(piece.out.file, piece.out.start + first * piece.out.row_bytes, cast)
    return cast.nbytes


def _check_finite(name: str, before: Callable[[], Tensor], merged: Tensor) -> None:
    """Check that a block of the output holds numbers.

    Raises:
        DoraError: if one is NaN or infinite, with whose they are.
    """
    if is_finite(merged):
        return
    if is_finite(before()):
        why = "the adapter's numbers, its alpha or its weight are too large"
    else:
        why = "the base holds such numbers there; download it again, or mend it first"
    raise DoraError(
        f"{name}: merged, it holds NaN or infinite numbers: {why} (or pass --allow-nonfinite); nothing was written"
    )


def _ignore(_name: str, _before: Callable[[], Tensor], _merged: Tensor) -> None:
    """Let everything pass."""


def write_companions(
    folder: Path, checkpoint: Checkpoint, dtype: str | None, files: Sequence[NewFile]
) -> tuple[str, ...]:
    """Copy config, tokenizer and all else that is not weights, with dtype, names and sizes brought up to date.

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
        write_json(folder / "config.json", _replace_dtype({"torch_dtype": dtype, **config}, dtype))
    return tuple(map(str, left_out))


def _replace_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same settings with every dtype in them changed, those of models inside the model too."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and value
        else _replace_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
