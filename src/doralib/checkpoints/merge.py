"""Fold adapters into a checkpoint on disk: a stream of row blocks in, a stream out.

The output has the base's files, order of tensors, dtypes and metadata. No model is built, and what the adapter does not
touch is copied as bytes.
"""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DoraError, UsageError, collecting, did_you_mean, raise_all
from ..files import format_bytes, list_folder, replacing, write_json
from ..formats.base import Hints, ParsedAdapter
from ..formats.files import find_adapter_file
from ..quantization.error import QuantizationCost, format_costs, is_change_lost
from ..state import LayerAdapter
from .adapter import check_one_model, describe_base, find_other_base, read_for_base
from .match import MatchedAdapter, match_adapter
from .quantized import QuantizedWeight, find_quantized
from .safetensors import CODES, Checkpoint
from .stream import Plan, Progress, TensorChange, ignore_progress, plan_file, write_companions, write_weights

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD = "doralib_merge.json"


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a merge."""

    path: Path
    """A file or folder of any format."""
    weight: float = 1.0
    """Its change of the base is multiplied by this."""
    given: Hints = field(default_factory=Hints)
    """alpha and component, for files that do not say them; the base's names are added."""


@dataclass(frozen=True)
class MergedAdapter:
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
    adapters: tuple[MergedAdapter, ...]
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
    requantised: tuple[QuantizationCost, ...] = ()
    """What quantising again cost, for each adapted layer of a base that stays quantised."""

    def text(self) -> str:
        """For a person."""
        lines = [
            f"{self.out}: {self.layers} layers folded in, {self.replaced} tensors replaced, of {self.tensors}; "
            f"{format_bytes(self.bytes)} in {self.seconds:.1f} s, at most {format_bytes(self.peak_bytes)} of memory"
        ]
        if len(self.adapters) > 1:
            lines += [adapter.text() for adapter in self.adapters]
        if self.left_out:
            lines.append(f"not taken along: {', '.join(self.left_out)}")
        if self.requantised:
            lines.append(format_costs(self.requantised).replace("\n", "\n  "))
        if is_change_lost(self.requantised):
            lines.append("quantising again lost most of what the adapters do; merge with --dtype bfloat16")
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join(lines)


def merge_checkpoint(
    adapters: str | Path | Sequence[Ingredient],
    base: str | Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = ignore_progress,
) -> MergeSummary:
    """Write the base with adapters folded in, as a folder that plain transformers loads.

    Holds the adapters and one row block a thread (a whole tensor of HF Conv1D, embeddings and transposed convolutions,
    whose rows are not stored as rows). Several are summed as `functional.combined` says: each brings its own change of
    the base, whatever its rank, method, layers and file.

    Args:
        adapters: a file or folder of any format that ``doralib convert`` reads, e.g. a run; or several, with weights.
        base: folder of model.safetensors or shards with an index, or one .safetensors file. For a hub name or a .gguf
            file see `gguf.open_base_folder`.
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
    checkpoint = open_checkpoint(base, ingredients)
    _check_out(out, checkpoint.folder, [each.path for each in ingredients], overwrite)
    packed = _packed(checkpoint, dtype)
    folded, changes, notes = _changes(ingredients, checkpoint, packed)
    plan = _plan(changes, packed, code)
    need = sum(plan_file(shard, plan, Path(out)).nbytes for shard in checkpoint.shards)
    with replacing(out, need) as part:
        part.mkdir()
        files = [plan_file(shard, plan, part) for shard in checkpoint.shards]
        errors = write_weights(files, plan, progress)
        left_out = write_companions(part, checkpoint, dtype, files)
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
        requantised=errors,
    )


def open_checkpoint(base: str | Path, ingredients: Sequence[Ingredient]) -> Checkpoint:
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
            find_adapter_file(each.path)
    with collecting(problems):
        check_one_model(base)
        checkpoint = Checkpoint.open(base)
    raise_all(problems)
    return checkpoint


def _packed(checkpoint: Checkpoint, dtype: str | None) -> dict[str, QuantizedWeight]:
    """The base's quantised layers, once it is one that can be merged into."""
    config, packed = checkpoint.config(), find_quantized(checkpoint)
    if dtype and "quantization_config" in config and not packed:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise DoraError(
            f"{checkpoint.folder} is quantised ({method}): its dtype cannot be changed to {dtype}; leave dtype out, or "
            "merge into the model in full precision"
        )
    return packed


def _plan(
    changes: Mapping[str, Sequence[TensorChange]], packed: Mapping[str, QuantizedWeight], code: str | None
) -> Plan:
    parts = {name: changes[name] for name in changes.keys() & packed.keys()}
    if whole := sorted(name for name in parts if any(isinstance(part.what, Tensor) for part in parts[name])):
        raise DoraError(f"{', '.join(whole)}: trained whole, but quantised in the base; merge into the plain model")
    anew = [layer for name, layer in packed.items() if code or name in parts]
    return Plan(changes, code, {name: layer for layer in anew for name in layer.slots})


def _changes(
    ingredients: Sequence[Ingredient], checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight]
) -> tuple[list[MergedAdapter], dict[str, list[TensorChange]], list[str]]:
    """What was read of each adapter, every change by the tensor's name, and what there is to note."""
    changes: dict[str, list[TensorChange]] = defaultdict(list)
    folded: list[MergedAdapter] = []
    notes: list[str] = []
    problems: list[DoraError] = []
    known = describe_base(Hints(), checkpoint, packed)
    for each in ingredients:
        with collecting(problems), _named(each.path, alone=len(ingredients) == 1):
            form, found = read_for_base(each.path, each.given, known)
            other = find_other_base(found.state.base_model, checkpoint.folder)
            fitted = _fitted(found, checkpoint, packed, other)
            for name, adapter in fitted.layers.items():
                changes[name].append(TensorChange(each.weight, adapter, name in fitted.transposed))
            for name, value in fitted.values.items():
                changes[name].append(TensorChange(each.weight, value))
            folded.append(MergedAdapter(str(each.path), form, each.weight, len(fitted.layers), len(fitted.values)))
            notes += [f"{each.path}: {note}" for note in (*found.notes, *other)]
    raise_all(problems)
    return folded, changes, notes


def _fitted(
    found: ParsedAdapter, checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight], other: Sequence[str]
) -> MatchedAdapter:
    try:
        return match_adapter(found.state, {**checkpoint.slots, **packed}, checkpoint.config())
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
        found = f"holds: {list_folder(final)}" if final.is_dir() else "is a file"
        raise UsageError(f"{out} is not a model folder and is not overwritten (it {found}); remove it yourself")
