"""Adapters read from files onto a live model."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DoraConfig
from ..errors import DoraError, Note
from ..formats.base import Hints, ParsedAdapter
from ..formats.files import read_any_format
from ..formats.pipeline import check_component, find_component, spell_for_model, take_component
from ..layers.factors.bank import find_other_bank
from ..state import AdapterState, MovedValues
from .adapt import Model, check_beside, check_name, put_beside, put_first
from .build import choose_by_state, in_words
from .fsdp import as_placed
from .inference import forget
from .match import match_model
from .registry import (
    DEFAULT,
    adapter_of,
    as_own,
    config_of,
    error_of,
    find_differences,
    find_record,
    parts_of,
    state_of,
    tensors_of,
)
from .scan import Scan
from .vocabulary import fit_vocabulary


def add_state(found: Scan, adapter_name: str, config: DoraConfig, state: AdapterState, source: str) -> None:
    """Put an adapter of given values on a plain model, or beside those that a model has.

    Args:
        source: Where it is from, for messages.
    """
    model = found.model
    if find_record(model) is None:
        check_name(adapter_name)
        put = put_first
    else:
        check_beside(model, adapter_name, config)
        put = put_beside
    put(found, config, choose_by_state(found, config, state, source), adapter_name)
    adapter_of(model, adapter_name)[1].resized = tuple(name.removesuffix(".weight") for name in state.resized)
    load_into(model, state, adapter_name)


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
        isinstance(layer.values, MovedValues) for layer in state.layers.values()
    ):
        raise DoraError(
            f"this model's adapter began as a part of the weights (init_lora_weights: {start.init_lora_weights!r}); "
            "a file holds the change of the weights alone, of rank 2r: load it into a plain model"
        )
    into, parts = state_of(model, name), parts_of(model, name)
    state = as_own(parts, state)
    problems = find_differences(into, state)
    problems += [
        f"{place}: {why}"
        for place, adapter in state.layers.items()
        if place in parts and (why := parts[place].find_conflict(adapter))
    ]
    problems += [
        f"{place}: {in_words(adapter.kind)} in the adapter, {in_words(into.layers[place].kind)} in the model"
        for place, adapter in state.layers.items()
        if place in into.layers and adapter.kind != into.layers[place].kind
    ]
    problems += find_other_bank(into, state)
    if problems:
        raise error_of("the adapter does not fit this model", sorted(problems))
    given = tensors_of(state)
    for key, tensor in tensors_of(into).items():
        tensor.copy_(as_placed(given[key], tensor))
    for place, adapter in state.layers.items():
        parts[place].scale = adapter.scale
    forget(model)


def read_for_model(
    path: str | Path, found: Scan | None = None, given: Hints | None = None
) -> tuple[DoraConfig, AdapterState]:
    """An adapter's file or folder, in any known format, as settings and state; what had to be assumed is a warning.

    Args:
        found: The base model, for formats that need its names or its heads.
        given: What else a file may not say: alpha, the part of a pipeline.

    Raises:
        UsageError: if there is no adapter, or its format needs to know more.
        DoraError: if its files are damaged or do not belong together, or names may mean several layers of the model.
    """
    given = given or Hints()
    form, content = read_any_format(path, given if found is None else complete_hints(given, found))
    if given.component:
        check_component(content, given.component)
    if given.component or (form.pipelines and not _has_parts(found, content)):
        content = take_component(content, given.component)
    if found is not None:
        content = spell_for_model(content, found.shapes)
    for note in content.notes:
        warnings.warn(f"{path}: {note}", Note, stacklevel=3)
    return (content.config, content.state) if found is None else match_model(found, content.config, content.state)


def _has_parts(found: Scan | None, content: ParsedAdapter) -> bool:
    """Whether the model is one of all the parts of a pipeline that the adapter has layers of."""
    children = set() if found is None else {name for name, _ in found.model.named_children()}
    return {find_component(name) for name in content.state.layers} <= children


def complete_hints(given: Hints, found: Scan) -> Hints:
    """What a file may not say, with all that the base model says."""
    to_dict: Callable[[], dict[str, Any]] = getattr(getattr(found.model, "config", None), "to_dict", dict)
    return replace(given, shapes=found.shapes, config=to_dict(), lengths=partial(_lengths_in, found))


def _lengths_in(found: Scan, state: AdapterState) -> dict[str, Tensor]:
    """Length of each row of W + s B A by layer, (O,), of the layers that the model has."""
    return {
        name: base.adapted_row_norm(base.row_norm_sq(), *state.layers[name].factors, state.layers[name].scale)
        for name, base in found.bases.items()
        if name in state.layers and base.row_shape == state.layers[name].shape
    }


def load_adapter(model: Model, path: str | Path, adapter_name: str | None = None, given: Hints | None = None) -> Model:
    """Adapt a plain model from the file's own settings, or fill a model that is adapted in the same layers.

    The file may be of any format that ``doralib convert`` reads; ``given`` is what it may not say.

    Args:
        adapter_name: A new name puts the adapter beside those that the model has; a known one, or None for the active
            adapter, fills it.

    Raises:
        DoraError: if the adapter belongs to another model: every name and shape that does not fit.
    """
    found, record = Scan(model), find_record(model)
    config, state = read_for_model(path, found, given)
    if record is None or (adapter_name is not None and adapter_name not in record.adapters):
        found, state = fit_vocabulary(found, state, str(path))
        add_state(found, adapter_name or DEFAULT, config, state, str(path))
    else:
        load_into(model, state, adapter_name)
    return model
