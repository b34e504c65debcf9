"""ostris' ai-toolkit: kohya's or PEFT's names, the lengths as `magnitude`, and no alpha for DoRA."""

from torch import Tensor

from ..config import DoraConfig
from ..errors import raise_problems
from ..state import AdapterState, LayerAdapter
from . import kohya
from .base import Content, Found, Given, config_for, gathered, layers_of, number, only_layers
from .diffusers import with_components
from .pipeline import component_of

_UNDERSCORED = {"a": "lora_down.weight", "b": "lora_up.weight", "alpha": "alpha", "m": "magnitude"}
_DOTTED = {"a": "lora_A.weight", "b": "lora_B.weight", "alpha": "alpha", "m": "magnitude"}


def detect(content: Content) -> bool:
    """Whether the magnitudes are called that, beside lora_down or lora_A (torchtune's are beside lora_a)."""
    keys = list(content.tensors)
    pairs = any(key.endswith((".lora_down.weight", ".lora_A.weight")) for key in keys)
    return pairs and any(key.endswith(".magnitude") for key in keys) and not any(".dora_layer." in key for key in keys)


def read(content: Content, given: Given) -> Found:
    """ai-toolkit's adapter; where it says no alpha, which is always so for DoRA, the rank or the given one.

    Raises:
        UsageError: if names have underscores and no base model is given to look them up in.
        DoraError: listing everything that does not belong.
    """
    title = "the ai-toolkit adapter"
    if any(key.endswith(".lora_down.weight") for key in content.tensors):
        return kohya.read_fields(content, given, _UNDERSCORED, title)
    parts, problems = gathered(content.tensors, {key: field for field, key in _DOTTED.items()})

    def layer(_name: str, part: dict[str, Tensor]) -> LayerAdapter:
        rank = part["a"].shape[0]
        alpha = number(part["alpha"]) if "alpha" in part else given.alpha or rank
        return LayerAdapter(part["a"], part["b"], part["m"].flatten() if "m" in part else None, alpha / rank)

    layers = layers_of(parts, layer, _DOTTED, problems)
    raise_problems(title, problems)
    missing = sum("alpha" not in part for part in parts.values())
    assumed = "the rank" if given.alpha is None else f"{given.alpha:g}, as given"
    notes = (f"{missing} layers have no alpha: taken as {assumed}; linear_alpha of the training says",) * bool(missing)
    return Found(config_for(layers, dropout_mode="adapter"), AdapterState(layers), notes)


def write(_config: DoraConfig, state: AdapterState, given: Given) -> Content:
    """The adapter for ai-toolkit: PEFT's names for a pipeline's transformer, kohya's for the others.

    Where its reader takes alpha for the rank the change must not shrink: s is folded into B, and alpha is the rank.

    Raises:
        UsageError: if whole tensors were trained.
    """
    only_layers(state, "ai-toolkit")
    folded = {
        name: LayerAdapter(layer.a_RI, layer.b_OR * layer.scale, layer.m_O, 1.0, layer.kind)
        for name, layer in state.layers.items()
    }
    parts = {component_of(name) or given.component for name in folded}
    if parts != {"transformer"}:
        return kohya.write_fields(AdapterState(folded), given, _UNDERSCORED)
    tensors: dict[str, Tensor] = {}
    for name, layer in with_components(AdapterState(folded), given).items():
        tensors |= {f"{name}.{_DOTTED['a']}": layer.a_RI, f"{name}.{_DOTTED['b']}": layer.b_OR}
        if layer.m_O is not None:
            tensors[f"{name}.{_DOTTED['m']}"] = layer.m_O
    return Content(tensors, {}, {"format": "pt"})
