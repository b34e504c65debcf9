"""diffusers: pytorch_lora_weights.safetensors, keys by part of the pipeline, settings in the file's metadata."""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..documents import decode_json
from ..errors import DoraError
from ..peft_settings import LORA
from ..state import MAGNITUDE, AdapterState, LayerAdapter
from .base import Format, Hints, ParsedAdapter, RawAdapter
from .peft import shape_magnitude
from .pipeline import COMPONENTS, add_component, find_component, spell_for_files
from .tensors import (
    check_only_layers,
    compute_alpha,
    find_commonest,
    group_by_layer,
    name_tensors,
    parse_layers,
    read_alpha,
)

METADATA = "lora_adapter_metadata"
_KEYS = {"a": "lora.down.weight", "b": "lora.up.weight", "m": MAGNITUDE}
_OLD_KEYS = {"a": "lora_linear_layer.down.weight", "b": "lora_linear_layer.up.weight", "alpha": "alpha"}
_PEFT_KEYS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": MAGNITUDE}
# a unet's keys are diffusers' own. transformers, which loads text encoders, looks for the magnitude as a module's
# weight: by PEFT's own key it is dropped (seen with diffusers 0.42.1 and transformers 5.23), and PEFT takes both
_WRITTEN = {"unet": _KEYS, "transformer": _PEFT_KEYS}
_TEXT_ENCODER = {**_PEFT_KEYS, "m": f"{MAGNITUDE}.weight"}


def detect(raw: RawAdapter) -> bool:
    """Whether keys begin with a part of a pipeline, and a magnitude, if any, is PEFT's."""
    endings = tuple({ending for each in (_KEYS, _OLD_KEYS, _PEFT_KEYS) for ending in each.values() if "lora" in ending})
    keys = [key for key in raw.tensors if key.endswith(endings)]
    parts = METADATA in raw.metadata or any(find_component(key) for key in keys)
    return parts and bool(keys) and not any(key.endswith(".magnitude") for key in raw.tensors)


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """diffusers' adapter, names with their part in front; without metadata alpha is the rank, as diffusers takes it.

    Raises:
        DoraError: listing everything that does not belong.
    """
    parts, problems = group_by_layer(raw.tensors, _KEYS, _OLD_KEYS, _PEFT_KEYS, _TEXT_ENCODER)
    problems += [
        f"{name}: begins with no part of a pipeline ({', '.join(COMPONENTS)})"
        for name in parts
        if find_component(name) is None
    ]
    settings, notes = _read_settings(raw.metadata, parts, hints)
    problems += _find_without_magnitude(parts, settings)

    def layer(name: str, part: dict[str, Tensor]) -> LayerAdapter:
        own = settings.get(find_component(name) or "")
        rank, inside = part["a"].shape[0], _strip_part(name)
        if own is not None and own.rank_of(inside) != rank:
            raise DoraError(f"has rank {rank}, the metadata say {own.rank_of(inside)}")
        scale = read_alpha(part, hints, rank) / rank if own is None or "alpha" in part else own.scale_of(inside)
        m_O = part["m"].flatten() if "m" in part else None
        return LayerAdapter(part["a"], part["b"], m_O, scale)

    dropout = max((own.lora_dropout for own in settings.values()), default=0.0)
    said: dict[str, Any] = {"notes": notes, "lora_dropout": dropout, "dropout_mode": "exact"}
    return parse_layers("the diffusers adapter", parts, layer, _KEYS, problems, **said)


def write(config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter for a pipeline's load_lora_weights, with the metadata without which diffusers forgets alpha.

    Raises:
        UsageError: if it cannot be told which part of a pipeline the layers belong to, or whole tensors were trained.
    """
    check_only_layers(state, "diffusers", ("linear", "convolution"))
    named = {spell_for_files(name): layer for name, layer in add_component(state, hints).items()}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part in sorted({find_component(name) or "" for name in named}):
        layers = {name: layer for name, layer in named.items() if find_component(name) == part}
        keys = _WRITTEN.get(part, _TEXT_ENCODER)
        for name, layer in layers.items():
            tensors |= name_tensors(name, keys, layer.a_RI, layer.b_OR, shape_magnitude(layer))
        metadata |= {f"{part}.{field}": value for field, value in _make_lora_config(layers, config).items()}
    return RawAdapter(tensors, {}, {METADATA: json.dumps(metadata, indent=2, sort_keys=True)})


def _read_settings(
    metadata: Mapping[str, str], parts: Mapping[str, Any], hints: Hints
) -> tuple[dict[str, DoraConfig], tuple[str, ...]]:
    """Settings of each part, and what is assumed of parts that have none."""
    text = metadata.get(METADATA)
    if text is None:
        if all("alpha" in part for part in parts.values()):
            return {}, ()
        taken = "the rank, as diffusers itself does" if hints.alpha is None else f"{hints.alpha:g}, as given"
        return {}, (f"the file says no alpha (no {METADATA}): taken as {taken}",)
    try:
        values = decode_json(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DoraError(f"{METADATA} in the file is not a whole JSON object; save the adapter again")
    configs = {}
    for part in COMPONENTS:
        own = {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
        if own:
            fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
            method = "dora" if own.get("use_dora") else "lora"
            LORA.check(own)
            configs[part] = DoraConfig(method=method, **{f: own[f] for f in fields if own.get(f) is not None})
    return configs, ()


def _find_without_magnitude(parts: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, DoraConfig]) -> list[str]:
    """A line for each part that is said to be DoRA and has no magnitude, which `parse_layers` cannot know."""
    return [
        f"{part}: use_dora is set, but there is not one {MAGNITUDE}"
        for part, config in settings.items()
        if config.method == "dora" and not any("m" in parts[name] for name in parts if find_component(name) == part)
    ]


def _make_lora_config(layers: Mapping[str, LayerAdapter], config: DoraConfig) -> dict[str, Any]:
    """What PEFT's LoraConfig needs to make these layers again.

    PEFT goes by the ends of names, so that without `text_model` one means a layer of both classes of text encoders.
    """
    inner = {_strip_part(name).removeprefix("text_model."): layer for name, layer in layers.items()}
    ranks = {name: layer.rank for name, layer in inner.items()}
    alphas = {name: compute_alpha(layer) for name, layer in inner.items()}
    r, alpha = find_commonest(ranks), find_commonest(alphas)
    return {
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != r},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(inner),
        "use_dora": any(layer.m_O is not None for layer in inner.values()),
        "lora_dropout": config.lora_dropout,
        "bias": "none",
    }


def _strip_part(name: str) -> str:
    return name.partition(".")[2]


FORMAT = Format(
    "diffusers",
    "diffusers",
    detect,
    read,
    write,
    "pytorch_lora_weights.safetensors",
    keeps=("lora_dropout",),
    dropout_mode="exact",
    pipelines=True,
)
