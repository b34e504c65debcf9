"""How transformers quantizes a model while it loads it, or takes one that is stored quantized."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, CompressedTensorsConfig, PreTrainedConfig, TorchAoConfig

from ..errors import UsageError
from ..recipe import ModelSettings


def choose_quantization(settings: ModelSettings, where: str, options: Mapping[str, Any]) -> Any:
    """The `quantization_config` to load a model with; None where transformers finds out all by itself.

    Args:
        where: Folder or hub name, and options, as transformers gets them.

    Raises:
        UsageError: if a package is missing, or the model is stored quantized already.
    """
    stored = _find_stored(where, options)
    if settings.quantization is None:
        # its layers have no weight before the model's first call, and a dense one from then on
        return CompressedTensorsConfig(dequantize=True) if stored == "compressed-tensors" else None
    if stored is not None:
        raise UsageError(
            f"model.quantization: {settings.path} is stored quantized already ({stored}), and adapters train on it as "
            "it is: leave model.quantization out"
        )
    return make_quantization(settings)


def make_quantization(settings: ModelSettings) -> Any:
    """What quantizes a plain model as the settings say.

    Raises:
        UsageError: if the package is missing.
    """
    asked = str(settings.quantization)
    package = "torchao" if asked.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"model.quantization: {asked!r} needs {package}: pip install {package}")
    return _MAKE[asked](settings)


def _make_bits4(settings: ModelSettings) -> BitsAndBytesConfig:
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    kind = {"bnb_4bit_quant_type": settings.quantization, "bnb_4bit_use_double_quant": settings.double_quantization}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)


def _make_torchao(name: str) -> TorchAoConfig:
    return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


_MAKE: dict[str, Callable[[ModelSettings], Any]] = {
    "nf4": _make_bits4,
    "fp4": _make_bits4,
    "int8": lambda _: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda _: _make_torchao("Int8WeightOnlyConfig"),
    "torchao-float8": lambda _: _make_torchao("Float8WeightOnlyConfig"),
}


def _find_stored(where: str, options: Mapping[str, Any]) -> str | None:
    """The method by which a model is stored quantized, as its config says."""
    if "gguf_file" in options:
        return None
    said = PreTrainedConfig.get_config_dict(where, **options)[0].get("quantization_config") or {}
    if "quant_method" in said:
        return str(said["quant_method"])
    return "bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else None
