"""Fold adapters into a checkpoint on disk: a stream of row blocks in, a stream out.

The output has the base's files, order of tensors, dtypes and metadata. No model is built, and what the adapter does not
touch is copied as bytes.
"""

import itertools
import math
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .adapters import another_base, knowing, read_adapter, whole_pipeline
from .checkpoints import CODES, DTYPES, Checkpoint, Shard, Slot, copy_bytes, laid_out, read_rows, write_at
from .errors import DoraError, UsageError, collecting, did_you_mean, raise_all
from .files import human, names_in, read_json, replacing, write_json
from .fitting import Fit, fit
from .folding import Change, changed
from .formats import Found, Given
from .formats.storage import adapter_file
from .functional import row_blocks
from .state import LayerAdapter

Progress = Callable[[int, int], None]
Changes = Mapping[str, Sequence[Change]]
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD = "doralib_merge.json"
_COPY_BYTES = 32 << 20  # copied at once, between two reports of progress
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a merge."""

    path: Path
    """A file or folder of any format."""
    weight: float = 1.0
    """Its change of the base is multiplied by this."""
    given: Given = field(default_factory=Given)
    """alpha and component, for files that do not say them; the base's names are added."""


@dataclass(frozen=True)
class Folded:
    """One adapter as it was merged."""

    path: str
    format: str
    weight: float
    layers: int
    whole: int
    """Tensors trained whole: modules_to_save, biases."""

    def text(self) -> str:
        """For a person."""
        whole = f" and {self.whole} whole tensors" if self.whole else ""
        return f"{self.path} ({self.format}): {self.layers} layers{whole}, weight {self.weight:g}"


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did."""

    out: Path
    adapters: tuple[Folded, ...]
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
    notes: tuple[str, ...] = ()
    """What had to be assumed of the adapters, and what looks wrong."""

    def text(self) -> str:
        """For a person."""
        lines = [
            f"{self.out}: {self.layers} layers folded in, {self.replaced} tensors replaced, of {self.tensors}; "
            f"{human(self.bytes)} in {self.seconds:.1f} s, at most {human(self.peak_bytes)} of memory"
        ]
        if len(self.adapters) > 1:
            lines += [adapter.text() for adapter in self.adapters]
        if self.left_out:
            lines.append(f"not taken along: {', '.join(self.left_out)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join(lines)


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
class _File:
    """One file of the output."""

    path: Path
    header: bytes
    pieces: Sequence[_Piece]

    @property
    def nbytes(self) -> int:
        return sum(piece.out.nbytes for piece in self.pieces)


def _silent(done: int, total: int) -> None:
    """Nobody asked."""


def merge_checkpoint(
    adapters: str | Path | Sequence[Ingredient],
    base: str | Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> MergeSummary:
    """Write the base with adapters folded in, as a folder that plain transformers loads.

    Holds the adapters and one row block a thread (a whole tensor of HF Conv1D, embeddings and transposed convolutions,
    whose rows are not stored as rows). Several are summed as `functional.combined` says: each brings its own change of
    the base, whatever its rank, method, layers and file.

    Args:
        adapters: a file or folder of any format that ``doralib convert`` reads, e.g. a run; or several, with weights.
        base: folder of model.safetensors or shards with an index, or one .safetensors file. For a hub name or a .gguf
            file see `gguf.local_base`.
        out: made whole or not at all; an existing model there is refused unless ``overwrite``.
        dtype: float32, bfloat16 or float16 for every floating-point tensor; by default each keeps its own.
        progress: called with the bytes done and the bytes in all.

    Raises:
        UsageError: if a folder is missing, or ``out`` is in the way.
        DoraError: if an adapter does not fit the base (everything that is wrong with every one of them, at once), or a
            file is damaged; nothing has been written then.
    """
    started = time.perf_counter()
    ingredients = [Ingredient(Path(adapters))] if isinstance(adapters, str | Path) else list(adapters)
    code = _code_of(dtype)
    checkpoint = opened(base, ingredients)
    _check_out(out, checkpoint.folder, [each.path for each in ingredients], overwrite)
    if code and "quantization_config" in checkpoint.config():
        raise DoraError(f"{base} is quantised: its dtype cannot be changed to {dtype}; leave dtype out")
    folded, changes, notes = _changes(ingredients, checkpoint)
    need = sum(_file(shard, changes, code, Path(out)).nbytes for shard in checkpoint.shards)
    with replacing(out, need) as part:
        part.mkdir()
        _write_weights([_file(shard, changes, code, part) for shard in checkpoint.shards], progress)
        left_out = _write_companions(part, checkpoint, dtype, need)
        write_json(part / RECORD, {"base": str(base), "dtype": dtype, "adapters": [asdict(each) for each in folded]})
    adapted = {name for name, parts in changes.items() if any(isinstance(part.what, LayerAdapter) for part in parts)}
    return MergeSummary(
        out=Path(out),
        adapters=tuple(folded),
        layers=len(adapted),
        replaced=len(changes.keys() - adapted),
        tensors=len(checkpoint.slots),
        bytes=need,
        seconds=time.perf_counter() - started,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        left_out=left_out,
        notes=tuple(notes),
    )


def opened(base: str | Path, ingredients: Sequence[Ingredient]) -> Checkpoint:
    """The base's headers; if they cannot be read, or an adapter is not there, all of that at once.

    Raises:
        DoraError: as `raise_all` does.
    """
    problems: list[DoraError] = []
    if not ingredients:
        raise UsageError("no adapter is given to merge")
    for each in ingredients:
        if not math.isfinite(each.weight):
            problems.append(UsageError(f"{each.path}: {each.weight} is no weight"))
        with collecting(problems):
            adapter_file(each.path)
    with collecting(problems):
        whole_pipeline(base)
        checkpoint = Checkpoint.open(base)
    raise_all(problems)
    return checkpoint


def _changes(
    ingredients: Sequence[Ingredient], checkpoint: Checkpoint
) -> tuple[list[Folded], dict[str, list[Change]], list[str]]:
    """What was read of each adapter, every change by the tensor's name, and what there is to note."""
    changes: dict[str, list[Change]] = defaultdict(list)
    folded: list[Folded] = []
    notes: list[str] = []
    problems: list[DoraError] = []
    config = checkpoint.config()
    for each in ingredients:
        with collecting(problems), _named(each.path, alone=len(ingredients) == 1):
            form, found = read_adapter(each.path, knowing(each.given, checkpoint))
            other = another_base(found.state.base_model, checkpoint.folder)
            fitted = _fitted(found, checkpoint, config, other)
            for name, adapter in fitted.layers.items():
                changes[name].append(Change(each.weight, adapter, name in fitted.transposed))
            for name, value in fitted.values.items():
                changes[name].append(Change(each.weight, value))
            folded.append(Folded(str(each.path), form, each.weight, len(fitted.layers), len(fitted.values)))
            notes += [f"{each.path}: {note}" for note in (*found.notes, *other)]
    raise_all(problems)
    return folded, changes, notes


def _fitted(found: Found, checkpoint: Checkpoint, config: Mapping[str, Any], other: Sequence[str]) -> Fit:
    try:
        return fit(found.state, checkpoint.slots, config)
    except DoraError as error:
        if not other:
            raise
        raise DoraError(f"{error}\n  it was trained on another model, {found.state.base_model}") from None


@contextmanager
def _named(path: Path, *, alone: bool) -> Iterator[None]:
    """Of several adapters, say which one a problem is with."""
    try:
        yield
    except DoraError as problem:
        if alone:
            raise
        raise type(problem)(f"{path}: {problem}") from None


def _code_of(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPE_NAMES:
        known = ", ".join(DTYPE_NAMES)
        raise UsageError(f"{dtype!r} is no dtype to merge into{did_you_mean(dtype, DTYPE_NAMES)}; known: {known}")
    return CODES[DTYPE_NAMES[dtype]]


def _check_out(out: Path, base: Path, adapters: Sequence[Path], overwrite: bool) -> None:
    """Refuse every place where writing would take something away that is not a model to be overwritten."""
    final, base = Path(out).resolve(), base.resolve()
    for what, source in [("base", base), *(("adapter", adapter.resolve()) for adapter in adapters)]:
        if final == source or final in source.parents:
            raise UsageError(f"--out {out} would overwrite the {what} in {source}; choose another folder")
    if base in final.parents:
        raise UsageError(f"--out {out} is inside the base {base}; choose a folder of its own")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{out} exists already; choose another folder, or pass --overwrite to replace it")
    if not final.is_dir() or not ((final / "config.json").is_file() or any(final.glob("*.safetensors"))):
        found = f"holds: {names_in(final)}" if final.is_dir() else "is a file"
        raise UsageError(f"{out} is not a model folder and is not overwritten (it {found}); remove it yourself")


def _file(shard: Shard, changes: Changes, code: str | None, folder: Path) -> _File:
    """What becomes of one file of the base."""
    path = folder / shard.path.name
    wanted = [slot.cast(code) if code and slot.plain else slot for slot in shard.slots]
    header, outs = laid_out(wanted, path, shard.metadata)
    if wanted == list(shard.slots):  # the same sizes at the same places: the very same header
        header, outs = shard.header(), [replace(slot, file=path) for slot in wanted]
    pieces = [_Piece(slot, out, tuple(changes.get(slot.name, ()))) for slot, out in zip(shard.slots, outs, strict=True)]
    return _File(path, header, pieces)


def _write_weights(files: Sequence[_File], progress: Progress) -> None:
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


def _jobs(pieces: Sequence[_Piece]) -> Iterator[Callable[[], int]]:
    """Calls that write one block each and return its bytes; neighbours that stay as they are go together."""
    for untouched, group in itertools.groupby(pieces, key=lambda piece: piece.untouched):
        run = list(group)
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
    cast = block.to(DTYPES[piece.out.code]).contiguous()
    if piece.out.code == "F16" and bool((cast.isinf() & block.isfinite()).any()):
        largest = block.abs().max().item()
        raise DoraError(f"{piece.slot.name} holds {largest:.3g}, too large for float16; merge with --dtype bfloat16")
    first, _, _ = rows.indices(piece.slot.matrix[0])
    write_at(piece.out.file, piece.out.start + first * piece.out.row_bytes, cast)
    return cast.nbytes


def _write_companions(folder: Path, checkpoint: Checkpoint, dtype: str | None, total: int) -> tuple[str, ...]:
    """Config, tokenizer and all else that is not weights; dtype and sizes brought up to date where they changed."""
    keep, left_out = checkpoint.companions()
    for name in keep:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
    if checkpoint.index:
        shutil.copyfile(checkpoint.index, folder / checkpoint.index.name)
    if dtype and checkpoint.index:
        content = read_json(checkpoint.index)
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": total}
        write_json(folder / checkpoint.index.name, content)
    if dtype and (folder / "config.json").is_file():
        write_json(folder / "config.json", _with_dtype({"torch_dtype": dtype, **checkpoint.config()}, dtype))
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
