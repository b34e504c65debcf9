"""A model shared out over processes by FSDP2, each holding a part of every weight; its state as one process has it.

The Trainer is told that the model has been shared out already, as those that transformers itself loads so: it wraps
nothing, and what it would not save is gathered here, in the form of a run in one process.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.fsdp import as_placed, whole_tensor
from ..checkpoints.models import load_config
from ..errors import UsageError
from ..recipe import Recipe
from .distributed import is_distributed, is_main
from .plan.skeleton import find_blocks

log = logging.getLogger(__name__)

_LAUNCHER = "ACCELERATE_USE_FSDP"


def take_over_launcher(recipe: Recipe) -> Recipe:
    """The recipe with what `accelerate launch` says of FSDP, which accelerate itself is kept from doing then.

    Raises:
        UsageError: if the recipe asks for another strategy.
    """
    if os.environ.get(_LAUNCHER, "false").lower() not in ("1", "true"):
        return recipe
    settings = recipe.distributed
    if settings.strategy not in ("launcher", "fsdp2"):
        raise UsageError(
            f"distributed.strategy: the recipe says {settings.strategy}, and the launcher FSDP; leave one of them out"
        )
    os.environ[_LAUNCHER] = "false"
    offload = settings.cpu_offload or os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    given = settings.model_copy(update={"strategy": "fsdp2", "cpu_offload": offload})
    return recipe.model_copy(update={"distributed": given})


def is_shared_out(recipe: Recipe) -> bool:
    """Whether each process is to hold a part of the model; never where there is one."""
    return recipe.distributed.strategy == "fsdp2" and is_distributed()


def waits_for_weights(recipe: Recipe) -> bool:
    """Whether this process gets its share of the weights from the first one, which alone reads them.

    Quantized weights are more than a tensor each, so that every process reads them.
    """
    return reads_once(recipe) and not is_main()


def reads_once(recipe: Recipe) -> bool:
    """Whether the first process alone reads the model."""
    settings = recipe.model
    if not is_shared_out(recipe) or settings.quantization is not None:
        return False
    return getattr(load_config(settings), "quantization_config", None) is None


def share_out(model: nn.Module, recipe: Recipe, device: torch.device, *, from_first: bool = False) -> None:
    """Let each process keep its part of every parameter of an adapted model, block by block.

    Args:
        from_first: The first process alone has values, and gives the others their parts; theirs are on the device meta.
    """
    # a second that only those pay who train so
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard  # noqa: PLC0415

    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),))}
    place = device.type
    if recipe.distributed.cpu_offload and device.type != "cpu":
        options["offload_policy"], place = CPUOffloadPolicy(), "cpu"
    # detached: what moves to a GPU there to be cut stays here
    whole = {name: p.detach() for name, p in model.named_parameters()} if from_first else {}
    made: list[Any] = [fully_shard(each, **options) for each in (*(find_blocks(model)[1] or ()), model)]
    if from_first:
        _hand_out(model, whole, place)
    for each in made:
        # what the first pass makes is kept: if that were a scoring one, in inference mode, no step could write to it
        each.unshard()
        each.reshard()


@torch.no_grad()
def _hand_out(model: nn.Module, whole: dict[str, Tensor], place: str) -> None:
    """Give every process its part of the first one's parameters, a tensor at a time, and its buffers."""
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    # before tied ones come apart on the way from meta, which the first pass mends
    names = [name for name, _ in model.named_parameters()]
    if not is_main():
        model.to_empty(device=place)
    for name in names:
        part: Any = model.get_parameter(name)
        device = part.device_mesh.device_type
        value = whole.pop(name).to(device) if is_main() else torch.empty(part.shape, dtype=part.dtype, device=device)
        part.to_local().copy_(distribute_tensor(value, part.device_mesh, part.placements).to_local())
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)


def gather_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of shared out parameters, whole; every process takes part."""
    return _map_state(optimizer.state_dict(), lambda _, t: whole_tensor(t).cpu())


def scatter_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer of shared out parameters a state that is whole, of any number of processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def place(number: int, t: Tensor) -> Tensor:
        p = parameters[number]
        return as_placed(t, p) if t.shape == p.shape else t

    optimizer.load_state_dict(_map_state(state, place))


def _map_state(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    kept = {
        number: {name: change(number, value) if isinstance(value, Tensor) else value for name, value in each.items()}
        for number, each in state["state"].items()
    }
    return {**state, "state": kept}
