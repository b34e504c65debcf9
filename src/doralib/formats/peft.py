"""PEFT: adapter_model.safetensors and adapter_config.json, whose names and shapes other formats share."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import DoraConfig, fits_whole
from ..errors import DoraError, raise_problems
from ..hub import split_revision
from ..peft_settings import LORA, SHARED, VERA, take_shared
from ..state import MAGNITUDE, AdapterState, FusedValues, LayerAdapter, RowValues
from . import peft_experts as experts
from .base import SETTINGS_FILE, Format, Hints, ParsedAdapter, RawAdapter
from .peft_vera import TYPES, from_vera, to_vera
from .tensors import check_complete, check_factors, compute_alpha

_PEFT_PREFIX = "base_model.model."
_FACTORS = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight"}
# kinds of layers with keys of their own; PEFT has no transposed convolutions, so those are ours
_FACTORS_OF = {
    "embedding": {"a_RI": "lora_embedding_A", "b_OR": "lora_embedding_B"},
    "transposed_convolution": {"a_RI": "lora_transposed_A.weight", "b_OR": "lora_transposed_B.weight"},
}
# (field, kind) by key; kind "": linear or convolution, as the shapes say
_MEANINGS = {MAGNITUDE: ("m_O", "")} | {
    key: (field, kind) for kind, keys in {"": _FACTORS, **_FACTORS_OF}.items() for field, key in keys.items()
}
_PEFT_LAYER = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _MEANINGS))})")
_FROZEN_COPY = ".base_layer.weight"
# tokens trained one by one, beside an adapter or alone
_ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta")
_ROWS_KEY, _ROWS_ALONE = ".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta"
_ROWS_FROZEN = ".token_adapter.base_layer.weight"
_WRAPPED_WHOLE = re.compile(r"(.+)\.(modules_to_save|original_module)\.(.+)")
# what PEFT writes whole, where the vocabulary was resized
_VOCABULARY = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "output", "shared"}
)
# a language model, and heads
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
# settings that PEFT's file shares with ours, by the same name


def detect(raw: RawAdapter) -> bool:
    """Whether keys have PEFT's prefix, or settings are a LORA's that says use_dora."""
    prefixed = any(key.startswith(_PEFT_PREFIX) for key in raw.tensors)
    return prefixed or (raw.settings.get("peft_type") == "LORA" and "use_dora" in raw.settings)


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """PEFT's adapter; what hand-written settings leave to PEFT's own defaults, which are not ours, is noted.

    Raises:
        DoraError: without settings, or listing every missing, extra and ill-shaped tensor.
    """
    settings = raw.settings
    if not settings:
        raise DoraError("PEFT's adapter_config.json is missing beside the tensors; without it alpha is unknown")
    defaults: dict[str, float] = {"r": 8, "lora_alpha": 8 if hints.alpha is None else hints.alpha}
    is_lora = settings.get("peft_type", "LORA") == "LORA"
    unsaid = {field: value for field, value in defaults.items() if is_lora and settings.get(field) is None}
    notes = tuple(
        f"the settings do not say {field}: {value:g}, PEFT's default"
        for field, value in unsaid.items()
        if field != "lora_alpha" or hints.alpha is None
    )
    tensors, ignored = _unwrap_whole(raw.tensors)
    if ignored:
        notes += (f"{', '.join(ignored)}: PEFT's untouched originals of modules that are saved whole, left aside",)
    verdicts = LORA if is_lora else VERA
    return ParsedAdapter(*from_peft(tensors, {**settings, **unsaid}), (*notes, *verdicts.describe_unknown(settings)))


def _unwrap_whole(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Modules saved whole by their own names, and the modules of which an untouched original was there too."""
    wrapped = {key: match for key in tensors if (match := _WRAPPED_WHOLE.fullmatch(key))}
    trained = {f"{m[1]}.{m[3]}": tensors[key] for key, m in wrapped.items() if m[2] == "modules_to_save"}
    originals = {f"{m[1]}.{m[3]}": tensors[key] for key, m in wrapped.items() if m[2] == "original_module"}
    plain = {key: tensor for key, tensor in tensors.items() if key not in wrapped}
    names = sorted({key.removeprefix(_PEFT_PREFIX).rpartition(".")[0] for key in originals.keys() & trained.keys()})
    return {**originals, **plain, **trained}, names


def write(config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter as PEFT writes it, and all our settings for doralib_config.json.

    A magnitude stands there by two keys: PEFT 0.10 knows the first alone, transformers' own reader the second alone,
    and each drops the other in silence.
    """
    tensors, settings = to_peft(config, state, hints.modules)
    if settings["peft_type"] == "LORA":
        twins = {f"{key}.weight": tensor for key, tensor in tensors.items() if key.endswith(f".{MAGNITUDE}")}
        tensors |= {key: tensor.clone() for key, tensor in twins.items()}
    return RawAdapter(tensors, settings, own=config.model_dump(mode="json"))


def from_peft(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[DoraConfig, AdapterState]:
    """PEFT's ``adapter_model.safetensors`` and ``adapter_config.json`` as ours.

    Settings that we do not know are PEFT's own business and are taken; tensors that we do not know are not. Dropout
    goes on in the "exact" mode, which is PEFT's.

    Raises:
        DoraError: listing every missing, extra and ill-shaped tensor.
    """
    if settings.get("peft_type") in TYPES:
        return from_vera(tensors, settings)
    config = _read_config(settings)
    rows, resized, rest = _take_rows(tensors, settings)
    parts: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, set[str]] = {}
    extra: dict[str, Tensor] = {}
    problems = []
    for key, tensor in rest.items():
        name = key.removeprefix(_PEFT_PREFIX)
        if match := _PEFT_LAYER.fullmatch(name):
            field, kind = _MEANINGS[match[2]]
            parts.setdefault(match[1], {})[field] = tensor
            kinds.setdefault(match[1], set()).update({kind} - {""})
        elif _is_extra(name, config) or name.split(".")[-2:-1] in ([each] for each in _VOCABULARY):
            extra[name.replace(".base_layer.", ".")] = tensor
        elif name.endswith(_FROZEN_COPY) and _has_factors(key.removesuffix(_FROZEN_COPY), tensors):
            # the untouched weight of an adapted embedding or head; of use where the vocabulary was resized
            resized[name.replace(".base_layer.", ".")] = tensor
        else:
            problems.append(f"{key} {tuple(tensor.shape)}: not a tensor of a DoRA or LoRA adapter")
    layers = _read_layers(parts, kinds, config, problems)
    if not (layers or extra or rows or problems):
        problems.append("the file holds no tensor at all")
    raise_problems("adapter", problems)
    config = config.model_copy(update=_name_vocabulary(config, extra, rows))
    if settings.get("layers_to_transform") is not None:
        config = config.model_copy(update={"target_modules": tuple(sorted(layers))})
    if any(layer.kind == "token_embedding" for layer in layers.values()):
        config = config.model_copy(update={"embedding_axis": "token"})
    task = settings.get("task_type") if settings.get("task_type") in _TASKS else None
    return config, AdapterState(layers, extra, settings.get("base_model_name_or_path"), rows, resized, task)


def _take_rows(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[dict[str, RowValues], dict[str, Tensor], dict[str, Tensor]]:
    """Tokens trained one by one, the frozen weights that PEFT wrote with them, and all other tensors.

    Raises:
        DoraError: if the settings do not say which tokens they are.
    """
    asked = settings.get("trainable_token_indices") or settings.get("token_indices") or []
    rows: dict[str, RowValues] = {}
    resized: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PEFT_PREFIX)
        if match := _ROWS.fullmatch(name):
            module = match[1]
            mine = asked
            if isinstance(asked, dict):
                ends = [end for end in asked if module == end or module.endswith(f".{end}")]
                mine = asked[ends[0]] if ends else []
            if len(mine) != len(tensor):
                raise DoraError(f"{key}: {len(tensor)} trained tokens, and the settings name {len(mine)} of them")
            rows[f"{module}.weight"] = RowValues(torch.tensor(mine), tensor)
        elif name.endswith(_ROWS_FROZEN):
            resized[name.removesuffix(_ROWS_FROZEN) + ".weight"] = tensor
        else:
            rest[key] = tensor
    return rows, resized, rest


def _name_vocabulary(config: DoraConfig, extra: Mapping[str, Tensor], rows: Mapping[str, RowValues]) -> dict[str, Any]:
    """The settings that make a place for embeddings and heads that came whole or by the token."""
    whole = [name.removesuffix(".weight") for name in extra if not _is_extra(name, config)]
    tokens = {name.removesuffix(".weight"): tuple(each.index_N.tolist()) for name, each in rows.items()}
    return {"modules_to_save": (*config.modules_to_save, *whole), "trainable_token_indices": tokens or ()}


def to_peft(
    config: DoraConfig, state: AdapterState, modules: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our adapter as PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        modules: Names of all modules of the base model, if it is at hand.
    """
    targets = _make_target_modules(config, state, modules)
    if config.has_bank:
        return to_vera(config, state, targets)
    stacks = {name: adapter for name, adapter in state.layers.items() if adapter.kind == "experts"}
    tensors = {f"{_PEFT_PREFIX}{key}": tensor for key, tensor in experts.to_tensors(stacks).items()}
    for layer, adapter in state.layers.items():
        if layer in stacks:
            continue
        tensors |= {f"{_PEFT_PREFIX}{layer}.{key}": tensor for key, tensor in _write_layer(adapter).items()}
    for name, tensor in state.extra.items():
        module, _, field = name.rpartition(".")
        # PEFT keeps the bias of a layer it adapted under the wrapped layer's name
        inner = ".base_layer" if module in state.layers else ""
        tensors[f"{_PEFT_PREFIX}{module}{inner}.{field}"] = tensor
    for name, rows in state.rows.items():
        tensors[f"{_PEFT_PREFIX}{name.removesuffix('.weight')}{_ROWS_KEY}"] = rows.rows_ND
    for name, tensor in state.resized.items():
        ending = _FROZEN_COPY if name.removesuffix(".weight") in state.layers else _ROWS_FROZEN
        tensors[f"{_PEFT_PREFIX}{name.removesuffix('.weight')}{ending}"] = tensor
    tokens = {name.removesuffix(".weight"): rows.index_N.tolist() for name, rows in state.rows.items()}
    settings: dict[str, Any] = {field: getattr(config, field) for field in SHARED}
    settings |= _make_patterns(config, state)
    named, revision = split_revision(state.base_model or "")
    settings |= {
        "peft_type": "LORA",
        "use_dora": config.method == "dora",
        "base_model_name_or_path": named or None,
        **({"revision": revision} if revision else {}),
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets,
        "modules_to_save": list(config.modules_to_save) or None,
        "task_type": state.task_type,
    }
    # an older PEFT refuses a field that it does not know, so these stand there only where they say something
    del settings["exclude_modules"], settings["target_parameters"]
    settings |= {"trainable_token_indices": tokens} if tokens else {}
    settings |= {"target_parameters": list(config.target_parameters)} if config.target_parameters else {}
    if settings["lora_alpha"] == int(settings["lora_alpha"]):
        settings["lora_alpha"] = int(settings["lora_alpha"])
    alone = {tuple(each) for each in tokens.values()}
    if len(alone) == 1 and not (state.layers or state.extra or state.resized):
        # PEFT's LoRA needs a layer
        tensors = {key.replace(_ROWS_KEY, _ROWS_ALONE): tensor for key, tensor in tensors.items()}
        settings = {name: settings[name] for name in ("base_model_name_or_path", "inference_mode", "task_type")}
        settings |= {
            "peft_type": "TRAINABLE_TOKENS",
            "token_indices": list(alone.pop()),
            "target_modules": list(tokens),
        }
    return tensors, settings


def shape_magnitude(layer: LayerAdapter) -> Tensor | None:
    """A layer's lengths in PEFT's shape: (O,), or (1, O, 1...) for a convolution."""
    shape = (1, -1, *(1 for _ in layer.kernel)) if layer.kernel else (-1,)
    return None if layer.m_O is None else layer.m_O.reshape(shape)


def _write_layer(adapter: LayerAdapter) -> dict[str, Tensor]:
    keys, m = _FACTORS_OF.get(adapter.kind, _FACTORS), shape_magnitude(adapter)
    tensors = {key: getattr(adapter, field) for field, key in keys.items()}
    if adapter.kind == "token_embedding":
        tensors = dict(zip(_FACTORS_OF["embedding"].values(), (adapter.b_OR.T, adapter.a_RI.T), strict=True))
        m = None if m is None else m[:, None]
    return tensors if m is None else {**tensors, MAGNITUDE: m}


def _make_patterns(config: DoraConfig, state: AdapterState) -> dict[str, dict[str, float]]:
    """rank_pattern and alpha_pattern as the tensors are, whatever the settings say; the first that fits a layer counts.

    Magnitudes alone have rank 1, fused projections the ranks of all their parts together, at the scale of each.
    """
    ranks = {name: layer.rank for name, layer in state.layers.items() if layer.rank != config.rank_of(name)}
    fused = {name: layer for name, layer in state.layers.items() if isinstance(layer.values, FusedValues)}
    alphas = {
        name: layer.scale * math.sqrt(layer.rank) if config.use_rslora else compute_alpha(layer)
        for name, layer in fused.items()
    }
    kept = {name: r for name, r in config.rank_pattern.items() if name not in ranks}
    return {
        "rank_pattern": {**ranks, **kept},
        "alpha_pattern": {**alphas, **{name: a for name, a in config.alpha_pattern.items() if name not in alphas}},
    }


def _read_config(settings: Mapping[str, Any]) -> DoraConfig:
    if (kind := settings.get("peft_type", "LORA")) == "TRAINABLE_TOKENS":
        return DoraConfig(method="lora", dropout_mode="exact", target_modules=None)
    if kind != "LORA":
        raise DoraError(f"adapter: peft_type is {kind!r}; only LORA adapters, with or without use_dora, are read")
    LORA.check(settings)
    values = take_shared(settings)
    if not values.get("target_modules") and not values.get("target_parameters"):
        values.pop("target_modules", None)
    method = "dora" if settings.get("use_dora") else "lora"
    return DoraConfig(method=method, dropout_mode="exact", **values)


def _read_layers(
    parts: Mapping[str, dict[str, Tensor]], kinds: Mapping[str, set[str]], config: DoraConfig, problems: list[str]
) -> dict[str, LayerAdapter]:
    """Make every layer that can be made, and add a line to ``problems`` for each that cannot."""
    stacks, unnamed = experts.find_names(parts, config)
    problems += unnamed
    layers: dict[str, LayerAdapter] = {}
    for key, found in parts.items():
        layer, kind = stacks.get(key, key), "experts" if key in stacks else "".join(sorted(kinds[key]))
        try:
            layers[layer] = _read_layer(layer, found, kind, config)
        except DoraError as error:
            problems.append(f"{layer}: {error}")
    if len({layer.kind for layer in layers.values() if layer.kind.endswith("embedding")}) > 1:
        problems.append("some embeddings have a length for each token and others for each dimension")
    return layers


def _read_layer(layer: str, found: dict[str, Tensor], kind: str, config: DoraConfig) -> LayerAdapter:
    if kind == "experts":
        return experts.read_stack(found, config, layer)
    keys = _FACTORS_OF.get(kind, _FACTORS)
    check_complete(found, keys, config)
    check_factors(lora_A=found["a_RI"], lora_B=found["b_OR"])
    a, b, m = found["a_RI"], found["b_OR"], found.get("m_O")
    if a.shape[0] != config.rank_of(layer):
        raise DoraError(f"lora_A has rank {a.shape[0]}, the settings say {config.rank_of(layer)}")
    if kind == "embedding" and m is not None and m.dim() == 2:
        # (V, 1): what PEFT has no word for, and refuses by its shape
        return LayerAdapter(b.T, a.T, m.flatten(), config.scale_of(layer), "token_embedding")
    if a.dim() > 2:
        _check_groups(a, b)
        m = m.flatten() if m is not None and m.numel() == b.shape[0] else m
    return LayerAdapter(a, b, m, config.scale_of(layer), kind)


def _has_factors(layer: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(f"{layer}.{keys['a_RI']}" in tensors for keys in (_FACTORS, *_FACTORS_OF.values()))


def _check_groups(a: Tensor, b: Tensor) -> None:
    """Refuse PEFT's adapter of a grouped convolution.

    There PEFT's A mixes all inputs, and its norms are those of a weight that this is no change of.
    """
    if b.dim() == a.dim() and a.shape[0] != b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise DoraError(
            f"is PEFT's adapter of a grouped convolution (A {tuple(a.shape)}, B {tuple(b.shape)}): it mixes channels "
            "across groups, so it is no change of the grouped weight and cannot be merged; train it anew with doralib"
        )


def _is_extra(name: str, config: DoraConfig) -> bool:
    """Whether a name is a bias that was trained, or a tensor of a module saved whole."""
    if name.endswith(".bias") and config.bias != "none":
        return True
    parents = name.split(".")[:-1]
    return any(
        ".".join(parents[:i]).endswith(module) for module in config.modules_to_save for i in range(1, 1 + len(parents))
    )


def _make_target_modules(config: DoraConfig, state: AdapterState, modules: Collection[str]) -> list[str] | str:
    """What PEFT takes for the adapted layers and for no other module of the model.

    That is the settings' own endings or expression where they say no more than was adapted, else whole names; and one
    expression of whole names where one of these is the ending of another module's.
    """
    adapted = {name for name, layer in state.layers.items() if layer.kind != "experts"}
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        if not modules or {name for name in modules if fits_whole(targets, name)} == adapted:
            alone = [re.escape(name) for name in sorted(adapted) if not fits_whole(targets, name)]
            return "|".join([f"(?:{targets})", *alone]) if alone else targets
        targets = None
    if not isinstance(targets, tuple):
        # without the model nobody knows what else has an ending
        targets = tuple({name.rpartition(".")[2] for name in adapted}) if modules else ()
    others = set(modules) - adapted
    if config.exclude_modules is not None and not modules:
        targets = ()
    chosen = {target for target in targets if not _names_any(target, others)}
    chosen |= {name for name in adapted if not any(_names_any(target, [name]) for target in chosen)}
    if any(_names_any(name, others) for name in chosen):
        return "|".join(map(re.escape, sorted(adapted)))
    return sorted(chosen)


def _names_any(target: str, modules: Collection[str]) -> bool:
    """Whether a target means one of these modules, as PEFT matches them."""
    return any(name == target or name.endswith(f".{target}") for name in modules)


FORMAT = Format(
    "peft",
    "PEFT",
    detect,
    read,
    write,
    settings_file=SETTINGS_FILE,
    keeps=("lora_dropout", "base_model"),
    dropout_mode="exact",
    methods=("dora", "lora", "dvora", "vera"),
    own_settings=True,
)
