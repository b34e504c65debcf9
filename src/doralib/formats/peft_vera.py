"""PEFT's VeRA, and DVoRA in the same tensors with a magnitude, which PEFT does not know and refuses by its name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError, list_some, raise_problems
from ..peft_settings import VERA, sort_names
from ..state import MAGNITUDE, AdapterState, BankValues, LayerAdapter
from .tensors import check_factors

TYPES = {"VERA": "vera", "DVORA": "dvora"}
_PREFIX = "base_model.model."
_BANK = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
_FIELDS = {"vera_lambda_d": "d_R", "vera_lambda_b": "b_O", MAGNITUDE: "m_O"}
_SHARED = ("r", "target_modules", "exclude_modules", "d_initial", "projection_prng_key")


def from_vera(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[DoraConfig, AdapterState]:
    """An adapter of random matrices shared by all layers; each is as wide as the widest until it meets its weight.

    Raises:
        DoraError: listing every missing and extra tensor.
    """
    method = TYPES[settings["peft_type"]]
    VERA.check(settings)
    if absent := [key for key in _BANK if key not in tensors]:
        raise DoraError(f"adapter: lacks {', '.join(absent)}; save it with save_projection")
    bank = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    check_factors(vera_A=bank[0], vera_B=bank[1])
    parts: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        layer, _, field = key.removeprefix(_PREFIX).rpartition(".")
        if key in _BANK:
            continue
        if field not in _FIELDS or (field == MAGNITUDE and method == "vera"):
            problems.append(f"{key} {tuple(tensor.shape)}: not a tensor of a {method} adapter")
        parts.setdefault(layer, {})[field] = tensor
        if tensor.dim() != 1:
            problems.append(f"{key} {tuple(tensor.shape)}: should have one axis")
    needed = list(_FIELDS)[: 3 if method == "dvora" else 2]
    problems += [f"{layer}: lacks {field}" for layer, part in parts.items() for field in needed if field not in part]
    raise_problems("adapter", problems)
    values = {field: settings[field] for field in _SHARED if settings.get(field) is not None}
    values |= sort_names(values)
    config = DoraConfig(method=method, lora_dropout=settings.get("vera_dropout") or 0.0, dropout_mode="exact", **values)
    layers = {
        name: LayerAdapter(
            values=BankValues(bank, part["vera_lambda_d"], part["vera_lambda_b"], part.get(MAGNITUDE), bank[0].shape[1])
        )
        for name, part in parts.items()
    }
    return config, AdapterState(layers, {}, settings.get("base_model_name_or_path"))


def to_vera(
    config: DoraConfig, state: AdapterState, targets: list[str] | str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our adapter as PEFT's tensors and settings.

    Raises:
        DoraError: for what these files have no place for.
    """
    tensors: dict[str, Tensor] = {}
    others = [name for name, layer in state.layers.items() if not isinstance(layer.values, BankValues)]
    if others or state.extra or state.rows:
        named = list_some([*others, *state.extra, *state.rows], 5, ", ")
        raise DoraError(f"{named}: a {config.method} adapter file has no place for it")
    for name, layer in state.layers.items():
        values = layer.values
        assert isinstance(values, BankValues)
        tensors |= dict(zip(_BANK, values.bank, strict=True))
        for key, field in _FIELDS.items():
            if (tensor := getattr(values, field)) is not None:
                tensors[f"{_PREFIX}{name}.{key}"] = tensor
    settings = {field: getattr(config, field) for field in ("r", "d_initial", "projection_prng_key")}
    settings |= {
        "peft_type": config.method.upper(),
        "vera_dropout": config.lora_dropout,
        "save_projection": True,
        "target_modules": targets,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": state.base_model,
        "task_type": None,
    }
    return tensors, settings
