"""What is known of a job before it begins: its rows, its steps, and the memory that it holds at least."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..recipe import Recipe
from .modality import Prepared

_BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8.1, "torchao-int8": 8.1, "torchao-float8": 8.1}
"""Of a quantized weight, with its scales."""
_STATES = {"adamw_torch_8bit": 2, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "adafactor": 1}
"""Bytes of the optimizer's state for each trained number; 8, two numbers in float32, elsewhere."""


@dataclass(frozen=True)
class Outlook:
    """A job that was checked and not begun."""

    recipe: Recipe
    """With the style that was found."""
    facts: Mapping[str, str]
    """What the job is, by a word for each, as a run says before it trains."""
    notes: tuple[str, ...]
    """Rows that are left out, cut or divided."""
    steps: int
    steps_an_epoch: int
    memory: Mapping[str, int]
    """Bytes that are held throughout, by what they hold; activations come on top."""
    data: Prepared


def estimate_memory(model: nn.Module, recipe: Recipe, optimizer: str) -> dict[str, int]:
    """Bytes of frozen weights, trained ones, their gradients and the optimizer's state, without activations.

    Args:
        model: Adapted; its weights need not be there.
        recipe: Says whether its linear layers will be quantized.
        optimizer: By the Trainer's name.
    """
    quantized = _name_quantized(model) if recipe.model.quantization else set()
    bits = _BITS.get(recipe.model.quantization or "", 0.0)
    frozen, trained = 0.0, 0
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained += parameter.nbytes
            count += parameter.numel()
        else:
            frozen += parameter.numel() * bits / 8 if name in quantized else parameter.nbytes
    states = count * _STATES.get(optimizer, 8)
    return {"frozen weights": round(frozen), "trained": trained, "gradients": trained, "optimizer": states}


def _name_quantized(model: nn.Module) -> set[str]:
    """The weights that bitsandbytes quantizes: of linear layers, but for the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
    return {f"{name}.weight" for name in layers}
