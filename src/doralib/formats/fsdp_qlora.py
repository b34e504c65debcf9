"""answer.ai's fsdp_qlora: model_state_dict.safetensors, the tensors of dora_layer and magnitude_layer; s = 1."""

from torch import Tensor

from ..config import DoraConfig
from ..errors import UsageError, raise_problems
from ..state import AdapterState, LayerAdapter
from .base import Hints, ParsedAdapter, RawAdapter, build_layers, check_only_layers, group_by_layer, make_config

_FIELDS = {"dora_layer.lora_A.weight": "a", "dora_layer.lora_B.weight": "b", "magnitude_layer.magnitude": "m"}
_KEYS = {field: key for key, field in _FIELDS.items()}


def detect(raw: RawAdapter) -> bool:
    """Whether it is fsdp_qlora's."""
    return any(".dora_layer." in key or ".magnitude_layer." in key for key in raw.tensors)


def read(raw: RawAdapter, _hints: Hints) -> ParsedAdapter:
    """fsdp_qlora's adapter; its layers add B A as it is, so alpha is the rank.

    Raises:
        DoraError: listing everything that does not belong.
    """
    # FSDP puts its wrapper's name into the path where a layer was a unit of its own
    plain = {key.replace("_fsdp_wrapped_module.", ""): tensor for key, tensor in raw.tensors.items()}
    parts, problems = group_by_layer(plain, _FIELDS)
    layers = build_layers(parts, _layer, _KEYS, problems)
    raise_problems("the fsdp_qlora adapter", problems)
    return ParsedAdapter(make_config(layers), AdapterState(layers))


def write(_config: DoraConfig, state: AdapterState, _hints: Hints) -> RawAdapter:
    """The adapter for fsdp_qlora, s folded into B.

    Raises:
        UsageError: for LoRA or whole tensors, which it has no place for.
    """
    check_only_layers(state, "fsdp_qlora")
    tensors: dict[str, Tensor] = {}
    for name, layer in state.layers.items():
        if layer.m_O is None:
            raise UsageError("fsdp_qlora's file is DoRA's; this adapter is LoRA")
        scaled = {"a": layer.a_RI, "b": layer.b_OR * layer.scale, "m": layer.m_O}
        tensors |= {f"{name}.{key}": scaled[field] for key, field in _FIELDS.items()}
    return RawAdapter(tensors)


def _layer(_name: str, part: dict[str, Tensor]) -> LayerAdapter:
    return LayerAdapter(part["a"], part["b"], part["m"].flatten(), 1.0)
