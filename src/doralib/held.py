"""A promise that a model's adapter stays as it is for a while: nothing is compared then, call by call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from .layers import DoraLinear

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def unchanged(model: Model) -> Iterator[Model]:
    """Write faster, inside a with block in which nobody changes A, B, m, the weights or the biases.

    Without it every call makes sure of that by itself, which costs a generated token as much as the adapter's own
    products. What `load_adapter` and `hotswap_adapter` write inside the block is seen; an optimiser's step is not,
    until the block ends. Calls that want gradients compute as outside, and a model without an adapter does anyway.
    """
    layers = _layers(model)
    before = [layer.held for layer in layers]
    for layer in layers:
        layer.held = {}
    try:
        yield model
    finally:
        for layer, held in zip(layers, before, strict=True):
            layer.held = held


def forget(model: nn.Module) -> None:
    """What layers hold inside such a block is made anew at their next call."""
    for layer in _layers(model):
        if layer.held is not None:
            layer.held = {}


def _layers(model: nn.Module) -> list[DoraLinear]:
    return [module for module in model.modules() if isinstance(module, DoraLinear)]
