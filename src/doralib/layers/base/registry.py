"""What a frozen layer can do, one short class per storage, found by dotted type name.

Every one is a linear map of rows: a convolution's rows are its output channels, an embedding's its dimensions.

An adapter needs a base's shape, its product with an input and, for merging, its dense weight. A storage that nobody
registered still trains, through its own module call (`Opaque`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ...quantization import find_storage
from .convolution import Convolution, TransposedConvolution
from .embedding import Embedding
from .linear import Dense, Transposed
from .opaque import Opaque, Quantized

STORAGES: dict[str, type[Dense]] = {
    "torch.nn.modules.linear.Linear": Dense,
    "transformers.pytorch_utils.Conv1D": Transposed,
    "torch.nn.modules.sparse.Embedding": Embedding,
    **{f"torch.nn.modules.conv.Conv{n}d": Convolution for n in (1, 2, 3)},
    **{f"torch.nn.modules.conv.ConvTranspose{n}d": TransposedConvolution for n in (1, 2, 3)},
}


def open_base(module: nn.Module) -> Dense | None:
    """The storage of a layer that can be adapted, or None when the module is not one.

    The nearest registered ancestor wins, unless the class below it computes in its own way: then it is what it does to
    a few inputs (`_open_own_call`).
    """
    quantized = find_storage(module)
    if quantized is not None:
        return Quantized(module, quantized)
    for cls in type(module).__mro__:
        storage = STORAGES.get(_dotted_name(cls))
        if storage is not None:
            return None if _is_derived(module) else _open_registered(module, cls, storage)
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Opaque(module) if _is_linear(module) else None
    return None


def explain_refusal(module: nn.Module) -> str:
    """Why a module that looks like a layer, and that `open_base` does not take, cannot be adapted; "" for any other."""
    known = next((cls for cls in type(module).__mro__ if _dotted_name(cls) in STORAGES), None)
    name = type(module).__name__
    if _is_compressed(module):
        return "compressed-tensors keeps no weight before the model's first call: load it with " + (
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    if known is not None and _is_derived(module):
        made = ", ".join(_makers_of_weight(module))
        return f"its weight is no parameter, it is made anew from others ({made}): remove that first, or leave it out"
    if known is not None and type(module).forward is not known.forward:  # type: ignore[attr-defined]
        return f"{name} computes in its own way, which is not that of a {known.__name__}"
    if known is None and isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
        return f"{name} has in_features and out_features, but what it returns is not linear in what it is given"
    return ""


def _dotted_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _open_registered(module: nn.Module, cls: type[Any], storage: type[Dense]) -> Dense | None:
    calls = ("forward", "_conv_forward")
    own_call = any(getattr(type(module), call, None) is not getattr(cls, call, None) for call in calls)
    hooked = any(call in module.__dict__ for call in calls)
    weight = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[union-attr]
    if plain and not hooked and (not own_call or (storage is Embedding and _only_scales(module))):
        return storage(module)
    if storage.kind != "linear" or _is_compressed(module):
        return None
    if hooked or not plain:
        return Opaque(module)
    error = _measure_own_product(module)
    if storage is Dense and error <= max(1e-5, 4 * torch.finfo(module.weight.dtype).eps):  # type: ignore[arg-type]
        return Dense(module)
    # near its weight's product, as with numbers rounded on purpose; one that is far from it would be merged wrongly
    return Opaque(module) if error <= 0.2 else None


def _is_derived(module: nn.Module) -> bool:
    """Whether the weight is made from other parameters (weight_norm, spectral_norm, pruning, any parametrization)."""
    return "weight" not in module._parameters and bool(_makers_of_weight(module))


def _is_compressed(module: nn.Module) -> bool:
    """Whether compressed-tensors has taken the weight away until the whole model is called."""
    return hasattr(module, "quantization_status") and getattr(module, "weight", None) is None


def _makers_of_weight(module: nn.Module) -> list[str]:
    """What the weight is made by: parametrizations, or parameters that a hook reads before each call."""
    made_by = getattr(module, "parametrizations", {})
    if "weight" in made_by:
        return [type(each).__name__.lstrip("_") for each in made_by["weight"]]
    return [name for name in module._parameters if name.startswith("weight_")]


@torch.no_grad()
def _measure_own_product(module: nn.Module) -> float:
    """How far a layer's call is from ``x Wᵀ + bias``, relative, with values drawn for the purpose.

    The layer's own may be zero, or not what its call reads. Where the call is of another kind the distance is infinite.
    """
    weight: Any = module.weight
    drawn = {name: _draw(tuple(p.shape), weight) for name, p in module._parameters.items() if p is not None}
    x_NI = _draw((4, module.in_features), weight)
    try:
        y_NO = _call(module, x_NI, drawn)
    except Exception:  # noqa: BLE001  whatever a foreign module raises, it takes no rows
        return float("inf")
    if y_NO is None or y_NO.is_meta:
        return float("inf") if y_NO is None else 0.0
    wanted_NO = nnf.linear(x_NI, drawn["weight"], drawn.get("bias")).float()
    return float((y_NO.float() - wanted_NO).norm() / wanted_NO.norm())


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a layer whose weight is not known is roughly linear up to a bias; True if it cannot be called here."""
    opaque = Opaque(module)
    x_NI = _draw((4, opaque.shape[1]), torch.empty(0, dtype=opaque.dtype, device=opaque.device))
    x_NI[3] = x_NI[0] + x_NI[1] - x_NI[2]
    try:
        y_NO = _call(module, x_NI, {})
    except Exception:  # noqa: BLE001  a storage may be for another device
        return True
    if y_NO is None or y_NO.is_meta:
        return y_NO is not None
    wanted_O = y_NO[0] + y_NO[1] - y_NO[2]
    return float((y_NO[3] - wanted_O).float().norm()) <= 0.1 * float(y_NO.float().norm()) + 1e-6


def _draw(shape: tuple[Any, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


def _call(module: nn.Module, x_NI: Tensor, parameters: dict[str, Tensor]) -> Tensor | None:
    """What a module makes of a few rows, (N, O), or None where that is nothing of the kind."""
    training = module.training
    try:
        module.eval()
        y = torch.func.functional_call(module, parameters, (x_NI,))
    finally:
        module.train(training)
    return y if isinstance(y, Tensor) and y.shape == (len(x_NI), module.out_features) else None


def _only_scales(module: nn.Module) -> bool:
    """Whether an embedding with a call of its own is one of transformers' scaled ones, by what it does to a few."""
    factor, weight = Embedding(module).factor, module.weight.detach()  # type: ignore[operator]
    if factor is None or factor.numel() != 1:
        return False
    if weight.is_meta:
        return True
    tokens = torch.arange(min(8, len(weight)), device=weight.device)
    with torch.no_grad():
        return torch.allclose(module(tokens).float(), weight[: len(tokens)].float() * factor.float(), rtol=0.02)
