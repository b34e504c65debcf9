"""A promise that a model's adapter stays as it is for a while: nothing is compared then, call by call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ..kernels.cache import LayerCache
from ..layers.layer import DoraLayer
from .fsdp import is_sharded

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def unchanged(model: Model) -> Iterator[Model]:
    """Write faster, inside a with block in which nobody changes A, B, m, the weights or the biases.

    Without it every call makes sure of that by itself, which costs a generated token as much as the adapter's own
    products. What `load_adapter` and `hotswap_adapter` write inside the block is seen; an optimizer's step is not,
    until the block ends. Calls that want gradients compute as outside; so does a model without an adapter, or a
    sharded one (FSDP2).
    """
    # FSDP2 frees what a layer holds between its calls
    caches = [] if is_sharded(model) else _caches(model)
    before = [cache.trusted for cache in caches]
    for cache in caches:
        cache.trusted = {}
    try:
        yield model
    finally:
        for cache, trusted in zip(caches, before, strict=True):
            cache.trusted = trusted


def forget(model: nn.Module) -> None:
    """What layers hold inside such a block is made anew at their next call."""
    for cache in _caches(model):
        if cache.trusted is not None:
            cache.trusted = {}


def _caches(model: nn.Module) -> list[LayerCache]:
    return [module.cache for module in model.modules() if isinstance(module, DoraLayer)]
