"""Put adapters on a model in place, switch them, read and write them, take them off or fold them in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ..config import DoraConfig
from ..errors import UsageError
from ..layers.multi_adapter import Switched, Wrapper
from ..layers.wrapper import original
from .build import chosen_by_config, wrappers_for
from .fsdp import refuse_sharded
from .registry import (
    DEFAULT,
    Adapter,
    Record,
    bias_of,
    free_record_of,
    listed,
    make_switched,
    plain,
    put,
    record_of,
    show_biases,
    show_the_right_biases,
    wrapped,
)
from .targets import choose, matching

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


def remove(model: Model) -> Model:
    """Take every adapter off in place: the model as it was before `adapt`."""
    record = free_record_of(model)
    show_biases(model, None)
    _unwrap(model, lambda _, wrapper: original(wrapper))
    _restore(model, record)
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
