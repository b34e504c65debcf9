"""Quantised weights that can be read and written again: bitsandbytes' 4 and 8 bits, torchao's tensors.

Found by dotted type name; neither package is imported before a module of it is there. A weight is made dense by blocks
of rows, or whole, when it is asked for, and never kept.
"""

import torch
from torch import Tensor, nn

from .base import Storage
from .bitsandbytes import Bits4, Bits8
from .torchao import TorchAO, is_torchao


def find_storage(module: nn.Module) -> Storage | None:
    """How this layer's weight is quantised, or None where it is not, or in a way that is not known here."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or "forward" in module.__dict__:
        return None
    for cls in type(module).__mro__:
        storage = _LAYERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if storage is not None:
            own_call = getattr(type(module), "forward", None) is not getattr(cls, "forward", None)
            known = storage is not TorchAO or is_torchao(weight)
            floating = storage is Bits8 and weight.dtype != torch.int8
            return storage(module) if known and not own_call and not floating else None
    return None


def keep_readable(model: nn.Module) -> None:
    """Stop every quantised layer of a model, adapted or not, from changing its own storage under a gradient's feet."""
    for module in model.modules():
        storage = find_storage(module)
        if storage is not None:
            storage.keep_readable()


_LAYERS: dict[str, type[Storage]] = {
    "bitsandbytes.nn.modules.Linear4bit": Bits4,
    "bitsandbytes.nn.modules.Linear8bitLt": Bits8,
    "torch.nn.modules.linear.Linear": TorchAO,
}
