"""torchao's tensors inside ``nn.Linear``."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DoraError
from ..functional import Rows
from .base import Storage


class TorchAO(Storage):
    """An ``nn.Linear`` whose weight is a tensor of torchao's."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"torchao {type(self.module.weight).__name__}"

    @property
    def refuses_backward(self) -> str:  # type: ignore[override]
        weight = self.module.weight
        if any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization")):
            return (
                f"{self.name} quantizes its inputs, through which torchao passes no gradient or a wrong one; train on "
                "weight-only quantization, e.g. Int8WeightOnlyConfig"
            )
        return ""

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    @property
    def plain_dtype(self) -> torch.dtype | None:
        return self.dtype

    def rows(self) -> Rows:
        return dequantize_torchao(self.module.weight)

    def tensors(self) -> list[Tensor]:
        weight = self.module.weight
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]

    def quantize_again(self, W_OI: Tensor) -> nn.Module:
        weight = nn.Parameter(quantize_torchao(self.module.weight, W_OI), requires_grad=False)
        module = self._copy_with(weight)
        module.__dict__.pop("extra_repr", None)  # transformers': bound to the old layer
        return module


def dequantize_torchao(weight: Any) -> Tensor:
    """The whole weight as a plain tensor of the dtype it stands for."""
    weight = weight.detach()
    dense: Tensor = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
    return dense


def quantize_torchao(old: Any, W_OI: Tensor) -> Tensor:
    """Another weight in the settings of a torchao tensor, by way of the dtype that it stands for.

    Raises:
        DoraError: if it is of a class that is not known here.
    """
    make = _MAKE.get(type(old).__name__)
    if make is None:
        known = ", ".join(_MAKE)
        raise DoraError(
            f"torchao {type(old).__name__}: doralib does not know how to quantize into it (known: {known}); merge into "
            "plain weights: doralib.merge(model, dequantise=True), or --dtype on the command line"
        )
    return make(old.detach(), W_OI.to(old.dtype).contiguous())


def _int8(old: Any, W_OI: Tensor) -> Tensor:
    kinds = importlib.import_module("torchao.quantization").MappingType
    shifted = old.zero_point is not None and bool(old.zero_point.any())
    kept = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    return type(old).from_hp(
        W_OI,
        granularity=_find_granularity(old),
        mapping_type=kinds.ASYMMETRIC if shifted else kinds.SYMMETRIC,
        **{name: getattr(old, name, None) for name in kept},
    )


def _intx(old: Any, W_OI: Tensor) -> Tensor:
    kinds = importlib.import_module("torchao.quantization").MappingType
    return type(old).from_hp(
        W_OI,
        old.block_size,
        old.target_dtype,
        mapping_type=kinds.ASYMMETRIC if bool(old.zero_point.any()) else kinds.SYMMETRIC,
        activation_quantization=old.activation_quantization,
    )


def _float8(old: Any, W_OI: Tensor) -> Tensor:
    kept = ("mm_config", "kernel_preference", "act_quant_kwargs")
    settings = {name: getattr(old, name) for name in kept}
    new = type(old).from_hp(W_OI, old.qdata.dtype, _find_granularity(old), **settings)
    # torchao divides a row of zeros by its scale of zero
    empty = new.scale == 0
    new.scale.masked_fill_(empty, 1)
    new.qdata.view(torch.uint8).masked_fill_(empty.expand(new.qdata.shape), 0)
    return new


def _nf4(old: Any, W_OI: Tensor) -> Tensor:
    return type(old).from_tensor(W_OI, old.block_size, old.scaler_block_size)


_MAKE = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, "Float8Tensor": _float8, "NF4Tensor": _nf4}


def _find_granularity(old: Any) -> Any:
    known = importlib.import_module("torchao.quantization")
    rows, columns = old.block_size
    if (rows, columns) == tuple(old.shape):
        return known.PerTensor()
    return known.PerRow() if columns == old.shape[1] else known.PerGroup(columns)


def is_torchao(weight: Tensor) -> bool:
    """Whether a weight is a tensor of torchao's that can be read."""
    readable = hasattr(weight, "dequantize") or hasattr(weight, "get_original_weight")
    scaled = getattr(weight, "act_pre_scale", None) is not None  # then the product is not the weight's alone
    return type(weight).__module__.split(".")[0] == "torchao" and readable and not scaled
