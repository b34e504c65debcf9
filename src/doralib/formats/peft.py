"""PEFT: adapter_model.safetensors and adapter_config.json."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError
from ..state import AdapterState, LayerAdapter
from .vera import TYPES, from_vera, to_vera

_PEFT_PREFIX = "base_model.model."
_FACTORS = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight"}
# kinds of layers with keys of their own; PEFT has no transposed convolutions, so those are ours
_FACTORS_OF = {
    "embedding": {"a_RI": "lora_embedding_A", "b_OR": "lora_embedding_B"},
    "transposed_convolution": {"a_RI": "lora_transposed_A.weight", "b_OR": "lora_transposed_B.weight"},
}
_MAGNITUDE = "lora_magnitude_vector"
# (field, kind) by key; kind "": linear or convolution, as the shapes say
_MEANINGS = {_MAGNITUDE: ("m_O", "")} | {
    key: (field, kind) for kind, keys in {"": _FACTORS, **_FACTORS_OF}.items() for field, key in keys.items()
}
_PEFT_LAYER = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _MEANINGS))})")
_FROZEN_COPY = ".base_layer.weight"
# settings that PEFT's file shares with ours, by the same name
_SHARED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
)
# what PEFT can write and a linear DoRA adapter here cannot mean
_REFUSED = (
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "trainable_token_indices",
    "magnitudes_divided_by_norm",  # what `tensorrt` writes
)


# starts of PEFT's that change the base weight, so that the tensors mean nothing beside the weight as it was
_MOVED_STARTS = ("pissa", "olora", "corda", "lora_ga")


def from_peft(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[DoraConfig, AdapterState]:
    """PEFT's ``adapter_model.safetensors`` and ``adapter_config.json`` as ours.

    Settings that we do not know are PEFT's own business and are taken; tensors that we do not know are not. Dropout
    goes on in the "exact" mode, which is PEFT's.

    Raises:
        DoraError: listing every missing, extra and ill-shaped tensor.
    """
    if settings.get("peft_type") in TYPES:
        return from_vera(tensors, settings)
    config = _peft_config(settings)
    parts: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, set[str]] = {}
    extra: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PEFT_PREFIX)
        if match := _PEFT_LAYER.fullmatch(name):
            field, kind = _MEANINGS[match[2]]
            parts.setdefault(match[1], {})[field] = tensor
            kinds.setdefault(match[1], set()).update({kind} - {""})
        elif _is_extra(name, config):
            extra[name.replace(".base_layer.", ".")] = tensor
        elif name.endswith(_FROZEN_COPY) and _has_factors(key.removesuffix(_FROZEN_COPY), tensors):
            continue  # PEFT adds the untouched weight of an adapted embedding or head
        else:
            problems.append(f"{key} {tuple(tensor.shape)}: not a tensor of a DoRA or LoRA adapter")
    layers = {}
    for layer, found in parts.items():
        try:
            layers[layer] = _peft_layer(layer, found, "".join(sorted(kinds[layer])), config)
        except DoraError as error:
            problems.append(f"{layer}: {error}")
    if not layers and not extra and not problems:
        problems.append("the file holds no tensor at all")
    if problems:
        raise DoraError(f"adapter: {len(problems)} problems\n  " + "\n  ".join(problems[:20]))
    return config, AdapterState(layers, extra, settings.get("base_model_name_or_path"))


def to_peft(config: DoraConfig, state: AdapterState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our adapter as PEFT's tensors and settings."""
    if config.has_bank:
        return to_vera(config, state, _target_names(config, state))
    tensors = {}
    for layer, adapter in state.layers.items():
        for field, key in _FACTORS_OF.get(adapter.kind, _FACTORS).items():
            tensors[f"{_PEFT_PREFIX}{layer}.{key}"] = getattr(adapter, field)
        if adapter.m_O is not None:
            shape = (1, -1, *(1 for _ in adapter.kernel)) if adapter.kernel else (-1,)
            tensors[f"{_PEFT_PREFIX}{layer}.{_MAGNITUDE}"] = adapter.m_O.reshape(shape)
    for name, tensor in state.extra.items():
        module, _, field = name.rpartition(".")
        # PEFT keeps the bias of a layer it adapted under the wrapped layer's name
        inner = ".base_layer" if module in state.layers else ""
        tensors[f"{_PEFT_PREFIX}{module}{inner}.{field}"] = tensor
    settings = {field: getattr(config, field) for field in _SHARED}
    # layers with a magnitude alone have rank 1 in files, whatever the settings say
    ranks = {name: layer.rank for name, layer in state.layers.items() if layer.rank != config.rank_of(name)}
    settings["rank_pattern"] = {**ranks, **config.rank_pattern}
    settings |= {
        "peft_type": "LORA",
        "use_dora": config.method == "dora",
        "base_model_name_or_path": state.base_model,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _target_names(config, state),
        "modules_to_save": list(config.modules_to_save) or None,
        "exclude_modules": None,
        "task_type": None,
    }
    if settings["lora_alpha"] == int(settings["lora_alpha"]):
        settings["lora_alpha"] = int(settings["lora_alpha"])
    return tensors, settings


def _peft_config(settings: Mapping[str, Any]) -> DoraConfig:
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise DoraError(f"adapter: peft_type is {kind!r}; only LORA adapters, with or without use_dora, are read")
    if asked := [field for field in _REFUSED if settings.get(field)]:
        raise DoraError(f"adapter: {', '.join(asked)} is set, which a linear DoRA or LoRA adapter has no place for")
    if (start := str(settings.get("init_lora_weights"))).lower().startswith(_MOVED_STARTS):
        raise DoraError(
            f"adapter: init_lora_weights is {start!r}: its A and B belong to a base that PEFT changed, not to the base "
            "model; save it in PEFT with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    values = {field: settings[field] for field in _SHARED if settings.get(field) is not None}
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(field), list | set):
            values[field] = tuple(sorted(values[field]))
    if not values.get("target_modules"):
        values.pop("target_modules", None)
    method = "dora" if settings.get("use_dora") else "lora"
    return DoraConfig(method=method, dropout_mode="exact", **values)


def _peft_layer(layer: str, found: dict[str, Tensor], kind: str, config: DoraConfig) -> LayerAdapter:
    keys = _FACTORS_OF.get(kind, _FACTORS)
    missing = [key for field, key in keys.items() if field not in found]
    if config.method == "lora":
        if "m_O" in found:
            raise DoraError("has a lora_magnitude_vector, but use_dora is false in the settings")
    elif "m_O" not in found:
        missing.append(_MAGNITUDE)
    if missing:
        raise DoraError(f"lacks {', '.join(missing)}")
    a, b, m = found["a_RI"], found["b_OR"], found.get("m_O")
    if a.shape[0] != config.rank_of(layer):
        raise DoraError(f"lora_A has rank {a.shape[0]}, the settings say {config.rank_of(layer)}")
    if a.dim() > 2:
        _refuse_groups(a, b)
        m = m.flatten() if m is not None and m.numel() == b.shape[0] else m
    return LayerAdapter(a, b, m, config.scale_of(layer), kind)


def _has_factors(layer: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(f"{layer}.{keys['a_RI']}" in tensors for keys in (_FACTORS, *_FACTORS_OF.values()))


def _refuse_groups(a: Tensor, b: Tensor) -> None:
    """PEFT lets A mix all inputs of a grouped convolution, and takes norms of a weight that this is no change of."""
    if b.dim() == a.dim() and a.shape[0] != b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise DoraError(
            f"is PEFT's adapter of a grouped convolution (A {tuple(a.shape)}, B {tuple(b.shape)}): it mixes channels "
            "across groups, so it is no change of the grouped weight and cannot be merged; train it anew with doralib"
        )


def _is_extra(name: str, config: DoraConfig) -> bool:
    """A bias that was trained, or a tensor of a module saved whole."""
    if name.endswith(".bias") and config.bias != "none":
        return True
    parents = name.split(".")[:-1]
    return any(
        ".".join(parents[:i]).endswith(module) for module in config.modules_to_save for i in range(1, 1 + len(parents))
    )


def _target_names(config: DoraConfig, state: AdapterState) -> list[str] | str:
    """Endings for PEFT to find the layers by; whole names where the endings would name more than was adapted."""
    alone = [name for name, layer in state.layers.items() if layer.rank != config.rank_of(name)]
    if isinstance(config.target_modules, tuple):
        return sorted({*config.target_modules, *alone})
    ends = Counter(layer.rpartition(".")[2] for layer in state.layers)
    if config.target_modules in (None, "all-linear"):
        return sorted(ends)
    return "|".join([f"(?:{config.target_modules})", *map(re.escape, alone)]) if alone else str(config.target_modules)
