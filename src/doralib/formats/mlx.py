"""MLX-LM: adapters.safetensors with A and B transposed, and the training arguments as adapter_config.json."""

from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError
from ..state import AdapterState, LayerAdapter
from .base import SETTINGS_FILE, Format, Hints, ParsedAdapter, RawAdapter
from .tensors import check_only_layers, group_by_layer, name_tensors, parse_layers, put_scale, unify_rank

_KEYS = {"a": "lora_a", "b": "lora_b", "m": "m"}


def detect(raw: RawAdapter) -> bool:
    """Whether it is MLX-LM's."""
    return any(key.endswith(".lora_a") for key in raw.tensors) or "fine_tune_type" in raw.settings


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """MLX-LM's adapter; alpha is its scale times the rank.

    Raises:
        DoraError: listing everything that does not belong.
    """
    kind = raw.settings.get("fine_tune_type", "lora")
    parameters = raw.settings.get("lora_parameters") or {}
    if not isinstance(parameters, dict) or not all(
        isinstance(parameters.get(key), int | float | None) for key in ("scale", "dropout")
    ):
        raise DoraError(f"lora_parameters of adapter_config.json should be numbers by name, found {parameters!r:.80}")
    scale = parameters.get("scale")
    problems = [] if kind in ("dora", "lora") else [f"fine_tune_type is {kind!r}, which is no adapter"]
    if scale is None and hints.alpha is None:
        problems.append("adapter_config.json says no lora_parameters.scale; give --alpha (scale x rank)")
    parts, unknown = group_by_layer(raw.tensors, _KEYS)
    problems += unknown + _find_contradictions(kind, parts)

    def layer(name: str, part: dict[str, Tensor]) -> LayerAdapter:
        s = scale if scale is not None else (hints.alpha or 0) / part["b"].shape[0]
        if _is_embedding(name, part):  # MLX's rows are tokens there, and so are ours
            return LayerAdapter(part["b"], part["a"], part["m"], float(s), "token_embedding")
        return LayerAdapter(part["a"].T.contiguous(), part["b"].T.contiguous(), part.get("m"), float(s))

    dropout, base = float(parameters.get("dropout") or 0.0), raw.settings.get("model")
    return parse_layers("the MLX adapter", parts, layer, _KEYS, problems, base_model=base, lora_dropout=dropout)


def write(config: DoraConfig, state: AdapterState, _hints: Hints) -> RawAdapter:
    """The adapter for MLX-LM, which has one rank and one scale for all layers; a layer's own scale goes into B.

    Raises:
        UsageError: if the ranks differ, or whole tensors were trained.
    """
    check_only_layers(state, "MLX", ("linear", "token_embedding"))
    rank, layers = unify_rank(state, "MLX")
    scale = next(iter(layers.values())).scale
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a_IR, b_RO = layer.a_RI.T, layer.b_OR.T
        if layer.kind == "token_embedding":
            a_IR, b_RO = layer.b_OR, layer.a_RI
        b_RO = put_scale(b_RO, layer.scale / scale)
        m_O = None if layer.m_O is None else layer.m_O.float()
        tensors |= name_tensors(name, _KEYS, a_IR.contiguous(), b_RO.contiguous(), m_O)
    settings: dict[str, Any] = {
        "fine_tune_type": "dora" if config.method == "dora" else "lora",
        "model": state.base_model,
        "num_layers": -1,  # all: a layer that the file does not name starts as the base's own
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": config.lora_dropout,
            "keys": sorted({_strip_block(name) for name in state.layers}),
        },
    }
    return RawAdapter(tensors, settings)


def _find_contradictions(kind: str, parts: dict[str, dict[str, Tensor]]) -> list[str]:
    with_m = sum("m" in part for part in parts.values())
    if kind == "dora" and not with_m:
        return ["fine_tune_type is 'dora', but there is not one magnitude (.m)"]
    if kind == "lora" and with_m:
        return [f"fine_tune_type is 'lora', but {with_m} layers have a magnitude (.m)"]
    return []


def _is_embedding(name: str, part: dict[str, Tensor]) -> bool:
    """Whether the magnitudes are those of tokens."""
    a_IR, b_RO, m = part["a"], part["b"], part.get("m")
    if a_IR.dim() != 2 or b_RO.dim() != 2 or m is None or m.dim() != 1:
        return False
    per_input, per_output = m.shape[0] == a_IR.shape[0], m.shape[0] == b_RO.shape[1]
    if per_input and per_output and "emb" in name.rpartition(".")[2]:
        raise DoraError("is square and named like an embedding: its magnitudes' axis is ambiguous")
    return per_input and not per_output


def _strip_block(name: str) -> str:
    """MLX's keys are names inside a block; a layer outside the blocks goes by its whole name."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


FORMAT = Format(
    "mlx", "MLX-LM", detect, read, write, "adapters.safetensors", SETTINGS_FILE, keeps=("lora_dropout", "base_model")
)
