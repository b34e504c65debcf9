"""What a frozen layer can do, one short class per storage, found by dotted type name.

Every one is a linear map of rows: a convolution's rows are its output channels, an embedding's its dimensions.

An adapter needs a base's shape, its product with an input and, for merging, its dense weight. A storage that nobody
registered still trains, through its own module call (`Opaque`).
"""

import torch
from torch import Tensor, nn

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

    The nearest registered ancestor wins, unless the class below it computes in its own way: then the layer's weight
    need not be what its product says, and it is `Opaque`, or None where the layer is not linear.
    """
    quantized = find_storage(module)
    if quantized is not None:
        return Quantized(module, quantized)
    for cls in type(module).__mro__:
        storage = STORAGES.get(f"{cls.__module__}.{cls.__qualname__}")
        if storage is not None:
            own_call = any(
                getattr(type(module), call, None) is not getattr(cls, call, None) or call in module.__dict__
                for call in ("forward", "_conv_forward")
            )
            weight = getattr(module, "weight", None)
            plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[union-attr]
            if plain and (not own_call or (storage is Embedding and _only_scales(module))):
                return storage(module)
            return Opaque(module) if storage.kind == "linear" else None
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Opaque(module)
    return None


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
