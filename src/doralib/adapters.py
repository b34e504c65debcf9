"""Adapters of any format, read with what the headers of their base model's checkpoint tell: names, shapes, config."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from .base_weights import adapted_lengths
from .checkpoints import Checkpoint
from .errors import UsageError
from .formats import Found, Given
from .formats.components import COMPONENTS
from .formats.storage import one_part, read_any, refuse_component
from .packed import PackedLayer, packed_layers

# where a single-file Stable Diffusion checkpoint keeps the parts of its pipeline
_SINGLE_FILE = {
    "model.diffusion_model.": "unet.",
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
}


def read_adapter(path: Path, asked: Given, known: Given) -> tuple[str, Found]:
    """The adapter of one model, by its names inside it, and the name of its format.

    Args:
        asked: the caller's alpha and component.
        known: what the base tells, as `knowing` says it.

    Raises:
        UsageError: if there is no adapter, it is empty, it has no parts and one is asked for, or what it leaves open
            has to be given.
        DoraError: if it is damaged, of no known format, or holds anything that would have to be dropped.
    """
    given = replace(known, alpha=asked.alpha, component=asked.component or known.component)
    form, found = read_any(path, given)
    if not found.state.layers and not found.state.extra:
        raise UsageError(f"the adapter in {path} is empty")
    if asked.component:
        refuse_component(found, asked.component)
    return form.name, one_part(found, given.component)


def knowing(given: Given, base: Path | Checkpoint, packed: Mapping[str, PackedLayer] | None = None) -> Given:
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
        return knowing(replace(given, component=given.component or folder.name), folder.parent)
    if isinstance(base, Path) and _is_pipeline(base):
        for part in COMPONENTS:
            if (base / part).is_dir():
                shapes |= {f"{part}.{name}": shape for name, shape in _modules(Checkpoint.open(base / part)).items()}
        return replace(given, shapes=shapes)
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    for name, shape in _modules(checkpoint, packed).items():
        head = next((head for head in _SINGLE_FILE if name.startswith(head)), "")
        shapes[_SINGLE_FILE.get(head, "") + name.removeprefix(head)] = shape
    lengths = partial(adapted_lengths, checkpoint, packed=packed)
    return replace(given, shapes=shapes, config=checkpoint.config(), lengths=lengths)


def whole_pipeline(base: str | Path) -> None:
    """Nothing, unless the folder is a diffusion pipeline, which is several models.

    Raises:
        UsageError: naming its parts.
    """
    if _is_pipeline(Path(base)):
        parts = " or ".join(str(Path(base) / part) for part in COMPONENTS if (Path(base) / part).is_dir())
        raise UsageError(f"{base} is a pipeline of several models; give one of them: --base {parts}")


def another_base(named: str | None, base: str | Path) -> tuple[str, ...]:
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


def _modules(checkpoint: Checkpoint, packed: Mapping[str, PackedLayer] | None = None) -> dict[str, tuple[int, ...]]:
    """A quantised layer has the shape of the weight that it stands for."""
    stored = {name: slot.shape for name, slot in checkpoint.slots.items()}
    packed = packed_layers(checkpoint) if packed is None else packed
    stored |= {name: layer.shape for name, layer in packed.items()}
    return {
        re.sub(r"\.weight$", "", name): shape
        for name, shape in stored.items()
        if name.endswith(".weight") and len(shape) > 1
    }
