"""Adapters of a live model, read from files and written to them."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DoraConfig
from ..errors import DoraError, Note, UsageError
from ..formats import FORMATS
from ..formats.base import Hints
from ..formats.files import read_any_format, write_raw_adapter
from ..formats.pipeline import check_component, take_component
from ..layers.base.registry import open_base
from ..layers.magnitude import DoraMagnitude
from ..layers.multi_adapter import Switched, Wrapper
from ..layers.vera import other_banks
from ..layers.wrapper import original
from ..state import AdapterState, MovedAdapter
from .adapt import Model, _beside, _refuse_beside, _wrap, refuse_name
from .build import chosen_by_state, in_words, wrappers_for
from .fsdp import as_placed, gathered, writes
from .inference import forget
from .registry import (
    DEFAULT,
    adapter_of,
    as_own,
    config_of,
    listed,
    parts_of,
    plain,
    record_of,
    same_tensors,
    state_of,
    tensors_of,
)
from .scan import adaptable


def add_state(model: Model, adapter_name: str, config: DoraConfig, state: AdapterState, source: str) -> Model:
    """Put an adapter of given values on a plain model, or beside those that a model has.

    Args:
        source: Where it is from, for messages.
    """
    if not hasattr(model, "_doralib"):
        refuse_name(adapter_name)
        _wrap(model, config, *chosen_by_state(model, config, state, source), adapter_name)
    else:
        _refuse_beside(model, adapter_name, config)
        with plain(model):
            chosen, whole = chosen_by_state(model, config, state, source)
            wrappers, biases = wrappers_for(model, config, chosen, whole)
        _beside(model, adapter_name, config, wrappers, biases)
    load_into(model, state, adapter_name)
    return model


@torch.no_grad()
def load_into(model: nn.Module, state: AdapterState, adapter_name: str | None = None) -> None:
    """Copy an adapter's values into a model adapted in the same layers.

    Args:
        adapter_name: Which of the model's adapters takes them; None: the active one.

    Raises:
        DoraError: listing every layer that is missing, too many or of another shape; nothing is changed then.
    """
    name, _ = adapter_of(model, adapter_name)
    if (start := config_of(model, name)).moves_start and not any(
        isinstance(a, MovedAdapter) for a in state.layers.values()
    ):
        raise DoraError(
            f"this model's adapter began as a part of the weights (init_lora_weights: {start.init_lora_weights!r}); "
            "a file holds the change of the weights alone, of rank 2r: load it into a plain model"
        )
    into, layers = state_of(model, name), parts_of(model, name)
    state = as_own(layers, state)
    problems = same_tensors(into, state)
    problems += [
        f"{place}: turns its rows, but only their lengths are adapted in the model"
        for place, adapter in state.layers.items()
        if isinstance(layers.get(place), DoraMagnitude) and all(factor.any() for factor in adapter.factors)
    ]
    problems += [
        f"{place}: {in_words(adapter.kind)} in the adapter, {in_words(into.layers[place].kind)} in the model"
        for place, adapter in state.layers.items()
        if place in into.layers and adapter.kind != into.layers[place].kind
    ]
    problems += other_banks(into, state)
    if problems:
        raise listed("the adapter does not fit this model", sorted(problems))
    given = tensors_of(state)
    for key, tensor in tensors_of(into).items():
        tensor.copy_(as_placed(given[key], tensor))
    for place, adapter in state.layers.items():
        layers[place].scale = adapter.scale
    forget(model)


def save_adapter(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> None:
    """Write an adapter into a folder that PEFT reads as it is; each file is replaced whole or not at all.

    An adapter that started as a part of the weight is written as a change of the weight as it is, of rank 2r.
    Where parameters are shared out over processes (FSDP2), every process calls this and the first one writes.
    Besides PEFT's two files, ``doralib_config.json`` keeps what PEFT has no word for (dropout_mode, detach_norm).

    Args:
        adapter_name: None: the active one.
    """
    config, folder = config_of(model, adapter_name).in_files(), Path(path)
    if config.method == "full":
        raise UsageError("full fine-tuning has no adapter: save the model itself with model.save_pretrained(path)")
    peft = FORMATS["peft"]
    assert peft.write is not None
    state = gathered(state_of(model, adapter_name))
    if writes(model):
        write_raw_adapter(peft.write(config, state, Hints()), peft, folder, overwrite=True)


def read_adapter(
    path: str | Path, model: nn.Module | None = None, given: Hints | None = None
) -> tuple[DoraConfig, AdapterState]:
    """An adapter's file or folder, in any known format, as settings and state; what had to be assumed is a warning.

    Args:
        model: The base model, for formats that need its names or its heads.
        given: What else a file may not say: alpha, the part of a pipeline.

    Raises:
        UsageError: if there is no adapter, or its format needs to know more.
        DoraError: if its files are damaged or do not belong together.
    """
    given = given or Hints()
    _, found = read_any_format(path, given if model is None else _knowing(given, model))
    if given.component:
        check_component(found, given.component)
    found = take_component(found, given.component)
    for note in found.notes:
        warnings.warn(f"{path}: {note}", Note, stacklevel=3)
    return found.config, found.state


def _knowing(given: Hints, model: nn.Module) -> Hints:
    to_dict: Callable[[], dict[str, Any]] = getattr(getattr(model, "config", None), "to_dict", dict)
    shapes = {name: tuple(shape) for name, shape in adaptable(model).items()}
    return replace(given, shapes=shapes, config=to_dict(), lengths=partial(_lengths_in, model))


def _lengths_in(model: nn.Module, state: AdapterState) -> dict[str, Tensor]:
    """Length of each row of W + s B A by layer, (O,), of the layers that the model has."""
    modules, lengths = dict(model.named_modules()), {}
    for name in state.layers.keys() & modules.keys():
        module, layer = modules[name], state.layers[name]
        base = open_base(original(module) if isinstance(module, Wrapper | Switched) else module)
        if base is not None and base.row_shape == layer.shape:
            lengths[name] = base.adapted_row_norm(base.row_norm_sq(), *layer.factors, layer.scale)
    return lengths


def load_adapter(model: Model, path: str | Path, adapter_name: str | None = None, given: Hints | None = None) -> Model:
    """Adapt a plain model from the file's own settings, or fill a model that is adapted in the same layers.

    The file may be of any format that ``doralib convert`` reads; ``given`` is what it may not say.

    Args:
        adapter_name: A new name puts the adapter beside those that the model has; a known one, or None for the active
            adapter, fills it.

    Raises:
        DoraError: if the adapter belongs to another model: every name and shape that does not fit.
    """
    config, state = read_adapter(path, model, given)
    shapes = adaptable(model)
    narrowed = {name: layer.narrowed(shapes.get(name, ())) for name, layer in state.layers.items()}
    state = replace(state, layers=narrowed)
    if not hasattr(model, "_doralib") or (adapter_name is not None and adapter_name not in record_of(model).adapters):
        return add_state(model, adapter_name or DEFAULT, config, state, str(path))
    load_into(model, state, adapter_name)
    return model
