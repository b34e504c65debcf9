"""Put adapters on a model in place, switch them off and on, take them off."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from ..config import DoraConfig
from ..errors import Note, UsageError
from ..layers.wrapper import Place, base_module
from .build import Targets, choose_by_config, make_layers
from .fsdp import check_unsharded
from .registry import (
    DEFAULT,
    Adapter,
    Record,
    base_biases,
    bias_of,
    check_not_full,
    error_of,
    find_record,
    free_record_of,
    make_multiple,
    places_of,
    record_of,
    set_module,
    set_record,
    show_biases,
    show_current_biases,
)
from .save import AdapterSaver
from .scan import Scan
from .targets import choose, match_modules

Model = TypeVar("Model", bound=nn.Module)


def adapt(model: Model, config: DoraConfig | Mapping[str, Any] | Any, adapter_name: str = DEFAULT) -> Model:
    """Wrap the target layers in place and freeze everything else; the model itself is returned.

    With method "full" nothing is wrapped: the targets' weights, or all, are set to train.

    Args:
        config: A DoraConfig, a mapping of its fields, or a LoraConfig or VeraConfig of PEFT (`DoraConfig.from_peft`).

    Raises:
        UsageError: if a target is misspelt, tied, already adapted or not linear; all problems at once, and the model
            is left as it was.
    """
    config = DoraConfig.of(config)
    if find_record(model) is not None:
        raise UsageError(
            "this model is adapted already; doralib.remove(model) takes the adapter off, and "
            "doralib.add_adapter(model, name, config) puts another beside it"
        )
    if config.method == "full":
        return _train_in_full(model, config)
    found = Scan(model)
    check_name(adapter_name)
    targets = choose_by_config(found, config)
    put_first(found, config, targets, adapter_name)
    for note in targets.notes:
        warnings.warn(note, Note, stacklevel=2)
    return model


def add_adapter(model: Model, adapter_name: str, config: DoraConfig | Mapping[str, Any] | Any) -> Model:
    """Put a fresh adapter beside those that the model has; `set_adapter` makes it the active one.

    Raises:
        UsageError: as `adapt`, and if the name is taken; the model is left as it was.
    """
    config = DoraConfig.of(config)
    check_beside(model, adapter_name, config)
    found = Scan(model)
    targets = choose_by_config(found, config)
    put_beside(found, config, targets, adapter_name)
    for note in targets.notes:
        warnings.warn(note, Note, stacklevel=2)
    return model


def remove(model: Model) -> Model:
    """Take every adapter off in place: the model as it was before `adapt`."""
    record = free_record_of(model)
    show_biases(model, None)
    replace_places(model, lambda _, place: base_module(place))
    restore_base(model, record)
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


def check_name(adapter_name: str) -> None:
    """Check that parameters can bear the name.

    Raises:
        UsageError: if they cannot.
    """
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise UsageError(f"{adapter_name!r} cannot be an adapter's name: no dots, and no word that torch uses itself")


_ADAPT_FIRST = "adapt, or load the adapter, before fully_shard, which does not see parameters that come later"


def check_beside(model: nn.Module, adapter_name: str, config: DoraConfig) -> None:
    """Check that a model that has adapters can take one more, of this name.

    Raises:
        UsageError: if it cannot.
    """
    record = free_record_of(model)
    check_unsharded(model, "another adapter", _ADAPT_FIRST)
    check_name(adapter_name)
    if adapter_name in record.adapters:
        raise UsageError(
            f"there is an adapter {adapter_name!r} already; doralib.delete_adapter(model, {adapter_name!r}) takes it "
            "off, and doralib.hotswap_adapter puts another file's values into it"
        )
    if "full" in (config.method, *(adapter.config.method for adapter in record.adapters.values())):
        raise UsageError("full fine-tuning changes the weights themselves; there can be no adapter beside it")


def put_first(found: Scan, config: DoraConfig, targets: Targets, adapter_name: str) -> None:
    """Put the first adapter on a model; nothing else of it trains from now on."""
    model = found.model
    check_unsharded(model, "an adapter", _ADAPT_FIRST)
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    layers, biases = make_layers(found, config, targets)
    model.requires_grad_(False)
    for name, layer in layers.items():
        set_module(model, name, layer.train(found.modules[name].training))
    adapter = Adapter(config)
    record = Record(frozen, {adapter_name: adapter}, adapter_name, {}, adapter_name)
    set_record(model, record)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = AdapterSaver(model)  # type: ignore[assignment]
    for name in biases:
        bias = bias_of(model, name).requires_grad_(True)
        record.biases[name], adapter.biases[name] = bias.detach().clone(), bias.data


def put_beside(found: Scan, config: DoraConfig, targets: Targets, adapter_name: str) -> None:
    """Put an adapter beside those that a model has; it computes when it is made the active one."""
    model = found.model
    record, places = record_of(model), places_of(model)
    with base_biases(model):
        layers, biases = make_layers(found, config, targets)
    if nested := [
        f"{ours} and {theirs}"
        for ours in layers
        for theirs, _ in places
        if ours.startswith(theirs + ".") or theirs.startswith(ours + ".")
    ]:
        raise error_of("adapters cannot change a module and a part of it side by side", nested)
    for name in dict.fromkeys([*(name for name, _ in places), *layers]):
        place = make_multiple(model, name)
        if name in layers:
            place.add_layer(adapter_name, layers[name].train(place.training))
    values = {name: record.biases.setdefault(name, bias_of(model, name).detach().clone()).clone() for name in biases}
    record.adapters[adapter_name] = Adapter(config, values)


def _train_in_full(model: Model, config: DoraConfig) -> Model:
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    wanted, found = config.target_modules, Scan(model)
    chosen = [""] if wanted is None else choose(found, config) if wanted == "all-linear" else []
    chosen = chosen or match_modules(found, wanted or (), "target_modules")
    model.requires_grad_(False)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    set_record(model, Record(frozen, {DEFAULT: Adapter(config)}, DEFAULT))
    return model


def replace_places(model: nn.Module, make_plain: Callable[[str, Place], nn.Module]) -> None:
    """Put a plain module in every place; all are made before the first is put in."""
    modules = {name: make_plain(name, place).train(place.training) for name, place in places_of(model)}
    for name, module in modules.items():
        set_module(model, name, module)


def restore_base(model: nn.Module, record: Record) -> None:
    """Let parameters train that trained before the model had adapters, and forget the adapters."""
    for name, p in model.named_parameters():
        p.requires_grad_(record.frozen.get(name, False))
    set_record(model, None)
    model.__dict__.pop("save_pretrained", None)


def _switch(model: nn.Module, *, enabled: bool) -> None:
    record = record_of(model)
    check_not_full(record)
    for _, place in places_of(model):
        place.enabled = enabled
    record.enabled = enabled
    show_current_biases(model)
