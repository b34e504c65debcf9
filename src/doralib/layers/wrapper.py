"""What every adapted layer is: a frozen module with trained parameters around it."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import functional as F
from ..errors import DoraError
from ..quantization import find_storage


class Masters(nn.Module):
    """Parameters that stay float32 whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay float32 masters when it is cast to a smaller dtype."""
        masters = {name: p.detach() for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype.itemsize < 4:
                p.data = masters[name].to(p.device)
        return self


class ReadsThrough(nn.Module):
    """An adapted layer of which model code reads more than weight and bias: stride, padding_idx, ..."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(original(self), name)


class TrainedCopy(nn.Module):
    """A module of `modules_to_save`: a copy that is trained, as float32 masters, beside the frozen original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        if names := [type(m).__name__ for m in original.modules() if find_storage(m) is not None]:
            raise DoraError(f"modules_to_save: a {names[0]} is quantised and cannot be trained whole; adapt it instead")
        self.base_layer = original.requires_grad_(False)
        self.trained = _master_copy(original)
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module would return, from the copy, computed in the original's dtype."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        originals = dict(self.base_layer.named_parameters())
        cast = {name: p.to(originals[name].dtype) for name, p in self.trained.named_parameters()}
        return torch.func.functional_call(self.trained, cast, args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the original with the trained values, cast once to its dtypes."""
        merged = copy.deepcopy(self.base_layer)
        for name, p in merged.named_parameters():
            p.copy_(self.trained.get_parameter(name))
        return merged

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained") if self.enabled else original(self), name)


def original(wrapper: nn.Module) -> nn.Module:
    """The frozen module of a wrapper, which is a child of it or, under `Switched`, of the place that it shares."""
    own = wrapper.__dict__
    held: nn.Module | None = own.get("base_layer", own.get("_modules", {}).get("base_layer"))
    if held is None:
        raise AttributeError(f"{type(wrapper).__name__} has no base_layer")
    return held


def _master_copy(original: nn.Module) -> nn.Module:
    trained = copy.deepcopy(original).requires_grad_(True)
    for p in trained.parameters():
        p.data = p.data.to(F.sum_dtype(p.dtype))
    return trained


def autocast(x: Tensor) -> Tensor:
    """An input in the dtype that autocast, where it is on, would give it."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has for x's device; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
