"""An adapter and the stored model it belongs to."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from ..errors import DoraError, UsageError, list_some
from ..formats.base import Hints, ParsedAdapter
from ..formats.files import read_any_format
from ..formats.pipeline import COMPONENTS, check_component, take_component
from ..functional import dense_row_norm, row_norm_sq
from ..hub import split_revision
from ..state import AdapterState, LayerAdapter
from .kind import is_pipeline
from .match import MatchedAdapter, match_adapter, view_as_rows
from .parts import compose_again
from .quantized import find_quantized
from .safetensors import Checkpoint, Stored, find_variant, read_whole
from .vocabulary import check_vocabularies

# where a single-file Stable Diffusion checkpoint keeps the parts of its pipeline
_SINGLE_FILE = {
    "model.diffusion_model.": "unet.",
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
}


def read_for_base(path: Path, asked: Hints, base: Hints) -> tuple[str, ParsedAdapter]:
    """Read the adapter of one model, with the names inside that model; also the name of its format.

    Args:
        asked: the user's alpha and component, and what is allowed.
        base: what `describe_base` says of the base.

    Raises:
        UsageError: if there is no adapter, it is empty, it has no parts and one is asked for, or what it leaves open
            has to be given.
        DoraError: if it is damaged, of no known format, or holds anything that would have to be dropped.
    """
    hints = replace(
        base,
        alpha=asked.alpha,
        component=asked.component or base.component,
        allow_nonfinite=asked.allow_nonfinite,
    )
    form, adapter = read_any_format(path, hints)
    if not (adapter.state.layers or adapter.state.extra or adapter.state.rows):
        raise UsageError(f"the adapter in {path} is empty")
    if asked.component:
        check_component(adapter, asked.component)
    if asked.component or form.pipelines or base.component:
        adapter = take_component(adapter, hints.component)
    return form.name, adapter


def describe_base(hints: Hints, base: Path | Checkpoint, variant: str | None = None) -> Hints:
    """Add the names and shapes of a base's modules, and its config; a pipeline's parts go by their own names.

    Only headers are read; ``lengths`` reads weights when a format asks. Of a folder that is one part of a pipeline,
    that part is the component.

    Args:
        variant: which weights of a folder that has several, as `find_variant` takes it.

    Raises:
        UsageError: if there are no weights.
        DoraError: if they are damaged.
    """
    folder = base if isinstance(base, Path) else base.folder
    if folder.name in COMPONENTS and is_pipeline(folder.parent):
        # other parts' layers are told from unknown ones by the whole pipeline's names
        hints, base = replace(hints, component=hints.component or folder.name), folder.parent
    if isinstance(base, Path) and is_pipeline(base):
        parts = {part: _open(base / part, variant) for part in COMPONENTS if (base / part).is_dir()}
        named = {part: _read_shapes(checkpoint) for part, checkpoint in parts.items()}
        return replace(hints, shapes={f"{part}.{name}": s for part in named for name, s in named[part].items()})
    checkpoint = base if isinstance(base, Checkpoint) else _open(base, variant)
    shapes = {}
    for name, shape in _read_shapes(checkpoint).items():
        head = next((head for head in _SINGLE_FILE if name.startswith(head)), "")
        shapes[_SINGLE_FILE.get(head, "") + name.removeprefix(head)] = shape
    lengths = partial(compute_adapted_lengths, checkpoint)
    return replace(hints, shapes=shapes, config=checkpoint.config(), lengths=lengths)


def _open(path: Path, variant: str | None) -> Checkpoint:
    """A checkpoint's variant; of a part that has none of that name, its only weights."""
    files = list(path.glob("*.safetensors")) if path.is_dir() else []
    return Checkpoint.open(find_variant(path, variant) if variant and len(files) > 1 else path)


def check_one_model(base: str | Path) -> None:
    """Check that the folder is no diffusion pipeline, which is several models.

    Raises:
        UsageError: if it is, naming its parts.
    """
    if is_pipeline(Path(base)):
        parts = " or ".join(str(Path(base) / part) for part in COMPONENTS if (Path(base) / part).is_dir())
        raise UsageError(f"{base} is a pipeline of several models; give one of them: --base {parts}")


def find_other_base(named: str | None, base: str | Path) -> tuple[str, ...]:
    """A line if an adapter names another model than the one it is put on, as far as names can tell."""
    # an adapter of a pipeline names the whole
    whole = Path(base).parent if Path(base).name in COMPONENTS and is_pipeline(Path(base).parent) else base
    if not named or _shorten_name(named) in (_shorten_name(base), _shorten_name(whole)):
        return ()
    return (
        f"was trained on {named}, and is put on {base}: its names and shapes fit; if the weights are not the same, "
        "neither is what it learned",
    )


def locate_base(adapter: Path, named: str) -> str:
    """The model that an adapter names: a relative path from here, or else from the folders above the adapter.

    A name that is in none of these places is returned as it is, for the hub; that of a run's composed model is composed
    again.
    """
    place = Path(named).expanduser()
    if place.exists():
        return str(place)
    if place.is_absolute():
        return str(compose_again(adapter) or named)
    found = (above / place for above in _list_above(adapter))
    return next((str(place) for place in found if _is_model(place)), named)


@contextmanager
def telling_places(adapter: Path, base: str) -> Iterator[None]:
    """Say where an adapter's base was looked for in the error that it is in none of the places."""
    try:
        yield
    except UsageError as error:
        if Path(base).expanduser().exists():
            raise
        beside = _list_above(adapter)[0] / base
        looked = [Path(base).expanduser().absolute(), *([] if Path(base).is_absolute() else [beside])]
        raise UsageError(
            f"{error}\n  {adapter} names this base; looked for {' and '.join(map(str, looked))}"
            f"{'' if Path(base).is_absolute() else ', and in the folders above'}; name its place with --base MODEL"
        ) from None


def _is_model(place: Path) -> bool:
    return place.is_file() or (place / "config.json").is_file() or is_pipeline(place)


def _list_above(adapter: Path) -> list[Path]:
    """The folders above an adapter, the nearest first."""
    return list(adapter.resolve().parents)


def _shorten_name(model: str | Path) -> str:
    """A model's name without its place: the last part of a path or hub name."""
    path = Path(split_revision(str(model))[0])
    if path.is_file():
        path = path.with_suffix("") if path.suffix == ".gguf" else path.parent
    if path.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2].lower()
    # the other system's path too: adapters are made on one and used on another
    return PureWindowsPath(path).name.removesuffix(".gguf").lower()


def _list_stored(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Everything stored by name; in the place of a quantized layer's own tensor stands the weight that it means."""
    return {**checkpoint.slots, **find_quantized(checkpoint)}


def _read_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by module name."""
    return {
        name.removesuffix(".weight"): stored.shape
        for name, stored in _list_stored(checkpoint).items()
        if name.endswith(".weight") and len(stored.shape) > 1
    }


def match_checkpoint(state: AdapterState, checkpoint: Checkpoint, *, untie: bool = False) -> MatchedAdapter:
    """Match an adapter's names with a checkpoint's.

    Args:
        untie: whether a head that is tied to the embedding becomes a tensor of its own.

    Raises:
        DoraError: if the adapter does not fit the checkpoint: everything, at once; or if the checkpoint is damaged.
    """

    def lengths(name: str, num_rows: int) -> Tensor:
        stored = read_whole(checkpoint.slots[name])
        if stored.dim() == 2:
            return row_norm_sq(stored).sqrt()
        W_EOI = stored if stored.shape[1] == num_rows else stored.mT
        return torch.stack([row_norm_sq(W_OI).sqrt() for W_OI in W_EOI])

    stored, config = _list_stored(checkpoint), checkpoint.config()
    check_vocabularies(stored)
    if not config and any(name.startswith(tuple(_SINGLE_FILE)) for name in stored):
        # no config.json stands beside a single file
        config = {"_class_name": "StableDiffusion"}
    return match_adapter(state, stored, config, lengths, untie=untie)


def compute_adapted_lengths(checkpoint: Checkpoint, state: AdapterState) -> dict[str, Tensor]:
    """Length of each output row of ``W + s B A``, (O,), by layer.

    Raises:
        DoraError: if the adapter does not fit the checkpoint.
    """
    if stacks := [name for name, layer in state.layers.items() if layer.kind == "experts"]:
        raise DoraError(f"stacks of experts have no such form: {list_some(stacks, 5, ', ')}; merge the adapter")
    return {
        name: dense_row_norm(W_OI, *layer.factors, layer.scale)
        for name, layer, W_OI in read_base_rows(state, checkpoint)
    }


def read_base_rows(state: AdapterState, checkpoint: Checkpoint) -> Iterator[tuple[str, LayerAdapter, Tensor]]:
    """Read each layer's base weight as rows, (O, I), one at a time; of experts the stack, (E, O, I).

    Raises:
        DoraError: if the adapter does not fit the checkpoint: everything, at once, before the first.
    """
    # a head that is tied is read as it is: to look at it, nothing has to be untied
    quantized, matched = find_quantized(checkpoint), match_checkpoint(state, checkpoint, untie=True)
    # in the same order, by the checkpoint's names, and as wide as its weights
    alone = [(slot, part) for slot, part in matched.layers.items() if slot in matched.sources]
    for name, slots in itertools.groupby(alone, key=lambda item: matched.sources[item[0]]):
        rows, layer = [], matched.adapted[name]
        for slot, part in slots:
            if slot in matched.resized:
                stored = matched.resized[slot]
            elif slot in quantized:
                stored = quantized[slot].dequantize()
            else:
                stored = read_whole(checkpoint.slots[matched.copies.get(slot, slot)])
            rows.append(view_as_rows(stored, part, transposed=slot in matched.transposed))
            layer = part if layer.kind != "experts" else layer
        # experts that are kept apart come one after the other
        yield name, layer, rows[0] if len(rows) == 1 else torch.cat(rows).view(layer.shape)
    for name, share in matched.parts.items():
        W = read_whole(checkpoint.slots[share.stored])
        yield name, matched.adapted[name], W.chunk(share.count)[share.index]
