"""ostris' ai-toolkit: kohya's or PEFT's names, the lengths as `magnitude`, and no alpha for DoRA."""

from torch import Tensor

from ..config import DoraConfig
from ..errors import raise_problems
from ..state import AdapterState, LayerAdapter
from . import kohya
from .base import (
    Hints,
    ParsedAdapter,
    RawAdapter,
    build_layers,
    check_only_layers,
    group_by_layer,
    make_config,
    read_number,
)
from .diffusers import add_component
from .pipeline import find_component

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
    parts, problems = group_by_layer(raw.tensors, {key: field for field, key in _DOTTED.items()})

    def layer(_name: str, part: dict[str, Tensor]) -> LayerAdapter:
        rank = part["a"].shape[0]
        alpha = read_number(part["alpha"]) if "alpha" in part else hints.alpha or rank
        return LayerAdapter(part["a"], part["b"], part["m"].flatten() if "m" in part else None, alpha / rank)

    layers = build_layers(parts, layer, _DOTTED, problems)
    raise_problems(title, problems)
    missing = sum("alpha" not in part for part in parts.values())
    assumed = "the rank" if hints.alpha is None else f"{hints.alpha:g}, as given"
    notes = (f"{missing} layers have no alpha: taken as {assumed}; linear_alpha of the training says",) * bool(missing)
    return ParsedAdapter(make_config(layers, dropout_mode="adapter"), AdapterState(layers), notes)


def write(_config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter for ai-toolkit: PEFT's names for a pipeline's transformer, kohya's for the others.

    Where its reader takes alpha for the rank the change must not shrink: s is folded into B, and alpha is the rank.

    Raises:
        UsageError: if whole tensors were trained.
    """
    check_only_layers(state, "ai-toolkit")
    folded = {
        name: LayerAdapter(layer.a_RI, layer.b_OR * layer.scale, layer.m_O, 1.0, layer.kind)
        for name, layer in state.layers.items()
    }
    parts = {find_component(name) or hints.component for name in folded}
    if parts != {"transformer"}:
        return kohya.write_fields(AdapterState(folded), hints, _UNDERSCORED)
    tensors: dict[str, Tensor] = {}
    for name, layer in add_component(AdapterState(folded), hints).items():
        tensors |= {f"{name}.{_DOTTED['a']}": layer.a_RI, f"{name}.{_DOTTED['b']}": layer.b_OR}
        if layer.m_O is not None:
            tensors[f"{name}.{_DOTTED['m']}"] = layer.m_O
    return RawAdapter(tensors, {}, {"format": "pt"})
