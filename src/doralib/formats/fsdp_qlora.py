"""answer.ai's fsdp_qlora: model_state_dict.safetensors, the tensors of dora_layer and magnitude_layer; s = 1."""

from torch import Tensor

from ..config import DoraConfig
from ..errors import UsageError
from ..state import AdapterState, LayerAdapter
from .base import Format, Hints, ParsedAdapter, RawAdapter
from .tensors import check_only_layers, group_by_layer, name_tensors, parse_layers, put_scale

_KEYS = {"a": "dora_layer.lora_A.weight", "b": "dora_layer.lora_B.weight", "m": "magnitude_layer.magnitude"}


def detect(raw: RawAdapter) -> bool:
    """Whether it is fsdp_qlora's."""
    return any(".dora_layer." in key or ".magnitude_layer." in key for key in raw.tensors)


def read(raw: RawAdapter, _hints: Hints) -> ParsedAdapter:
    """fsdp_qlora's adapter; its layers add B A as it is, so alpha is the rank.

    Raises:
        DoraError: listing everything that does not belong.
    """
    parts, problems = group_by_layer(raw.tensors, _KEYS)
    return parse_layers("the fsdp_qlora adapter", parts, _make_layer, _KEYS, problems)


def write(_config: DoraConfig, state: AdapterState, _hints: Hints) -> RawAdapter:
    """The adapter for fsdp_qlora; s goes into B.

    Raises:
        UsageError: for LoRA or whole tensors, which it has no place for.
    """
    check_only_layers(state, "fsdp_qlora")
    tensors: dict[str, Tensor] = {}
    for name, layer in state.layers.items():
        if layer.m_O is None:
            raise UsageError("fsdp_qlora's file is DoRA's; this adapter is LoRA")
        tensors |= name_tensors(name, _KEYS, layer.a_RI, put_scale(layer.b_OR, layer.scale), layer.m_O)
    return RawAdapter(tensors)


def _make_layer(_name: str, part: dict[str, Tensor]) -> LayerAdapter:
    return LayerAdapter(part["a"], part["b"], part["m"].flatten(), 1.0)


FORMAT = Format("fsdp-qlora", "fsdp_qlora", detect, read, write, "model_state_dict.safetensors", variant_of="peft")
