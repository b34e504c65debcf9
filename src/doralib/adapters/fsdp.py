"""Models whose parameters are shared out over processes (FSDP2): saving, loading, and what is refused."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..state import AdapterState, map_tensors


def gather(state: AdapterState) -> AdapterState:
    """The adapter with every tensor whole; every process takes part where one is shared out, and gets it."""
    layers = {
        name: replace(layer, values=map_tensors(layer.values, whole_tensor)) for name, layer in state.layers.items()
    }
    rows = {name: replace(each, rows_ND=whole_tensor(each.rows_ND)) for name, each in state.rows.items()}
    extra, resized = ({name: whole_tensor(t) for name, t in each.items()} for each in (state.extra, state.resized))
    return replace(state, layers=layers, extra=extra, rows=rows, resized=resized)


def is_writer(model: nn.Module) -> bool:
    """Whether this process is the one that writes the model's files: every one, unless its parameters are shared out.

    Processes that each hold all of a model cannot be told from ones with models of their own.
    """
    return not is_sharded(model) or torch.distributed.get_rank() == 0


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is shared out."""
    return any(map(_is_shared_out, model.parameters()))


def check_unsharded(model: nn.Module, what: str, instead: str) -> None:
    """Check that each process holds all of the model.

    Raises:
        UsageError: if not, with what to do instead.
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


def whole_tensor(t: Tensor) -> Tensor:
    """A tensor that may be shared out, whole; every process takes part."""
    return t.full_tensor() if _is_shared_out(t) else t  # type: ignore[attr-defined]


def _is_shared_out(t: Tensor) -> bool:
    return hasattr(t, "device_mesh")
