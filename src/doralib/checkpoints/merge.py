"""Merge adapters into a checkpoint on disk: a stream of row blocks in, a stream out.

The output has the base's files, order of tensors, dtypes and metadata. No model is built, and what the adapter does not
touch is copied as bytes.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..disk import check_replaceable, format_bytes, is_scratch, replacing
from ..errors import DoraError, UsageError, collecting, did_you_mean, list_some, raise_all
from ..files import list_folder, read_json, write_json
from ..formats.base import Hints, ParsedAdapter
from ..formats.files import find_adapter_file
from ..process import read_peak_memory
from ..quantization.error import QuantizationCost, format_costs, is_change_lost
from ..recipe import PROMPT_FILE, SERIES_FILE
from ..state import LayerAdapter, RowValues
from .adapter import check_one_model, describe_base, find_other_base, match_checkpoint, read_for_base
from .heads import change_config, find_head
from .kind import PROCESSOR_FILES
from .match import MatchedAdapter
from .quantized import find_quantized
from .safetensors import CODES, Checkpoint, copy_bytes, read_whole, write_at
from .stream import (
    NewFile,
    Plan,
    Progress,
    Sink,
    TensorChange,
    ignore_progress,
    plan_file,
    stream_weights,
    write_companions,
    write_headers,
)
from .tokenizer import read_template, take_tokenizer
from .window import POSITIONS, read_positions

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD = "doralib_merge.json"
_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a merge."""

    path: Path
    """A file or folder of any format that ``doralib convert`` reads."""
    weight: float = 1.0
    """Its change of the base is multiplied by this; up to a million, 1 is the adapter as it was trained."""
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
    """Weights that an adapter was merged into."""
    replaced: int
    """Tensors trained whole (modules_to_save, biases) that took the place of the base's."""
    tensors: int
    """All tensors of the checkpoint."""
    bytes: int
    """Bytes of weights written."""
    seconds: float
    peak_bytes: int | None
    """Most memory this process has held so far; None where the system does not tell."""
    left_out: tuple[str, ...]
    """Files of the base that were not taken along: weights in other formats."""
    notes: tuple[str, ...] = ()
    """What had to be assumed of the adapters, and what looks wrong."""
    requantised: tuple[QuantizationCost, ...] = ()
    """What quantizing again cost, for each adapted layer of a base that stays quantized."""

    def text(self) -> str:
        """For a person."""
        peak = "" if self.peak_bytes is None else f", at most {format_bytes(self.peak_bytes)} of memory"
        lines = [
            f"{self.out}: {self.layers} layers merged, {self.replaced} tensors replaced, of {self.tensors}; "
            f"{format_bytes(self.bytes)} in {self.seconds:.1f} s{peak}"
        ]
        if len(self.adapters) > 1:
            lines += [adapter.text() for adapter in self.adapters]
        if self.left_out:
            lines.append(f"not taken along: {', '.join(self.left_out)}")
        if self.requantised:
            lines.append(format_costs(self.requantised).replace("\n", "\n  "))
        if is_change_lost(self.requantised):
            lines.append("quantizing again lost most of what the adapters do; merge with --dtype bfloat16")
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join(lines)


def merge_checkpoint(
    adapters: str | Path | Sequence[Ingredient],
    base: str | Path,
    out: Path,
    *,
    dtype: str | None = None,
    untie: bool = False,
    overwrite: bool = False,
    progress: Progress = ignore_progress,
) -> MergeSummary:
    """Write the base with adapters merged in, as a folder that plain transformers loads.

    Sums are in float32 (in float64 for float64 weights) and rounded once, to the dtype that is stored. Quantized layers
    are quantized again in their own settings, or made dense where ``dtype`` is given. Memory holds the adapters and one
    row block a thread (whole tensors of HF Conv1D, embeddings and transposed convolutions, whose rows are not stored as
    rows, and one quantized layer at a time). Several adapters are summed as `functional.combined` says: each brings its
    own change of the base, whatever its rank, method, layers and file.

    Args:
        adapters: a file or folder of any format that ``doralib convert`` reads, e.g. a run; or several, with weights.
        base: a folder with model.safetensors or with shards and an index, or one .safetensors file. For a hub name or a
            .gguf file see `doralib.checkpoints.gguf.open_base_folder`.
        out: made whole or not at all; an existing model there is refused unless ``overwrite``.
        dtype: float32, bfloat16 or float16 for every floating-point tensor, quantized ones included; by default each
            keeps its own.
        untie: write a tensor of its own for an output head that is tied to the embedding, and say so in config.json.
        progress: called with the bytes done and the bytes in all.

    Raises:
        UsageError: if a folder is missing, or ``out`` is in the way.
        DoraError: if an adapter does not fit the base (everything that is wrong with every one of them, at once), or a
            file is damaged; nothing has been written then.
    """
    started = time.perf_counter()
    ingredients = [Ingredient(Path(adapters))] if isinstance(adapters, str | Path) else list(adapters)
    code = _find_code(dtype)
    checkpoint = open_checkpoint(base, ingredients)
    check_out(out, checkpoint.folder, [each.path for each in ingredients], overwrite)
    _check_dtype_change(checkpoint, dtype)
    merged, changes, notes, starts = _collect_changes(ingredients, checkpoint, untie=untie)
    plan = _add_new(_make_plan(changes, checkpoint, code), starts, checkpoint)
    plan = replace(plan, allow_nonfinite=any(each.given.allow_nonfinite for each in ingredients))
    need = sum(plan_file(shard, plan, Path(out)).nbytes for shard in checkpoint.shards)
    with replacing(out, need) as part:
        part.mkdir()
        files = [plan_file(shard, plan, part) for shard in checkpoint.shards]
        write_headers(files)
        errors = stream_weights(files, plan, progress, Sink(write_at, copy_bytes))
        left_out = write_companions(part, checkpoint, dtype, files)
        _update_vocabulary(part, checkpoint, starts)
        if starts.head and checkpoint.config():
            head = find_head(ingredients[0].path)
            assert head is not None
            write_json(part / "config.json", change_config(read_json(part / "config.json"), head))
        if starts.window and checkpoint.config():
            (positions,) = starts.window.values()
            config = {**read_json(part / "config.json"), "max_source_positions": len(positions)}
            write_json(part / "config.json", config)
        notes += take_tokenizer([each.path for each in ingredients], part)
        for name in (PROMPT_FILE, SERIES_FILE):
            _take_form([each.path for each in ingredients], part, name)
        _take_settings([each.path for each in ingredients], part)
        if not starts.head:
            notes += _write_end_tokens(part)
        write_json(
            part / RECORD,
            {
                "base": str(base),
                "dtype": dtype,
                "adapters": [asdict(each) for each in merged],
                "files": sorted(list_written_files(part)),
            },
        )
    adapted = {name for name, parts in changes.items() if any(isinstance(part.what, LayerAdapter) for part in parts)}
    return MergeSummary(
        out=Path(out),
        adapters=tuple(merged),
        layers=len(adapted),
        replaced=len(changes.keys() - adapted),
        tensors=len(checkpoint.slots),
        bytes=need,
        seconds=time.perf_counter() - started,
        peak_bytes=read_peak_memory(),
        left_out=left_out,
        notes=tuple(notes),
        requantised=errors,
    )


def plan_again(
    merged: Path, ingredients: Sequence[Ingredient], base: str | Path, dtype: str | None, *, untie: bool = False
) -> tuple[list[NewFile], Plan]:
    """Plan a merge that was done, from its base and adapters: the files as they have to stand in ``merged``.

    Raises:
        DoraError: as `merge_checkpoint` does.
    """
    checkpoint = open_checkpoint(base, ingredients)
    _, changes, _, starts = _collect_changes(ingredients, checkpoint, untie=untie)
    plan = _add_new(_make_plan(changes, checkpoint, _find_code(dtype)), starts, checkpoint)
    # the merge has looked at every number already
    plan = replace(plan, allow_nonfinite=True)
    return [plan_file(shard, plan, merged) for shard in checkpoint.shards], plan


def open_checkpoint(base: str | Path, ingredients: Sequence[Ingredient]) -> Checkpoint:
    """Read the base's headers, and see that every adapter is there.

    Raises:
        DoraError: with everything that is missing or damaged, as `raise_all` does.
    """
    problems: list[DoraError] = []
    if not ingredients:
        raise UsageError("no adapter is given to merge")
    for each in ingredients:
        if not abs(each.weight) <= _LARGEST_WEIGHT:
            told = f"{each.path}: {each.weight} is no weight, which is a number up to {_LARGEST_WEIGHT:,.0f}"
            problems.append(UsageError(told))
        with collecting(problems):
            find_adapter_file(each.path)
    with collecting(problems):
        check_one_model(base)
        checkpoint = Checkpoint.open(base)
    raise_all(problems)
    return checkpoint


def _take_form(adapters: Sequence[Path], folder: Path, name: str) -> None:
    """Keep the form in which all the adapters were asked; the base's own is of another training."""
    forms = {(each / name).read_bytes() if (each / name).is_file() else None for each in adapters}
    if len(forms) == 1 and (form := forms.pop()) is not None:
        (folder / name).write_bytes(form)
    else:
        (folder / name).unlink(missing_ok=True)


def _take_settings(adapters: Sequence[Path], folder: Path) -> None:
    """Keep what a lone adapter of an encoder-decoder has beside it: with what a target begins, and what is heard."""
    if len(adapters) > 1:
        return
    if any((adapters[0] / name).is_file() for name in PROCESSOR_FILES):
        for name in PROCESSOR_FILES:
            (folder / name).unlink(missing_ok=True)
    for name in ("generation_config.json", *PROCESSOR_FILES):
        if (adapters[0] / name).is_file():
            (folder / name).write_bytes((adapters[0] / name).read_bytes())


def _write_end_tokens(folder: Path) -> list[str]:
    """Add the end of an assistant's turn to the generation settings, where there is a chat template."""
    if not (folder / "config.json").is_file() or read_template(folder) is None:
        return []
    try:
        # only transformers renders a template as the model will see it; merging itself goes without
        from .ends import write_end_tokens  # noqa: PLC0415
    except ImportError:
        return ["the tokens that end an answer are not known: transformers, which reads chat templates, is not there"]
    return write_end_tokens(folder)


def _check_dtype_change(checkpoint: Checkpoint, dtype: str | None) -> None:
    config = checkpoint.config()
    if dtype and "quantization_config" in config and not find_quantized(checkpoint):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise DoraError(
            f"{checkpoint.folder} is quantized ({method}): its dtype cannot be changed to {dtype}; leave dtype out, or "
            "merge into the model in full precision"
        )


def _make_plan(changes: Mapping[str, Sequence[TensorChange]], checkpoint: Checkpoint, code: str | None) -> Plan:
    quantized = find_quantized(checkpoint)
    parts = {name: changes[name] for name in changes.keys() & quantized.keys()}
    if whole := sorted(name for name in parts if any(isinstance(part.what, Tensor) for part in parts[name])):
        raise DoraError(f"{', '.join(whole)}: trained whole, but quantized in the base; merge into the plain model")
    anew = [layer for name, layer in quantized.items() if code or name in parts]
    return Plan(changes, code, {name: layer for layer in anew for name in layer.slots})


@dataclass
class _Starts:
    """What the adapters begin with where the base has another vocabulary, or no head of its own."""

    resized: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    """A classifier's tensors."""
    dropped: tuple[str, ...] = ()
    """The head of a language model, in whose place the classifier comes."""
    untied: bool = False
    """Whether the output head no longer is the embedding."""
    window: dict[str, Tensor] = field(default_factory=dict)
    """The positions of a model that hears fewer seconds than the base."""


def _collect_changes(
    ingredients: Sequence[Ingredient], checkpoint: Checkpoint, *, untie: bool
) -> tuple[list[MergedAdapter], dict[str, list[TensorChange]], list[str], _Starts]:
    """Read every adapter; what it is, its changes by the tensor's name, what there is to note, and other starts."""
    changes: dict[str, list[TensorChange]] = defaultdict(list)
    merged: list[MergedAdapter] = []
    notes: list[str] = []
    problems: list[DoraError] = []
    starts = _Starts()
    base = describe_base(Hints(), checkpoint)
    for each in ingredients:
        with collecting(problems), _name_adapter(each.path, alone=len(ingredients) == 1):
            form, adapter = read_for_base(each.path, each.given, base)
            other = find_other_base(adapter.state.base_model, checkpoint.folder)
            matched = _match(adapter, checkpoint, other, untie=untie)
            _add_starts(starts, matched, checkpoint)
            _add_window(starts, each.path, checkpoint)
            if (starts.resized or starts.head or starts.window) and (each.weight != 1 or len(ingredients) > 1):
                others = ", ".join(sorted(starts.resized | starts.head | starts.window))
                raise DoraError(
                    f"has another vocabulary, head or window than the base ({others}), which nothing can be added to "
                    "by a weight; merge it alone first, and the others into what comes out"
                )
            for name, layer in matched.layers.items():
                changes[name].append(TensorChange(each.weight, layer, name in matched.transposed))
            given: dict[str, Tensor | RowValues] = {**matched.values, **matched.rows, **matched.head}
            for name, value in given.items():
                changes[name].append(TensorChange(each.weight, value))
            whole = len(given)
            merged.append(MergedAdapter(str(each.path), form, each.weight, len(matched.layers), whole))
            notes += [f"{each.path}: {note}" for note in (*adapter.notes, *other)]
    raise_all(problems)
    return merged, changes, notes, starts


def _add_starts(starts: _Starts, matched: MatchedAdapter, checkpoint: Checkpoint) -> None:
    """Add one adapter's; rows beyond the base's last one make room for themselves."""
    starts.resized |= matched.resized
    starts.copies |= matched.copies
    starts.head |= matched.head
    starts.untied |= matched.untied
    if matched.head:
        starts.dropped = tuple(name for name in checkpoint.slots if name.endswith(("lm_head.weight", "lm_head.bias")))
    for name, rows in matched.rows.items():
        old = starts.resized.get(name)
        slot = checkpoint.slots[matched.copies.get(name, name)]
        more = int(rows.index_N.max()) + 1 - (slot.shape[0] if old is None else len(old)) if len(rows.index_N) else 0
        if more > 0:
            old = read_whole(slot) if old is None else old
            starts.resized[name] = torch.cat([old, old.new_zeros(more, old.shape[1])])


def _add_window(starts: _Starts, adapter: Path, checkpoint: Checkpoint) -> None:
    """Add the base's first positions, where the adapter was trained to hear fewer seconds."""
    count = read_positions(adapter)
    name = next((name for name in checkpoint.slots if name.endswith(POSITIONS)), None)
    if count is not None and name is not None and count < checkpoint.slots[name].shape[0]:
        starts.window[name] = read_whole(checkpoint.slots[name])[:count].clone()


def _add_new(plan: Plan, starts: _Starts, checkpoint: Checkpoint) -> Plan:
    """The plan with new tensors in it: in the last file, and of the dtype that the last plain matrix there has."""
    stay = [slot for slot in checkpoint.shards[-1].slots if slot.name not in starts.dropped and slot.plain]
    like = max(stay, key=lambda slot: len(slot.shape) > 1).name if starts.head else ""
    return replace(
        plan,
        resized={**starts.resized, **starts.head, **starts.window},
        copies={**starts.copies, **dict.fromkeys((name for name in starts.head if name not in checkpoint.slots), like)},
        dropped=frozenset(starts.dropped),
    )


def _update_vocabulary(folder: Path, checkpoint: Checkpoint, starts: _Starts) -> None:
    """Say in config.json how many tokens there are now, and whether the head is still the embedding."""
    if not checkpoint.config() or not (starts.resized or starts.untied):
        return
    sizes = {len(value) for value in starts.resized.values()}
    old = {checkpoint.slots[starts.copies.get(name, name)].shape[0] for name in starts.resized}
    changed = dict(read_json(folder / "config.json"))
    if starts.untied:
        changed["tie_word_embeddings"] = False
        _replace(changed, "tie_word_embeddings", {True}, False)
    if len(sizes) == 1 and not _replace(changed, "vocab_size", old, size := sizes.pop()):
        changed["vocab_size"] = size
    write_json(folder / "config.json", changed)


def _replace(config: dict[str, Any], key: str, old: Collection[Any], new: Any) -> bool:
    """Whether a setting had one of the old values, here or in a model inside the model, and has the new one now."""
    found = config.get(key) in old
    if found:
        config[key] = new
    inside = [_replace(value, key, old, new) for value in config.values() if isinstance(value, dict)]
    return found or any(inside)


def _match(adapter: ParsedAdapter, checkpoint: Checkpoint, other: Sequence[str], *, untie: bool) -> MatchedAdapter:
    try:
        return match_checkpoint(adapter.state, checkpoint, untie=untie)
    except DoraError as error:
        if not other:
            raise
        raise DoraError(f"{error}\n  it was trained on another model, {adapter.state.base_model}") from None


@contextmanager
def _name_adapter(path: Path, *, alone: bool) -> Iterator[None]:
    """Of several adapters, say which one a problem is with."""
    try:
        yield
    except DoraError as problem:
        if alone:
            raise
        raise type(problem)(f"{path}: {problem}") from None


def _find_code(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPE_NAMES:
        known = ", ".join(DTYPE_NAMES)
        raise UsageError(f"{dtype!r} is no dtype to merge into{did_you_mean(dtype, DTYPE_NAMES)}; known: {known}")
    return CODES[DTYPE_NAMES[dtype]]


def check_out(out: Path, base: Path, adapters: Sequence[Path], overwrite: bool) -> None:
    """Refuse every place where writing would destroy something that is not a model to be overwritten."""
    final, base = Path(out).resolve(), base.resolve()
    for what, source in [("base", base), *(("adapter", adapter.resolve()) for adapter in adapters)]:
        if final == source or final in source.parents:
            raise UsageError(f"--out {out} would overwrite the {what} in {source}; choose another folder")
    if base in final.parents:
        raise UsageError(f"--out {out} is inside the base {base}; choose a folder of its own")
    check_replaceable(out, "--out")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{out} exists already; choose another folder, or pass --overwrite to replace it")
    if not final.is_dir() or not (final / RECORD).is_file():
        found = f"holds: {list_folder(final)}" if final.is_dir() else "is a file"
        raise UsageError(
            f"{out} is not a model that doralib merge wrote, and is not overwritten (it {found}); remove it yourself"
        )
    record = read_json(final / RECORD)
    own = record.get("files") if isinstance(record, dict) else None
    if others := sorted(list_written_files(final) - {RECORD} - set(own if isinstance(own, list) else [])):
        raise UsageError(
            f"--overwrite replaces a merged model, and {out} holds what its {RECORD} does not list: "
            f"{list_some(others, 5, ', ')}; move it away, or choose another folder"
        )


def list_written_files(folder: Path) -> set[str]:
    """Every file of a folder, but for what a killed process left, by its name inside it."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {name.as_posix() for name in names if not any(is_scratch(folder / part) for part in name.parts)}
