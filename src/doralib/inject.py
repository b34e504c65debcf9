"""Put adapters on a model in place, switch them, read and write them, take them off or fold them in."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .bank import other_banks
from .bases import open_base
from .config import DoraConfig
from .dequantised import Merging
from .errors import DoraError, Note, UsageError
from .formats import FORMATS, Given
from .formats.storage import one_part, read_any, refuse_component, write_content
from .held import forget
from .layers import original
from .live import (
    DEFAULT,
    Adapter,
    Record,
    adapter_of,
    as_own,
    bias_of,
    config_of,
    free_record_of,
    listed,
    make_switched,
    parts_of,
    plain,
    put,
    record_of,
    same_tensors,
    show_biases,
    show_the_right_biases,
    state_of,
    tensors_of,
    wrapped,
)
from .magnitudes import DoraMagnitude
from .sharded import as_placed, gathered, refuse_sharded, writes
from .state import AdapterState, MovedAdapter
from .switched import Switched, Wrapper
from .targets import adaptable, choose, matching
from .wrapping import chosen_by_config, chosen_by_state, in_words, wrappers_for

Model = TypeVar("Model", bound=nn.Module)


def adapt(model: Model, config: DoraConfig, adapter_name: str = DEFAULT) -> Model:
    """Wrap the target layers in place and freeze everything else; the model itself is returned.

    With method "full" nothing is wrapped: the targets' weights, or all, are set to train.

    Raises:
        UsageError: if a target is misspelt, tied, already adapted or not linear; all problems at once, and the model
            is left as it was.
    """
    if hasattr(model, "_doralib"):
        raise UsageError(
            "this model is adapted already; doralib.remove(model) takes the adapter off, and "
            "doralib.add_adapter(model, name, config) puts another beside it"
        )
    if config.method == "full":
        return _train_in_full(model, config)
    refuse_name(adapter_name)
    return _wrap(model, config, *chosen_by_config(model, config), adapter_name)


def add_adapter(model: Model, adapter_name: str, config: DoraConfig) -> Model:
    """Put a fresh adapter beside those that the model has; `set_adapter` makes it the active one.

    Raises:
        UsageError: as `adapt`, and if the name is taken; the model is left as it was.
    """
    _refuse_beside(model, adapter_name, config)
    with plain(model):
        chosen, whole = chosen_by_config(model, config)
        wrappers, biases = wrappers_for(model, config, chosen, whole)
    return _beside(model, adapter_name, config, wrappers, biases)


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


def remove(model: Model) -> Model:
    """Take every adapter off in place: the model as it was before `adapt`."""
    record = free_record_of(model)
    show_biases(model, None)
    _unwrap(model, lambda _, wrapper: original(wrapper))
    _restore(model, record)
    return model


def merge(model: Model, *, dequantise: bool = False) -> Model:
    """Fold the adapter in, in place: layers with ``g ∘ (W + s B A)``, summed in float32 and cast once.

    Args:
        dequantise: What becomes of quantised layers, see `Merging`.

    Raises:
        UsageError: if the model has other adapters, which would be lost, or none is active.
    """
    record, (name, _) = free_record_of(model), adapter_of(model)
    if others := [other for other in record.adapters if other != name]:
        raise UsageError(
            f"merging {name} would throw {', '.join(others)} away: doralib.delete_adapter(model, name) each, or "
            "fold it in with doralib.merge_adapter(model), which can be undone"
        )
    merging = Merging(model, dequantise=dequantise)
    show_biases(model, name)
    _unwrap(model, merging.merged)
    merging.finish()
    _restore(model, record)
    merging.warn()
    return model


def disable(model: nn.Module) -> None:
    """Let the model compute as if it had no adapter; `enable` switches back."""
    _switch(model, enabled=False)


def enable(model: nn.Module) -> None:
    """Let the adapter take part again."""
    _switch(model, enabled=True)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """The base model's own outputs, inside a with block."""
    disable(model)
    try:
        yield model
    finally:
        enable(model)


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
        write_content(peft.write(config, state, Given()), peft, folder, overwrite=True)


def read_adapter(
    path: str | Path, model: nn.Module | None = None, given: Given | None = None
) -> tuple[DoraConfig, AdapterState]:
    """An adapter's file or folder, in any known format, as settings and state; what had to be assumed is a warning.

    Args:
        model: The base model, for formats that need its names or its heads.
        given: What else a file may not say: alpha, the part of a pipeline.

    Raises:
        UsageError: if there is no adapter, or its format needs to know more.
        DoraError: if its files are damaged or do not belong together.
    """
    given = given or Given()
    _, found = read_any(path, given if model is None else _knowing(given, model))
    if given.component:
        refuse_component(found, given.component)
    found = one_part(found, given.component)
    for note in found.notes:
        warnings.warn(f"{path}: {note}", Note, stacklevel=3)
    return found.config, found.state


def _knowing(given: Given, model: nn.Module) -> Given:
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


def load_adapter(model: Model, path: str | Path, adapter_name: str | None = None, given: Given | None = None) -> Model:
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


def refuse_name(adapter_name: str) -> None:
    """Nothing, where parameters can bear the name.

    Raises:
        UsageError: if they cannot.
    """
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise UsageError(f"{adapter_name!r} cannot be an adapter's name: no dots, and no word that torch uses itself")


_ADAPT_FIRST = "adapt, or load the adapter, before fully_shard, which does not see parameters that come later"


def _refuse_beside(model: nn.Module, adapter_name: str, config: DoraConfig) -> None:
    record = free_record_of(model)
    refuse_sharded(model, "another adapter", _ADAPT_FIRST)
    refuse_name(adapter_name)
    if adapter_name in record.adapters:
        raise UsageError(
            f"there is an adapter {adapter_name!r} already; doralib.delete_adapter(model, {adapter_name!r}) takes it "
            "off, and doralib.hotswap_adapter puts another file's values into it"
        )
    if "full" in (config.method, *(adapter.config.method for adapter in record.adapters.values())):
        raise UsageError("full fine-tuning changes the weights themselves; there can be no adapter beside it")


def _wrap(model: Model, config: DoraConfig, chosen: list[str], whole: list[str], adapter_name: str) -> Model:
    refuse_sharded(model, "an adapter", _ADAPT_FIRST)
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    wrappers, biases = wrappers_for(model, config, chosen, whole)
    model.requires_grad_(False)
    for name, wrapper in wrappers.items():
        put(model, name, wrapper.train(model.get_submodule(name).training))
    model._doralib = Record(frozen, {adapter_name: Adapter(config)}, adapter_name, {}, adapter_name)  # type: ignore[assignment]
    for name in biases:
        bias = bias_of(model, name).requires_grad_(True)
        record_of(model).biases[name] = bias.detach().clone()
        record_of(model).adapters[adapter_name].biases[name] = bias.data
    return model


def _beside(
    model: Model, adapter_name: str, config: DoraConfig, wrappers: dict[str, Wrapper], biases: list[str]
) -> Model:
    record, places = record_of(model), [name for name, _ in wrapped(model)]
    if nested := [
        f"{ours} and {theirs}"
        for ours in wrappers
        for theirs in places
        if ours.startswith(theirs + ".") or theirs.startswith(ours + ".")
    ]:
        raise listed("adapters cannot change a module and a part of it side by side", nested)
    make_switched(model)
    for name, wrapper in wrappers.items():
        place = model.get_submodule(name)
        if not isinstance(place, Switched):
            place = Switched(place, name).train(place.training)
            place.active, place.enabled = record.active, record.enabled
            put(model, name, place)
        place.hold(adapter_name, wrapper.train(place.training))
    values = {name: record.biases.setdefault(name, bias_of(model, name).detach().clone()).clone() for name in biases}
    record.adapters[adapter_name] = Adapter(config, values)
    return model


def _train_in_full(model: Model, config: DoraConfig) -> Model:
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    wanted = config.target_modules
    chosen = [""] if wanted is None else choose(model, config) if wanted == "all-linear" else []
    chosen = chosen or matching(model, wanted or (), "target_modules")
    model.requires_grad_(False)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    model._doralib = Record(frozen, {DEFAULT: Adapter(config)}, DEFAULT)  # type: ignore[assignment]
    return model


def _unwrap(model: nn.Module, plain: Callable[[str, Wrapper | Switched], nn.Module]) -> None:
    """Every plain layer is made before the first is put back."""
    replaced = [(name, plain(name, wrapper).train(wrapper.training)) for name, wrapper in wrapped(model)]
    for name, module in replaced:
        put(model, name, module)


def _restore(model: nn.Module, record: Record) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(record.frozen[name])
    del model._doralib


def _switch(model: nn.Module, *, enabled: bool) -> None:
    record = record_of(model)
    if any(adapter.config.method == "full" for adapter in record.adapters.values()):
        raise UsageError("full fine-tuning changes the weights themselves; there is no adapter to switch")
    for _, wrapper in wrapped(model):
        wrapper.enabled = enabled
    record.enabled = enabled
    show_the_right_biases(model)
