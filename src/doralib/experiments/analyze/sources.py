"""What is analyzed: full fine-tunes, adapters of any format, steps of a run; each as its weights before and after."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ... import files
from ... import functional as F
from ...checkpoints.adapter import describe_base, read_base_rows, read_for_base
from ...checkpoints.match import is_conv1d_model
from ...checkpoints.quantized import QuantizedWeight, find_quantized
from ...checkpoints.safetensors import Checkpoint, Slot, read_rows
from ...errors import DoraError, UsageError, list_some
from ...formats.base import Hints
from ...formats.files import is_adapter
from ...runs import checkpointing
from ...runs.folder import RunFolder

# what a checkpoint of a full fine-tune keeps its weights in
_OF_FULL = "adapter.safetensors"

Block = tuple[Tensor, Tensor]
"""Some rows of a weight before and after, (rows, I) each, as output rows."""


@dataclass(frozen=True)
class Weight:
    """One matrix before and after."""

    name: str
    blocks: Callable[[], Iterator[Block]]
    """Reads it, some rows at a time."""

    def whole(self) -> Block:
        """All rows, in float32."""
        before, after = zip(*self.blocks(), strict=True)
        return torch.cat(before).float(), torch.cat(after).float()


@dataclass(frozen=True)
class Source:
    """One tuned model."""

    label: str
    """Of the path that the user named."""
    method: str
    step: int | None
    """Of a run's checkpoint; None for what is no run."""
    weights: Callable[[], Iterator[Weight]]


def find_sources(path: Path, base: Checkpoint, *, every_step: bool = False, given: Hints | None = None) -> list[Source]:
    """What a path holds: a run (each of its whole checkpoints, if asked for), an adapter, or a model.

    Raises:
        UsageError: if it is none of these, or steps are asked of what is no run.
        DoraError: if a file is damaged, or the tensors are not those of the base.
    """
    path = path.expanduser()
    folder, label = RunFolder(path), path.resolve().name
    if folder.config.is_file():
        return _find_in_run(folder, label, base, every_step=every_step)
    if every_step:
        raise UsageError(f"--steps all: {path} is no run, and has no steps; name a run's folder")
    if not path.exists():
        raise UsageError(f"there is no {path}: name runs, adapters, or folders of models")
    if is_adapter(path):
        return [_make_adapter_source(path, label, None, base, given or Hints())]
    return [_make_full_source(path, label, None, base)]


def _find_in_run(folder: RunFolder, label: str, base: Checkpoint, *, every_step: bool) -> list[Source]:
    method = files.read_yaml(folder.config)["adapter"]["method"]
    full = method == "full"
    steps = _find_checkpoints(folder.checkpoints) if every_step else []
    found = []
    for checkpoint in steps:
        step = checkpointing.step_of(checkpoint)
        if full:
            found.append(_make_full_source(checkpoint / _OF_FULL, label, step, base))
        else:
            found.append(_make_adapter_source(checkpoint, label, step, base, Hints()))
    if not folder.trained.exists():
        if not found:
            raise UsageError(f"{folder.path} has not come to its end; --steps all takes its checkpoints")
        return found
    last = folder.read(folder.summary, {}).get("steps")
    if last is not None and any(source.step == last for source in found):
        return found
    if full:
        return [*found, _make_full_source(folder.trained, label, last, base)]
    return [*found, _make_adapter_source(folder.path, label, last, base, Hints())]


def _find_checkpoints(folder: Path) -> list[Path]:
    """The whole ones, by their steps."""
    found = [path for path in folder.glob("checkpoint-*") if checkpointing.is_whole(path)]
    return sorted(found, key=checkpointing.step_of)


def _make_adapter_source(path: Path, label: str, step: int | None, base: Checkpoint, given: Hints) -> Source:
    _, parsed = read_for_base(path, given, describe_base(Hints(), base))

    def weights() -> Iterator[Weight]:
        for name, layer, W_OI in read_base_rows(parsed.state, base):
            V_OI = F.merge_weight(W_OI, *layer.factors, layer.m_O, layer.scale).flatten(0, -2)
            yield Weight(name, partial(_give, W_OI.flatten(0, -2), V_OI))

    return Source(label, parsed.config.method, step, weights)


def _make_full_source(path: Path, label: str, step: int | None, base: Checkpoint) -> Source:
    tuned = Checkpoint.open(path)
    before, after = _list_matrices(base), _list_matrices(tuned)
    names = [name for name in after if split_name(name)[0] is not None]
    numbered = [name for name in names if name in before and before[name].shape == after[name].shape]
    if not numbered:
        raise DoraError(
            f"{path} has no layer of the base in {base.folder}: no matrix has a name and shape that is there too; "
            f"its layers are {list_some(names, 3, ', ') or 'none'}"
        )
    # HF Conv1D keeps its output rows as columns
    transposed = is_conv1d_model(base.config())

    def weights() -> Iterator[Weight]:
        for name in numbered:
            read = partial(_read, before[name], after[name], transposed=transposed)
            yield Weight(name.removesuffix(".weight"), read)

    return Source(label, "full", step, weights)


def _give(W_OI: Tensor, V_OI: Tensor) -> Iterator[Block]:
    for rows in F.row_blocks(*W_OI.shape):
        yield W_OI[rows], V_OI[rows]


def _list_matrices(checkpoint: Checkpoint) -> dict[str, Slot | QuantizedWeight]:
    """Weights by name, a quantized one in the place of its own tensors."""
    stored: dict[str, Slot | QuantizedWeight] = {**checkpoint.slots, **find_quantized(checkpoint)}
    return {name: each for name, each in stored.items() if name.endswith(".weight") and len(each.shape) == 2}


def _read(before: Slot | QuantizedWeight, after: Slot | QuantizedWeight, *, transposed: bool) -> Iterator[Block]:
    """Rows of both, as few at a time as their memory allows; a quantized or transposed weight comes whole."""
    if transposed or not (isinstance(before, Slot) and isinstance(after, Slot)):
        W, V = (_read_all(stored) for stored in (before, after))
        yield (W.T, V.T) if transposed else (W, V)
        return
    for rows in F.row_blocks(*before.shape):
        yield read_rows(before, rows), read_rows(after, rows)


def _read_all(stored: Slot | QuantizedWeight) -> Tensor:
    if isinstance(stored, QuantizedWeight):
        return stored.dequantize()
    return read_rows(stored, slice(None))


def split_name(name: str) -> tuple[int | None, str]:
    """The layer's number and the module's name: ``model.layers.3.self_attn.q_proj`` is (3, "q_proj")."""
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdigit()), None), parts[-1]
