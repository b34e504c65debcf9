"""Models whose parameters are shared out over processes (FSDP2): saving, loading, and what is refused."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..state import AdapterState, LayerAdapter


def gathered(state: AdapterState) -> AdapterState:
    """The adapter with every tensor whole; every process takes part where one is shared out, and gets it."""
    layers = {name: _gathered_layer(layer) for name, layer in state.layers.items()}
    return replace(state, layers=layers, extra={name: _whole(t) for name, t in state.extra.items()})


def writes(model: nn.Module) -> bool:
    """Whether this process is the one that writes the model's files: every one, unless its parameters are shared out.

    Processes that each hold all of a model cannot be told from ones with models of their own.
    """
    return not is_sharded(model) or torch.distributed.get_rank() == 0


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is shared out."""
    return any(map(_is_shared_out, model.parameters()))


def refuse_sharded(model: nn.Module, what: str, instead: str) -> None:
    """Nothing, where each process holds all of the model.

    Raises:
        UsageError: otherwise, with what to do instead.
    """
    if is_sharded(model):
        raise UsageError(f"{what}: the model's parameters are shared out over processes (DTensor); {instead}")


def as_placed(value: Tensor, place: Tensor) -> Tensor:
    """A whole tensor that every process has, shared out like the place that it is to be copied to."""
    if not _is_shared_out(place):
        return value
    # half a second that only those pay who have imported it already
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    mesh, placements = place.device_mesh, place.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)


def _gathered_layer(layer: LayerAdapter) -> LayerAdapter:
    made = copy.copy(layer)
    for name, value in vars(layer).items():
        object.__setattr__(made, name, tuple(map(_whole, value)) if isinstance(value, tuple) else _whole(value))
    return made


def _whole(value: Any) -> Any:
    return value.full_tensor() if _is_shared_out(value) else value


def _is_shared_out(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")
