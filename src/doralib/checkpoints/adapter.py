"""An adapter and the stored model it belongs to."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DoraError, UsageError
from ..formats.base import Hints, ParsedAdapter
from ..formats.files import check_component, read_any_format, take_component
from ..formats.pipeline import COMPONENTS
from ..functional import dense_row_norm
from ..state import AdapterState, LayerAdapter
from .match import match_adapter, view_as_rows
from .quantized import QuantizedWeight, find_quantized
from .safetensors import Checkpoint, read_whole

# where a single-file Stable Diffusion checkpoint keeps the parts of its pipeline
_SINGLE_FILE = {
    "model.diffusion_model.": "unet.",
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
}


def read_for_base(path: Path, asked: Hints, known: Hints) -> tuple[str, ParsedAdapter]:
    """The adapter of one model, by its names inside it, and the name of its format.

    Args:
        asked: the caller's alpha and component.
        known: what the base tells, as `describe_base` says it.

    Raises:
        UsageError: if there is no adapter, it is empty, it has no parts and one is asked for, or what it leaves open
            has to be given.
        DoraError: if it is damaged, of no known format, or holds anything that would have to be dropped.
    """
    given = replace(known, alpha=asked.alpha, component=asked.component or known.component)
    form, found = read_any_format(path, given)
    if not found.state.layers and not found.state.extra:
        raise UsageError(f"the adapter in {path} is empty")
    if asked.component:
        check_component(found, asked.component)
    return form.name, take_component(found, given.component)


def describe_base(given: Hints, base: Path | Checkpoint, packed: Mapping[str, QuantizedWeight] | None = None) -> Hints:
    """With names and shapes of a base's modules, and its config; a pipeline's parts under their own names.

    Only headers are read; ``lengths`` reads weights when a format asks. With a folder that is one part of a pipeline,
    that part is the component.

    Args:
        packed: the quantised layers of a checkpoint, where they have been looked for already.

    Raises:
        UsageError: if there are no weights.
        DoraError: if they are damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    folder = base if isinstance(base, Path) else base.folder
    if folder.name in COMPONENTS and _is_pipeline(folder.parent):
        # other parts' layers are told from unknown ones by the whole pipeline's names
        return describe_base(replace(given, component=given.component or folder.name), folder.parent)
    if isinstance(base, Path) and _is_pipeline(base):
        for part in COMPONENTS:
            if (base / part).is_dir():
                shapes |= {f"{part}.{name}": shape for name, shape in _modules(Checkpoint.open(base / part)).items()}
        return replace(given, shapes=shapes)
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    for name, shape in _modules(checkpoint, packed).items():
        head = next((head for head in _SINGLE_FILE if name.startswith(head)), "")
        shapes[_SINGLE_FILE.get(head, "") + name.removeprefix(head)] = shape
    lengths = partial(compute_adapted_lengths, checkpoint, packed=packed)
    return replace(given, shapes=shapes, config=checkpoint.config(), lengths=lengths)


def check_one_model(base: str | Path) -> None:
    """Nothing, unless the folder is a diffusion pipeline, which is several models.

    Raises:
        UsageError: naming its parts.
    """
    if _is_pipeline(Path(base)):
        parts = " or ".join(str(Path(base) / part) for part in COMPONENTS if (Path(base) / part).is_dir())
        raise UsageError(f"{base} is a pipeline of several models; give one of them: --base {parts}")


def find_other_base(named: str | None, base: str | Path) -> tuple[str, ...]:
    """A line where an adapter names another model than the one it is put on, by name as far as names can tell."""
    if not named or _short(named) == _short(base):
        return ()
    return (
        f"was trained on {named}, and is put on {base}: its names and shapes fit; if the weights are not the same, "
        "neither is what it learned",
    )


def _short(model: str | Path) -> str:
    """A model's name without its place: the last part of a path or hub name."""
    path = Path(model)
    if path.is_file():
        path = path.with_suffix("") if path.suffix == ".gguf" else path.parent
    if path.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2].lower()
    return path.name.removesuffix(".gguf").lower()


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _modules(checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight] | None = None) -> dict[str, tuple[int, ...]]:
    """A quantised layer has the shape of the weight that it stands for."""
    stored = {name: slot.shape for name, slot in checkpoint.slots.items()}
    packed = find_quantized(checkpoint) if packed is None else packed
    stored |= {name: layer.shape for name, layer in packed.items()}
    return {
        re.sub(r"\.weight$", "", name): shape
        for name, shape in stored.items()
        if name.endswith(".weight") and len(shape) > 1
    }


def compute_adapted_lengths(
    checkpoint: Checkpoint, state: AdapterState, packed: Mapping[str, QuantizedWeight] | None = None
) -> dict[str, Tensor]:
    """Length of each output row of ``W + s B A``, (O,), by layer.

    Raises:
        DoraError: if the adapter does not fit the checkpoint.
    """
    if stacks := [name for name, layer in state.layers.items() if layer.kind == "experts"]:
        raise DoraError(f"stacks of experts have no such form: {', '.join(stacks[:5])}; merge the adapter")
    return {
        name: dense_row_norm(W_OI, *layer.factors, layer.scale)
        for name, layer, W_OI in read_base_rows(state, checkpoint, packed)
    }


def read_base_rows(
    state: AdapterState, checkpoint: Checkpoint, packed: Mapping[str, QuantizedWeight] | None = None
) -> Iterator[tuple[str, LayerAdapter, Tensor]]:
    """Each layer with the rows of its base weight, (O, I), one at a time; of experts the stack, (E, O, I).

    Args:
        packed: the checkpoint's quantised layers, where they have been looked for already.

    Raises:
        DoraError: if the adapter does not fit the checkpoint: everything, at once, before the first.
    """
    packed = find_quantized(checkpoint) if packed is None else packed
    fitted = match_adapter(state, {**checkpoint.slots, **packed}, checkpoint.config())
    # in the same order, by the checkpoint's names, and as wide as its weights
    for name, slots in itertools.groupby(fitted.layers.items(), key=lambda item: fitted.sources[item[0]]):
        rows, layer = [], state.layers[name]
        for slot, part in slots:
            stored = packed[slot].dense() if slot in packed else read_whole(checkpoint.slots[slot])
            rows.append(view_as_rows(stored, part, transposed=slot in fitted.transposed))
            layer = part if layer.kind != "experts" else layer
        # experts that are kept apart come one after the other
        yield name, layer, rows[0] if len(rows) == 1 else torch.cat(rows).view(layer.shape)
