"""Another adapter's values in the place of one that is loaded: a compiled model goes on without compiling again."""

from pathlib import Path

import torch
from torch import nn

from ..layers.factors.bank import find_other_bank
from ..state import AdapterState
from .adapt import Model
from .fsdp import check_unsharded
from .inference import forget
from .registry import adapter_of, as_own, bias_of, error_of, layers_of, parts_of, record_of, state_of
from .save_load import read_for_model
from .scan import Scan


def hotswap_adapter(model: Model, path: str | Path, adapter_name: str | None = None) -> Model:
    """Put the values of an adapter's file into an adapter that the model has; shapes and scales stay as they are.

    A smaller rank is filled up with zeros, and another scale is multiplied into B; LoRA goes into a DoRA layer with
    the length that makes its gain 1. Layers and modules that the file does not have become the base model's. Dropout
    and detach_norm stay the loaded adapter's own.

    Args:
        adapter_name: None: the active one.

    Raises:
        DoraError: everything that does not fit: layers that the loaded adapter does not have, a larger rank, magnitudes
            for LoRA layers. Nothing is changed then.
    """
    name, _ = adapter_of(model, adapter_name)
    check_unsharded(model, "hotswap_adapter", "doralib.load_adapter fills an adapter of the same ranks")
    _, state = read_for_model(path, Scan(model))
    parts, into = parts_of(model, name), state_of(model, name)
    state = as_own(parts, state)
    problems = [f"{key}: {name} has no such layer" for key in state.layers.keys() - into.layers.keys()]
    problems += [f"{key}: {name} has no such tensor" for key in state.extra.keys() - into.extra.keys()]
    problems += [
        f"{key}: {tuple(state.extra[key].shape)} in the adapter, {tuple(into.extra[key].shape)} in the model"
        for key in state.extra.keys() & into.extra.keys()
        if state.extra[key].shape != into.extra[key].shape
    ]
    for place in into.layers.keys() & state.layers.keys():
        problems += [f"{place}: {why}" for why in parts[place].find_misfits(state.layers[place])]
    problems += find_other_bank(into, state)
    if problems:
        raise error_of(f"{path} cannot take the place of {name}", sorted(problems))
    _copy(model, name, state)
    forget(model)
    return model


@torch.no_grad()
def _copy(model: nn.Module, name: str, state: AdapterState) -> None:
    record = record_of(model)
    for place, layer in layers_of(model, name).items():
        layer.fill_from(state, place)
    biases = record.adapters[name].biases
    for bias in biases:
        holder = bias_of(model, bias) if record.shown == name else biases[bias]
        holder.copy_(state.extra.get(bias, record.biases[bias]))
