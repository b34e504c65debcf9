"""How many bytes a frozen weight takes in its storage, and a stand-in for a quantized layer on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...recipe import ModelSettings


@dataclass(frozen=True)
class WeightStorage:
    """A way to hold the weights of linear layers."""

    name: str
    bits: float
    """Of one weight, with its share of the scales."""


def _scaled(name: str, bits: float, group: int, scale_bits: float = 16) -> WeightStorage:
    return WeightStorage(name, bits + scale_bits / group)


# scales of blocks of 64 in 8 bits, and theirs, of blocks of 256, in 32
_DOUBLE = 8 + 32 / 256
_BY_RECIPE = {
    "nf4": _scaled("nf4", 4, 64, _DOUBLE),
    "fp4": _scaled("fp4", 4, 64, _DOUBLE),
    "int8": WeightStorage("int8", 8),
    "torchao-int8": WeightStorage("torchao-int8", 8),
    "torchao-float8": WeightStorage("torchao-float8", 8),
}


def find_storage_of(settings: ModelSettings, config: Any) -> WeightStorage | None:
    """How the linear layers are quantized: as the recipe says, or as the checkpoint is; None: not at all."""
    if settings.quantization is not None:
        if not getattr(settings, "double_quantization", True) and settings.quantization in ("nf4", "fp4"):
            return _scaled(settings.quantization, 4, 64, 32)
        return _BY_RECIPE[settings.quantization]
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    told = given if isinstance(given, dict) else given.to_dict()
    method = str(told.get("quant_method", ""))
    if told.get("load_in_4bit"):
        return _BY_RECIPE["nf4"]
    bits = told.get("bits") or told.get("w_bit") or told.get("nbits") or 8
    if method == "compressed-tensors":
        groups = told.get("config_groups") or {}
        weights = next((group.get("weights") or {} for group in groups.values()), {})
        bits = weights.get("num_bits", 8)
    group = told.get("group_size") or told.get("q_group_size") or 128
    # a scale and a zero point for each group
    return _scaled(method or "quantized", float(bits), max(int(group), 32), 16 + float(bits))


class StoredLinear(nn.Module):
    """A frozen linear layer in another storage, (O, I): its bytes, and those that a product with it takes."""

    def __init__(self, layer: nn.Linear, storage: WeightStorage) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = (
            layer.in_features,
            layer.out_features,
            layer.weight.dtype,
        )
        self.count = layer.weight.numel()
        packed = torch.empty(round(self.count * storage.bits / 8), dtype=torch.uint8, device="meta")
        self.register_buffer("packed", packed)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + bias``, (..., I) to (..., O)."""
        y: Tensor = _Product.apply(x, self.out_features, self.count)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """Both passes make the weight dense, and keep nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, count: int) -> Tensor:
        ctx.shape, ctx.count = x.shape, count
        x.new_empty(count)
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy.new_empty(ctx.count)
        return dy.new_empty(ctx.shape), None, None


def replace_quantized(model: nn.Module, storage: WeightStorage | None) -> None:
    """Put stand-ins in the place of the layers that would be quantized: all linear ones but the heads."""
    if storage is None:
        return
    heads = ("lm_head", "score", "classifier", "embed_out")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in heads:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, StoredLinear(module, storage))
