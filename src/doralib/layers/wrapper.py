"""What every adapted layer is: a frozen module with trained parameters around it, in the module's place."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import functional as F
from ..errors import DoraError
from ..quantization import find_storage
from ..state import AdapterState, BankValues, FusedValues, LayerAdapter, MovedValues, RowValues, Values, map_tensors


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


class Part(Masters, ABC):
    """What holds A, B and m, or other values in their place, of one layer or of one stack of weights."""

    scale: float
    kind: str
    """As in `LayerAdapter`."""
    lora_magnitude_vector: nn.Parameter | None

    @abstractmethod
    def values(self) -> Values:
        """What is trained: the parameters themselves."""

    def state(self) -> LayerAdapter:
        """The trained values; views, not copies."""
        return LayerAdapter(values=map_tensors(self.values(), Tensor.detach), scale=self.scale, kind=self.kind)

    def as_own(self, adapter: LayerAdapter) -> LayerAdapter:
        """Values from a file in the form that `state` gives them, so that each can be copied in its place.

        Raises:
            DoraError: if there is no place for some of them.
        """
        return adapter

    @abstractmethod
    def row_lengths(self) -> Tensor:
        """Of ``W + s B A`` as it is now, one for each of the lengths in m."""

    @torch.no_grad()
    def fill(self, given: LayerAdapter | None) -> None:
        """Take values that `find_misfits` lets in, or None: those with which the weight stays as it is.

        A smaller rank is filled up with zeros, and another scale is multiplied into B.
        """
        self.fill_factors(given)
        m_O, given_O = self.lora_magnitude_vector, None if given is None else given.tensors().get("m")
        if m_O is not None and given_O is not None:
            m_O.copy_(given_O)
        elif m_O is not None:
            n_O = self.row_lengths()
            # a row of length zero has an infinite norm there
            m_O.copy_(n_O.masked_fill(n_O.isinf(), 0))

    @abstractmethod
    def fill_factors(self, given: LayerAdapter | None) -> None:
        """`fill` for all but m."""

    def find_conflict(self, given: LayerAdapter) -> str:  # noqa: ARG002
        """Why values of this kind can never be put in here, or ""."""
        return ""

    def find_misfits(self, given: LayerAdapter) -> list[str]:
        """Why an adapter's values cannot take the place of these, a line each."""
        mine = self.state()
        if (given.kind, given.shape) != (mine.kind, mine.shape):
            return [f"{given.kind} {given.shape} in the adapter, {mine.kind} {mine.shape} in the model"]
        checks = {
            _NOT_OWN.get(type(mine.values), ""): type(given.values) is not type(mine.values),
            f"rank {given.rank} is larger than the loaded {mine.rank}; load the adapter of the larger rank first": (
                given.turns_rows and given.rank > mine.rank
            ),
            "has a magnitude, and the loaded adapter has none": given.m_O is not None and mine.m_O is None,
            self.find_conflict(given): True,
            "the loaded adapter began as a part of the weight (pissa, olora), and no other fits over that start": (
                isinstance(mine.values, MovedValues)
            ),
        }
        return [why for why, wrong in checks.items() if why and wrong]


_NOT_OWN: dict[type[Values], str] = {
    BankValues: "the random matrices of the loaded adapter are not its own",
    FusedValues: "is not of the parts of a fused projection that are adapted in the model",
}


class Place(nn.Module, ABC):
    """What stands where a frozen module was, with the layer of one adapter or of several.

    Methods have names that no module of a model is likely to have: model code reads a place as if it were the module.
    """

    enabled: bool
    """False: it computes what the frozen module computes."""

    @abstractmethod
    def adapter_layer(self, adapter_name: str | None) -> "AdapterLayer | None":
        """The layer of one of the model's adapters, if it has one here."""


class AdapterLayer(Place):
    """The layer of one adapter: a place of its own, or one of several under `MultiAdapter`."""

    trains_whole = False
    """Whether it trains a copy of the module, and no change of the weight."""

    def adapter_layer(self, adapter_name: str | None) -> "AdapterLayer":  # noqa: ARG002
        return self

    @abstractmethod
    def merged(self) -> nn.Module:
        """A plain module that computes what this layer does."""

    def adapter_parts(self, place: str) -> dict[str, Part]:  # noqa: ARG002
        """What holds A, B and m, by name in an adapter's state."""
        return {}

    def whole_tensors(self, place: str) -> dict[str, Tensor]:  # noqa: ARG002
        """What is trained whole, by name in the base model; views, not copies."""
        return {}

    def trained_rows(self, place: str) -> dict[str, RowValues]:  # noqa: ARG002
        """Rows that are trained one by one, by the tensor's name in the base model; views, not copies."""
        return {}

    def fill_from(self, state: AdapterState, place: str) -> None:
        """Copy another adapter's values in; what it does not have becomes the base model's."""
        for name, part in self.adapter_parts(place).items():
            part.fill(state.layers.get(name))


class AroundBase(nn.Module):
    """An adapted layer that changes the frozen layer's own output."""

    base_layer: nn.Module
    enabled: bool

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """What the base layer takes, and what it would return, in the same dtype."""
        y: Tensor = self.base_layer(x, *args)
        return self.around(y, x, *args) if self.enabled else y

    def around(self, y: Tensor, x: Tensor, *args: Any) -> Tensor:
        """As `forward`, from the base's own output y."""
        raise NotImplementedError


class ReadsThrough(nn.Module):
    """An adapted layer of which model code reads more than weight and bias: stride, padding_idx, ..."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(base_module(self), name)


class TrainedCopy(AdapterLayer):
    """A module of `modules_to_save`: a copy that is trained, as float32 masters, beside the frozen original."""

    trains_whole = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if names := [type(m).__name__ for m in base_layer.modules() if find_storage(m) is not None]:
            raise DoraError(f"modules_to_save: a {names[0]} is quantized and cannot be trained whole; adapt it instead")
        self.base_layer = base_layer.requires_grad_(False)
        self.trained = copy.deepcopy(base_layer).requires_grad_(True)
        for p in self.trained.parameters():
            p.data = p.data.to(F.sum_dtype(p.dtype))
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

    def whole_tensors(self, place: str) -> dict[str, Tensor]:
        return {f"{place}.{key}": p.detach() for key, p in self.trained.named_parameters()}

    @torch.no_grad()
    def fill_from(self, state: AdapterState, place: str) -> None:
        originals = dict(self.base_layer.named_parameters())
        for key, p in self.trained.named_parameters():
            p.copy_(state.extra.get(f"{place}.{key}", originals[key]))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained") if self.enabled else base_module(self), name)


def base_module(module: nn.Module) -> nn.Module:
    """The frozen module of a place (or of the `MultiAdapter` it is in); any other module itself."""
    if not isinstance(module, Place):
        return module
    own = module.__dict__
    found: nn.Module | None = own.get("base_layer", own.get("_modules", {}).get("base_layer"))
    if found is None:
        raise AttributeError(f"{type(module).__name__} has no base_layer")
    return found


def autocast(x: Tensor) -> Tensor:
    """An input in the dtype that autocast, where it is on, would give it."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has for x's device; None where it is off."""
    device = x.device.type
    on = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None
