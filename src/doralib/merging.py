"""Fold an adapter into a checkpoint on disk: a stream of row blocks in, a stream out.

The output has the base's files, order of tensors, dtypes and metadata. No model is built, and what the adapter does not
touch is copied as bytes.
"""

import itertools
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import CODES, Checkpoint, Shard, Slot, cast_to, copy_bytes, laid_out, read_rows, write_at
from .errors import DoraError, UsageError, did_you_mean
from .files import human, names_in, read_json, read_tensors, replacing, write_json
from .fitting import Fit, fit, stores_transposed
from .formats import from_peft
from .functional import merge_weight, row_blocks, swapped_channels
from .packed import PackedLayer, packed_layers, plain_metadata, write_layer
from .requantised import Requantised, swallowed, table
from .state import AdapterState, LayerAdapter

Progress = Callable[[int, int], None]
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPY_BYTES = 32 << 20  # copied at once, between two reports of progress
_MOST_WORKERS = 8


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did."""

    out: Path
    layers: int
    """Weights that an adapter was folded into."""
    replaced: int
    """Tensors trained whole (modules_to_save, biases) that took the place of the base's."""
    tensors: int
    """All tensors of the checkpoint."""
    bytes: int
    """Bytes of weights written."""
    seconds: float
    peak_bytes: int
    """Most memory this process has held so far."""
    left_out: tuple[str, ...]
    """Files of the base that were not taken along: weights in other formats."""
    requantised: tuple[Requantised, ...] = ()
    """What quantising again cost, for each adapted layer of a base that stays quantised."""

    def text(self) -> str:
        """For a person."""
        lines = [
            f"{self.out}: {self.layers} layers folded in, {self.replaced} tensors replaced, of {self.tensors}; "
            f"{human(self.bytes)} in {self.seconds:.1f} s, at most {human(self.peak_bytes)} of memory"
        ]
        if self.left_out:
            lines.append(f"not taken along: {', '.join(self.left_out)}")
        if self.requantised:
            lines.append(table(self.requantised).replace("\n", "\n  "))
        if swallowed(self.requantised):
            lines.append("quantising again lost most of what the adapter does; merge with --dtype bfloat16")
        return "\n  ".join(lines)


@dataclass(frozen=True)
class _Piece:
    """One tensor of the output: where it comes from, where it goes, what is done to it."""

    slot: Slot
    out: Slot
    adapter: LayerAdapter | None = None
    transposed: bool = False
    value: Tensor | None = None

    @property
    def untouched(self) -> bool:
        return self.adapter is None and self.value is None and self.slot.code == self.out.code


@dataclass(frozen=True)
class _File:
    """One file of the output."""

    path: Path
    header: bytes
    pieces: Sequence[_Piece | None]
    """In the order of the base; None where a part of a quantised layer was."""
    packed: Mapping[str, Slot]
    """Parts of quantised layers to be written, by their names in the base."""

    @property
    def outs(self) -> list[Slot]:
        return [*(piece.out for piece in self.pieces if piece), *self.packed.values()]

    @property
    def nbytes(self) -> int:
        return sum(out.nbytes for out in self.outs)


@dataclass(frozen=True)
class _Plan:
    """What is to become of the base's tensors."""

    fitted: Fit
    code: str | None
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


def _silent(done: int, total: int) -> None:
    """Nobody asked."""


def merge_checkpoint(
    adapter: Path,
    base: str | Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> MergeSummary:
    """Write the base with the adapter folded in, as a folder that plain transformers loads.

    Holds the adapter and one row block a thread (a whole tensor of HF Conv1D, embeddings and transposed convolutions,
    whose rows are not stored as rows).

    Args:
        adapter: folder of adapter_config.json and adapter_model.safetensors, e.g. a run.
        base: folder of model.safetensors or shards with an index, or one .safetensors file. For a hub name or a .gguf
            file see `gguf.local_base`.
        out: made whole or not at all; an existing model there is refused unless ``overwrite``.
        dtype: float32, bfloat16 or float16 for every floating-point tensor; by default each keeps its own.
        progress: called with the bytes done and the bytes in all.

    Raises:
        UsageError: if a folder is missing, or ``out`` is in the way.
        DoraError: if the adapter does not fit the base (everything that is wrong, at once), or a file is damaged;
            nothing has been written then.
    """
    started = time.perf_counter()
    code = _code_of(dtype)
    checkpoint = Checkpoint.open(base)
    _check_out(out, checkpoint.folder, Path(adapter), overwrite)
    plan = _plan(read_adapter(adapter), checkpoint, code)
    need = sum(_file(shard, plan, Path(out)).nbytes for shard in checkpoint.shards)
    with replacing(out, need) as part:
        part.mkdir()
        files = [_file(shard, plan, part) for shard in checkpoint.shards]
        errors = _write_weights(files, plan, progress)
        left_out = _write_companions(part, checkpoint, dtype, files)
    return MergeSummary(
        out=Path(out),
        layers=len(plan.fitted.layers),
        replaced=len(plan.fitted.values),
        tensors=len(checkpoint.slots),
        bytes=need,
        seconds=time.perf_counter() - started,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        left_out=left_out,
        requantised=errors,
    )


def read_adapter(folder: str | Path) -> AdapterState:
    """The adapter in a folder of adapter_config.json and adapter_model.safetensors.

    Raises:
        UsageError: if there is none.
        DoraError: if a file is damaged, or the two do not fit each other.
    """
    folder = Path(folder)
    if (folder / "model" / "config.json").is_file() and not (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder} is a full fine-tune, which has no adapter; its whole model is {folder / 'model'}")
    settings = read_json(folder / "adapter_config.json")
    _, state = from_peft(read_tensors(folder / "adapter_model.safetensors"), settings)
    if not state.layers and not state.extra:
        raise UsageError(f"the adapter in {folder} is empty: there is nothing to merge")
    return state


def _code_of(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPE_NAMES:
        known = ", ".join(DTYPE_NAMES)
        raise UsageError(f"{dtype!r} is no dtype to merge into{did_you_mean(dtype, DTYPE_NAMES)}; known: {known}")
    return CODES[DTYPE_NAMES[dtype]]


def _check_out(out: Path, base: Path, adapter: Path, overwrite: bool) -> None:
    """Refuse every place where writing would take something away that is not a model to be overwritten."""
    final, sources = Path(out).resolve(), {"base": base.resolve(), "adapter": adapter.resolve()}
    for what, source in sources.items():
        if final == source or final in source.parents:
            raise UsageError(f"--out {out} would overwrite the {what} in {source}; choose another folder")
    if sources["base"] in final.parents:
        raise UsageError(f"--out {out} is inside the base {sources['base']}; choose a folder of its own")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{out} exists already; choose another folder, or pass --overwrite to replace it")
    if not final.is_dir() or not ((final / "config.json").is_file() or any(final.glob("*.safetensors"))):
        found = f"holds: {names_in(final)}" if final.is_dir() else "is a file"
        raise UsageError(f"{out} is not a model folder and is not overwritten (it {found}); remove it yourself")


def _plan(state: AdapterState, checkpoint: Checkpoint, code: str | None) -> _Plan:
    config, packed = checkpoint.config(), packed_layers(checkpoint)
    fitted = fit(state, {**checkpoint.slots, **packed}, config)
    if code and "quantization_config" in config and not packed:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise DoraError(
            f"{checkpoint.folder} is quantised ({method}): its dtype cannot be changed; leave dtype out, or merge into "
            "the model in full precision"
        )
    if packed and stores_transposed(config):
        raise DoraError(f"{checkpoint.folder} has quantised Conv1D layers; merge into the model in full precision")
    if whole := sorted(fitted.values.keys() & packed.keys()):
        raise DoraError(f"{', '.join(whole)}: trained whole, but quantised in the base; merge into the plain model")
    anew = packed.values() if code else [layer for name, layer in packed.items() if name in fitted.layers]
    return _Plan(fitted, code, {name: layer for layer in anew for name in layer.slots})


def _file(shard: Shard, plan: _Plan, folder: Path) -> _File:
    """What becomes of one file of the base."""
    path, fitted = folder / shard.path.name, plan.fitted
    wanted = {slot.name: new for slot in shard.slots if (new := plan.wanted(slot)) is not None}
    kept = [wanted[slot.name] for slot in shard.slots if slot.name in wanted]
    header, placed = laid_out(kept, path, plain_metadata(shard.metadata) if plan.code else shard.metadata)
    if kept == list(shard.slots):  # the same sizes at the same places: the very same header
        header, placed = shard.header(), [replace(slot, file=path) for slot in kept]
    outs = dict(zip(wanted, placed, strict=True))
    pieces = [
        _Piece(slot, outs[name], fitted.layers.get(name), name in fitted.transposed, fitted.values.get(name))
        if (name := slot.name) not in plan.packed
        else None
        for slot in shard.slots
    ]
    return _File(path, header, pieces, {name: out for name, out in outs.items() if name in plan.packed})


def _write_weights(files: Sequence[_File], plan: _Plan, progress: Progress) -> tuple[Requantised, ...]:
    """Every file's header, then all tensors, in blocks that do not depend on each other."""
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
        error = write_layer(layer, plan.fitted.layers.get(layer.name), outs, plan.code)
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
            blocks = [slice(None)] if piece.transposed else row_blocks(*piece.slot.matrix)
            yield from (partial(_write, piece, rows) for rows in blocks)


def _copy(piece: _Piece, offset: int, count: int) -> int:
    copy_bytes(piece.slot.file, piece.slot.start + offset, count, piece.out.file, piece.out.start + offset)
    return count


def _write(piece: _Piece, rows: slice) -> int:
    block = _new_rows(piece, rows)
    cast = cast_to(piece.slot.name, block, piece.out.code)
    first, _, _ = rows.indices(piece.slot.matrix[0])
    write_at(piece.out.file, piece.out.start + first * piece.out.row_bytes, cast)
    return cast.nbytes


def _new_rows(piece: _Piece, rows: slice) -> Tensor:
    """The rows of the output as computed, before the cast."""
    if piece.value is not None:
        return piece.value.view(piece.slot.matrix)[rows]
    block = read_rows(piece.slot, rows)
    if piece.adapter is None:
        return block
    (a_RI, b_OR), m_O, s = piece.adapter.factors, piece.adapter.m_O, piece.adapter.scale
    if piece.adapter.kind == "transposed_convolution":
        groups = piece.slot.shape[0] // piece.adapter.shape[1]
        by_channel = swapped_channels(block.view(piece.slot.shape), groups)
        merged = merge_weight(by_channel.flatten(1), a_RI, b_OR, m_O, s)
        return swapped_channels(merged.view(by_channel.shape), groups).flatten(1)
    if piece.transposed:
        return merge_weight(block.T, a_RI, b_OR, m_O, s).T
    return merge_weight(block, a_RI, b_OR[rows], None if m_O is None else m_O[rows], s)


def _write_companions(
    folder: Path, checkpoint: Checkpoint, dtype: str | None, files: Sequence[_File]
) -> tuple[str, ...]:
    """Config, tokenizer and all else that is not weights; dtype, names and sizes brought up to date."""
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
