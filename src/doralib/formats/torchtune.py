"""torchtune: adapter_model.pt with its live names, and its export in PEFT's names, which lacks use_dora.

torchtune keeps the rows of q and k in the order of Meta's rotary embedding, pairs side by side; transformers keeps the
two halves apart. Its export to PEFT's names reorders B of q and k for every model, and the magnitudes of none.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import UsageError, list_some
from ..state import MAGNITUDE, AdapterState, LayerAdapter
from .base import SETTINGS_FILE, Format, Hints, ParsedAdapter, RawAdapter
from .peft import from_peft
from .rotary import to_halves, to_pairs
from .tensors import (
    check_only_layers,
    compute_alpha,
    find_commonest,
    group_by_layer,
    name_tensors,
    parse_layers,
    put_scale,
    unify_rank,
)

_KEYS = {"a": "lora_a.weight", "b": "lora_b.weight", "m": "magnitude"}
_HF = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_OURS = {hf: own for own, hf in _HF.items()}
_LIVE = re.compile(r"layers\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# of torchtune 0.6's converters these reorder q and k, and qwen2's does not
_REORDERED = frozenset({"llama", "mistral", "gemma", "gemma2"})
_AS_IS = frozenset({"qwen2"})
_EXPORTED = f".{MAGNITUDE}"

Reorder = Callable[[Tensor, int], Tensor]


def detect_live(raw: RawAdapter) -> bool:
    """Whether it is torchtune's adapter_model.pt."""
    return any(key.endswith(".lora_a.weight") for key in raw.tensors)


def detect_export(raw: RawAdapter) -> bool:
    """Whether it is torchtune's export: PEFT's names with magnitudes, and settings without a word on use_dora."""
    exported = any(key.startswith("base_model.model.") and key.endswith(_EXPORTED) for key in raw.tensors)
    settings = raw.settings
    return exported and settings.get("peft_type") == "LORA" and "use_dora" not in settings


def read_live(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """torchtune's own checkpoint under transformers' names, rows of q and k in transformers' order.

    Raises:
        UsageError: if q or k is adapted and no base model is given to count heads in, or alpha is not known.
        DoraError: listing everything that does not belong.
    """
    said = raw.settings.get("lora_alpha")
    alpha = hints.alpha if said is None else said
    if alpha is None:
        raise UsageError("there is no adapter_config.json beside adapter_model.pt to say lora_alpha; give --alpha")
    parts, problems = group_by_layer(raw.tensors, _KEYS)
    names = {name: _to_hf_name(name) for name in parts}
    problems += [f"{name}: is no linear layer of torchtune's decoders" for name, hf in names.items() if hf is None]
    turned = {hf: part for name, part in parts.items() if (hf := names[name]) is not None}
    heads = _count_heads(list(turned), hints)

    def layer(name: str, part: dict[str, Tensor]) -> LayerAdapter:
        turn = _make_turn(name, heads, to_halves)
        return LayerAdapter(
            part["a"], turn(part["b"]), turn(part["m"]) if "m" in part else None, alpha / len(part["a"])
        )

    dropout = float(raw.settings.get("lora_dropout", 0.0) or 0.0)
    return parse_layers("the torchtune adapter", turned, layer, _KEYS, problems, lora_dropout=dropout)


def read_export(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """torchtune's PEFT-like export with use_dora restored and q and k put right.

    Raises:
        UsageError: if q or k is adapted and no base model is given to count heads in.
        DoraError: listing everything that does not belong.
    """
    names = [key.removeprefix("base_model.model.").removesuffix(_EXPORTED) for key in raw.tensors]
    heads = _count_heads([name for name in names if _LAYER.fullmatch(name)], hints)
    as_is = hints.config.get("model_type") in _AS_IS
    tensors = {}
    for key, tensor in raw.tensors.items():
        name = key.removeprefix("base_model.model.")
        turned = tensor
        if not as_is and name.endswith(_EXPORTED):
            turned = _make_turn(name.removesuffix(_EXPORTED), heads, to_halves)(tensor)
        elif as_is and name.endswith(".lora_B.weight"):
            counts = _read_head_counts(hints)
            turned = _make_turn(name.removesuffix(".lora_B.weight"), counts, to_pairs)(tensor)
        tensors[key] = turned
    config, state = from_peft(tensors, {**raw.settings, "peft_type": "LORA", "use_dora": True})
    config = config.model_copy(update={"dropout_mode": "adapter"})
    what = "B of q and k put back in order" if as_is else "magnitudes of q and k put in transformers' order"
    notes = ["torchtune's export forgets use_dora: set"] + [what] * any(map(_is_qk, state.layers))
    return ParsedAdapter(config, state, tuple(notes))


def write_live(_config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter as torchtune's adapter_checkpoint.

    Raises:
        UsageError: for layers that torchtune's decoders do not have, several ranks, or q and k without a base model.
    """
    check_only_layers(state, "torchtune")
    names = {name: _to_own_name(name) for name in state.layers}
    if unknown := [name for name, own in names.items() if own is None]:
        raise UsageError(f"torchtune's decoders have no layer for {list_some(unknown, 5, ', ')}")
    rank, layers = unify_rank(state, "torchtune")
    heads = _count_heads(list(layers), hints)
    alpha = find_commonest({name: compute_alpha(layer) for name, layer in layers.items()})
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        turn = _make_turn(name, heads, to_pairs)
        # one alpha for all: a scale of its own goes into B
        b_OR = put_scale(layer.b_OR, compute_alpha(layer) / alpha)
        m_O = None if layer.m_O is None else turn(layer.m_O)
        tensors |= name_tensors(str(names[name]), _KEYS, layer.a_RI, turn(b_OR), m_O)
    targets = sorted({name.rpartition(".")[2] for name in state.layers})
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "peft_type": "LORA"}
    return RawAdapter(tensors, settings)


def _to_hf_name(own: str) -> str | None:
    if own == "output":
        return "lm_head"
    match = _LIVE.fullmatch(own)
    return f"model.layers.{match[1]}.{_HF[match[2]]}" if match and match[2] in _HF else None


def _to_own_name(hf: str) -> str | None:
    if hf == "lm_head":
        return "output"
    match = _LAYER.fullmatch(hf)
    return f"layers.{match[1]}.{_OURS[match[2]]}" if match and match[2] in _OURS else None


def _is_qk(name: str) -> bool:
    return name.endswith((".q_proj", ".k_proj"))


def _count_heads(names: list[str], hints: Hints) -> dict[str, int]:
    """Count the heads by projection, where rows are in another order; empty where they are not."""
    if not any(map(_is_qk, names)) or hints.config.get("model_type") in _AS_IS:
        return {}
    kind = hints.config.get("model_type")
    if kind not in _REORDERED:
        known = ", ".join(sorted(_REORDERED | _AS_IS))
        found = f"the base is of type {kind!r}" if hints.config else "no base model is given"
        raise UsageError(
            f"torchtune stores q_proj and k_proj with the rows of each head in another order, by the number of heads "
            f"and the kind of model: give --base MODEL of a known type ({known}); {found}"
        )
    return _read_head_counts(hints)


def _read_head_counts(hints: Hints) -> dict[str, int]:
    heads = int(hints.config["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(hints.config.get("num_key_value_heads") or heads)}


def _make_turn(name: str, heads: Mapping[str, int], reorder: Reorder) -> Callable[[Tensor], Tensor]:
    count = heads.get(name.rpartition(".")[2])
    return (lambda tensor: tensor) if count is None else (lambda tensor: reorder(tensor, count))


FORMAT = Format("torchtune", "torchtune", detect_live, read_live, write_live, "adapter_model.pt", SETTINGS_FILE)
EXPORT = Format(
    "torchtune-export",
    "torchtune's export",
    detect_export,
    read_export,
    None,
    settings_file=SETTINGS_FILE,
    variant_of="peft",
)
