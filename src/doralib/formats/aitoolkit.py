"""ostris' ai-toolkit: kohya's or PEFT's names, the lengths as `magnitude`, and no alpha for DoRA."""

from torch import Tensor

from ..config import DoraConfig
from ..state import AdapterState, LayerAdapter
from . import kohya
from .base import Format, Hints, ParsedAdapter, RawAdapter
from .pipeline import add_component, find_component
from .tensors import check_only_layers, group_by_layer, name_tensors, note_missing_alpha, parse_layers, read_alpha

_UNDERSCORED = {"a": "lora_down.weight", "b": "lora_up.weight", "alpha": "alpha", "m": "magnitude"}
_DOTTED = {"a": "lora_A.weight", "b": "lora_B.weight", "alpha": "alpha", "m": "magnitude"}


def detect(raw: RawAdapter) -> bool:
    """Whether the magnitudes are called that, beside lora_down or lora_A (torchtune's are beside lora_a)."""
    keys = list(raw.tensors)
    pairs = any(key.endswith((".lora_down.weight", ".lora_A.weight")) for key in keys)
    return pairs and any(key.endswith(".magnitude") for key in keys) and not any(".dora_layer." in key for key in keys)


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """ai-toolkit's adapter; where it says no alpha, which is always so for DoRA, the rank or the given one.

    Raises:
        UsageError: if names have underscores and no base model is given to look them up in.
        DoraError: listing everything that does not belong.
    """
    title = "the ai-toolkit adapter"
    if any(key.endswith(".lora_down.weight") for key in raw.tensors):
        return kohya.read_fields(raw, hints, _UNDERSCORED, title)
    parts, problems = group_by_layer(raw.tensors, _DOTTED)

    def layer(_name: str, part: dict[str, Tensor]) -> LayerAdapter:
        rank = part["a"].shape[0]
        m_O = part["m"].flatten() if "m" in part else None
        return LayerAdapter(part["a"], part["b"], m_O, read_alpha(part, hints, rank) / rank)

    notes = note_missing_alpha(parts, hints, "; linear_alpha of the training says")
    return parse_layers(title, parts, layer, _DOTTED, problems, notes=notes)


def write(_config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter for ai-toolkit: PEFT's names for a pipeline's transformer, kohya's for the others.

    Its reader takes alpha for the rank, so s goes into B, and alpha is the rank.

    Raises:
        UsageError: if whole tensors were trained.
    """
    check_only_layers(state, "ai-toolkit")
    scaled = {
        name: LayerAdapter(layer.a_RI, layer.b_OR * layer.scale, layer.m_O, 1.0, layer.kind)
        for name, layer in state.layers.items()
    }
    parts = {find_component(name) or hints.component for name in scaled}
    if parts != {"transformer"}:
        return kohya.write_fields(AdapterState(scaled), hints, _UNDERSCORED)
    tensors: dict[str, Tensor] = {}
    for name, layer in add_component(AdapterState(scaled), hints).items():
        tensors |= name_tensors(name, _DOTTED, layer.a_RI, layer.b_OR, layer.m_O)
    return RawAdapter(tensors, {}, {"format": "pt"})


FORMAT = Format("ai-toolkit", "ai-toolkit", detect, read, write, "lora.safetensors", pipelines=True)
