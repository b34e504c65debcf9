"""A promise that a model's adapter stays as it is for a while: nothing is compared then, call by call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ..kernels.cache import Kept
from ..layers.linear import DoraLinear
from .fsdp import is_sharded

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def unchanged(model: Model) -> Iterator[Model]:
    """Write faster, inside a with block in which nobody changes A, B, m, the weights or the biases.

    Without it every call makes sure of that by itself, which costs a generated token as much as the adapter's own
    products. What `load_adapter` and `hotswap_adapter` write inside the block is seen; an optimiser's step is not,
    until the block ends. Calls that want gradients compute as outside; so does a model without an adapter, or a
    sharded one (FSDP2).
    """
    # FSDP2 frees what a layer holds between its calls
    kept = [] if is_sharded(model) else _kept(model)
    before = [each.held for each in kept]
    for each in kept:
        each.held = {}
    try:
        yield model
    finally:
        for each, held in zip(kept, before, strict=True):
            each.held = held


def forget(model: nn.Module) -> None:
    """What layers hold inside such a block is made anew at their next call."""
    for each in _kept(model):
        if each.held is not None:
            each.held = {}


def _kept(model: nn.Module) -> list[Kept]:
    return [module.kept for module in model.modules() if isinstance(module, DoraLinear)]
