"""A diffusion pipeline's parts, and which of them an adapter's layers belong to."""

import re
from collections.abc import Collection
from dataclasses import replace

from ..errors import UsageError, list_some
from ..state import AdapterState, LayerAdapter
from .base import Hints, ParsedAdapter
from .tensors import make_config

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KEPT = ("lora_dropout", "dropout_mode", "detach_norm")
_COMPONENT = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+)")
# what follows the part's own name; GPT-2's names begin with "transformer.h." and are no pipeline's
_INSIDE = {
    # diffusers' names, and those of the original code
    "unet": re.compile(
        r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding"
        r"|input_blocks|output_blocks|middle_block|time_embed|label_emb|out\.\d)\b.*"
    ),
    "transformer": re.compile(r"(?!h\.|wte|wpe|word_embeddings|layers?\.\d).+"),
    "text_encoder": re.compile(r"(text_model|encoder|text_projection|model|shared)\b.*"),
}


# of transformers' two classes of CLIP's text encoder one has a model in it, and files are named after that
_CLIP = re.compile(r"(text_encoder\w*)\.(text_model\.)?((encoder\.layers|embeddings|final_layer_norm)\b.*)")


def find_component(name: str) -> str | None:
    """The part of a pipeline that a module's name begins with."""
    match = _COMPONENT.fullmatch(name)
    if match is None:
        return None
    kind = "text_encoder" if match[1].startswith("text_encoder") else match[1]
    return match[1] if _INSIDE[kind].fullmatch(match[2]) else None


def strip_component(name: str, component: str | None) -> str:
    """The name inside its part."""
    return name.removeprefix(f"{component}.") if component else name


def spell_for_files(name: str) -> str:
    """A layer's name as files have it: of a CLIP text encoder with `text_model`, whichever class it was trained in."""
    match = _CLIP.fullmatch(name)
    return f"{match[1]}.text_model.{match[3]}" if match else name


def spell_otherwise(name: str) -> str | None:
    """A layer's name in the other class of CLIP's text encoder; None of any other model."""
    match = _CLIP.fullmatch(name)
    if match is None:
        return None
    return f"{match[1]}.{match[3]}" if match[2] else f"{match[1]}.text_model.{match[3]}"


def spell_for_model(adapter: ParsedAdapter, known: Collection[str]) -> ParsedAdapter:
    """The layers by the names that the model has, where those differ by the class of a text encoder alone."""
    state, others = adapter.state, {name: spell_otherwise(name) for name in adapter.state.layers}
    names = {name: other for name, other in others.items() if other in known and name not in known}
    if not names:
        return adapter
    layers = {names.get(name) or name: layer for name, layer in state.layers.items()}
    config = make_config(layers, **{name: getattr(adapter.config, name) for name in _KEPT})
    return ParsedAdapter(config, replace(state, layers=layers), adapter.notes)


def add_component(state: AdapterState, hints: Hints) -> dict[str, LayerAdapter]:
    """The layers by names with their part of a pipeline in front.

    Raises:
        UsageError: if it cannot be told which part they belong to, or they are none of the part that is given.
    """
    if all(map(find_component, state.layers)):
        return dict(state.layers)
    part = hints.component or _guess_component(list(state.layers))
    if part not in COMPONENTS:
        raise UsageError(
            f"which part of a pipeline is {next(iter(state.layers))}? Give --component, one of {', '.join(COMPONENTS)}"
        )
    named = {f"{part}.{name}": layer for name, layer in state.layers.items()}
    if others := [name for name in named if find_component(name) is None]:
        raise UsageError(f"--component {part}: no such part of a pipeline has {list_some(others, 5, ', ')}")
    return named


def check_component(adapter: ParsedAdapter, component: str) -> None:
    """Check that the layers' names begin with parts of a pipeline, since one of them is asked for.

    Raises:
        UsageError: if none does.
    """
    if not any(map(find_component, adapter.state.layers)):
        raise UsageError(f"--component {component}: no layer of this adapter is named by a part; leave --component out")


def take_component(adapter: ParsedAdapter, component: str | None) -> ParsedAdapter:
    """The layers of one part by their names inside it, for what knows one model and no pipelines.

    Raises:
        UsageError: if the adapter is of several parts and none is named, or of others.
    """
    state = adapter.state
    parts = {find_component(name) for name in state.layers}
    if parts <= {None}:
        return adapter
    names = ", ".join(sorted(part for part in parts if part))
    if component is None and len(parts) > 1:
        raise UsageError(f"the adapter is of several parts of a pipeline ({names}); give --component, one of them")
    part = component or next(iter(parts))
    if part not in parts:
        raise UsageError(f"--component {part}: the adapter is of {names}")
    layers = {
        strip_component(name, part): layer for name, layer in state.layers.items() if find_component(name) == part
    }
    left = len(state.layers) - len(layers)
    notes = [f"{left} layers of other parts were not asked for, and are not taken along"] if left else []
    config = make_config(layers, **{name: getattr(adapter.config, name) for name in _KEPT})
    return ParsedAdapter(config, AdapterState(layers, {}, state.base_model), (*adapter.notes, *notes))


def _guess_component(names: list[str]) -> str | None:
    """The part that modules without a part in front of their names must be of, where the names are telling."""
    if all(_INSIDE["unet"].fullmatch(name) for name in names):
        return "unet"
    if all(re.match(r"(single_)?transformer_blocks\.\d", name) for name in names):
        return "transformer"
    return None
