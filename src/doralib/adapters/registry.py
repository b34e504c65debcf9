"""What is known of the adapters on a model: which there are, where their layers sit, what each has trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DoraConfig
from ..errors import DoraError, UsageError, did_you_mean, list_some
from ..layers.multi_adapter import MultiAdapter, RowPlan
from ..layers.wrapper import AdapterLayer, Part, Place, base_module
from ..state import AdapterState, RowValues

# PEFT's words for classes of transformers
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
# the name of the adapter of a model that was given none, as in PEFT
DEFAULT = "default"


@dataclass
class Adapter:
    """One adapter of a model."""

    config: DoraConfig
    biases: dict[str, Tensor] = field(default_factory=dict)
    """What it has made of the biases it trains, by their name in the base model; old while the model holds them."""
    resized: tuple[str, ...] = ()
    """Adapted embeddings and heads whose frozen weights came with the adapter, in another size than the base's."""


@dataclass
class Record:
    """What was done to a model."""

    frozen: dict[str, bool]
    """Whether each parameter was trainable before, by its name then."""
    adapters: dict[str, Adapter]
    active: str | None
    biases: dict[str, Tensor] = field(default_factory=dict)
    """The base model's own values of the biases that adapters train."""
    shown: str | None = None
    """The adapter whose biases the model holds now."""
    enabled: bool = True
    rows: RowPlan | None = None
    """Which adapter each row of a batch goes through, while that is set."""
    merged: Any = None
    """What undoes a merge, while the active adapter is merged."""


def find_record(model: nn.Module) -> Record | None:
    """The model's record, or None where it has no adapter."""
    record = getattr(model, "_doralib", None)
    return record if isinstance(record, Record) else None


def set_record(model: nn.Module, record: Record | None) -> None:
    """Let the model have this record, or none."""
    if record is None:
        del model._doralib
    else:
        model._doralib = record  # type: ignore[assignment]


def record_of(model: nn.Module) -> Record:
    """The model's record.

    Raises:
        UsageError: if it has no adapter, or it is merged.
    """
    record = find_record(model)
    if record is None:
        raise UsageError("this model has no adapter; put one on with doralib.adapt or doralib.load_adapter")
    if record.merged is not None:
        raise UsageError("the adapter is merged; doralib.unmerge_adapter(model) takes it out again")
    return record


def free_record_of(model: nn.Module) -> Record:
    """The record of a model whose adapters may come, go and switch.

    Raises:
        UsageError: as `record_of`, and inside a block of adapter_rows.
    """
    record = record_of(model)
    if record.rows is not None:
        raise UsageError("adapters cannot come, go or switch inside a block of adapter_rows")
    return record


def adapter_of(model: nn.Module, name: str | None = None) -> tuple[str, Adapter]:
    """An adapter and its name; None: the active one.

    Raises:
        UsageError: if there is none of this name, or none is active.
    """
    record = record_of(model)
    if name is None and record.active is None:
        known = ", ".join(record.adapters)
        raise UsageError(f"no adapter is active; name one of {known}, or doralib.set_adapter(model, name)")
    known_name = record.active if name is None else name
    if known_name not in record.adapters:
        raise UsageError(
            f"there is no adapter {known_name!r}{did_you_mean(str(known_name), record.adapters)}; "
            f"this model has {', '.join(record.adapters)}"
        )
    return known_name, record.adapters[known_name]


def check_not_full(record: Record) -> None:
    """Check that the model has adapters that can be switched.

    Raises:
        UsageError: if its weights themselves are trained.
    """
    if any(adapter.config.method == "full" for adapter in record.adapters.values()):
        raise UsageError("full fine-tuning changes the weights themselves; there is no adapter to switch")


def places_of(model: nn.Module) -> list[tuple[str, Place]]:
    """Where adapters sit, by the replaced module's name; what shares a place is not listed apart."""
    return list(_places("", model, set()))


def _places(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Place]]:
    """In model order, without a look inside a place: that is most of a model's modules."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, Place):
        yield name, module
        return
    for child, inner in module._modules.items():
        if inner is not None:
            yield from _places(f"{name}.{child}" if name else child, inner, seen)


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, AdapterLayer]:
    """One adapter's layers by place."""
    found = ((name, place.adapter_layer(adapter_name)) for name, place in places_of(model))
    return {name: layer for name, layer in found if layer is not None}


def parts_of(model: nn.Module, adapter_name: str) -> dict[str, Part]:
    """What holds the values of one adapter, by the names in its state: a layer by its place, a stack of experts by the
    parameter's name."""
    return {
        name: part
        for place, layer in layers_of(model, adapter_name).items()
        for name, part in layer.adapter_parts(place).items()
    }


def as_own(parts: Mapping[str, Part], state: AdapterState) -> AdapterState:
    """An adapter with its layers in the form that these give theirs in.

    Raises:
        DoraError: if a layer has no place for some of the values.
    """
    return replace(
        state, layers={k: parts[k].as_own(layer) if k in parts else layer for k, layer in state.layers.items()}
    )


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its whole name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def make_multiple(model: nn.Module, name: str) -> MultiAdapter:
    """A place that takes several adapters: the one that is there already, or one around the module that is there.

    Parameters of an adapter's layer stay the same objects and get longer names.
    """
    record, module = record_of(model), model.get_submodule(name)
    if isinstance(module, MultiAdapter):
        return module
    place = MultiAdapter(base_module(module), name, record.active, enabled=record.enabled)
    if isinstance(module, AdapterLayer):
        (only,) = record.adapters
        module.enabled = True
        place.add_layer(only, module)
    set_module(model, name, place.train(module.training))
    return place


@contextmanager
def base_biases(model: nn.Module) -> Iterator[None]:
    """Let the model hold its own biases, inside a with block."""
    shown = record_of(model).shown
    show_biases(model, None)
    try:
        yield
    finally:
        show_biases(model, shown)


def bias_of(model: nn.Module, name: str) -> nn.Parameter:
    """A bias by its name in the base model."""
    owner, _, child = name.rpartition(".")
    return getattr(base_module(model.get_submodule(owner)), child)


def show_current_biases(model: nn.Module) -> None:
    """Let the model hold the biases of the adapter that computes: none where rows have adapters of their own."""
    record = record_of(model)
    show_biases(model, record.active if record.enabled and record.rows is None else None)


def show_biases(model: nn.Module, name: str | None) -> None:
    """Let the model hold the biases of an adapter, or its own; tensors change places, nothing is copied."""
    record = record_of(model)
    if record.shown == name:
        return
    for bias, mine in record.biases.items():
        p, old = bias_of(model, bias), record.adapters.get(record.shown or "")
        new = record.adapters.get(name or "")
        if old is not None and bias in old.biases:
            old.biases[bias] = p.data
        value = mine if new is None else new.biases.get(bias, mine)
        p.data = value.to(p)
    record.shown = name


def config_of(model: nn.Module, name: str | None = None) -> DoraConfig:
    """The settings of an adapter; None: the active one."""
    return adapter_of(model, name)[1].config


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What training changes, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def state_of(model: nn.Module, name: str | None = None) -> AdapterState:
    """An adapter of a model, None: the active one; views of its parameters, not copies."""
    name, adapter = adapter_of(model, name)
    record = record_of(model)
    extra: dict[str, Tensor] = {}
    layers = {key: part.state() for key, part in parts_of(model, name).items()}
    rows: dict[str, RowValues] = {}
    for place, layer in layers_of(model, name).items():
        extra |= layer.whole_tensors(place)
        rows |= layer.trained_rows(place)
    for bias, value in adapter.biases.items():
        extra[bias] = bias_of(model, bias).detach() if record.shown == name else value
    if adapter.config.method == "full":
        extra = {key: p.detach() for key, p in trainable(model)}
    frozen = {place: base_module(model.get_submodule(place)) for place in adapter.resized}
    resized = {f"{place}.weight": module.get_parameter("weight").detach() for place, module in frozen.items()}
    named = getattr(model, "name_or_path", None) or None
    if named and (revision := getattr(model, "doralib_revision", None)):
        named = f"{named}@{revision}"
    has_head = any(part in ("score", "classifier") for key in extra for part in key.split("."))
    return AdapterState(layers, extra, named, rows, resized, _name_task(model, has_head=has_head))


def _name_task(model: nn.Module, *, has_head: bool) -> str | None:
    """PEFT's word for a model, by its class or the one that this derives from; a head's only if the adapter has it."""
    names = [each.__name__ for each in type(model).__mro__]
    task = next((task for name in names for ending, task in _TASKS.items() if name.endswith(ending)), None)
    if task is None and _writes_from_text(model):
        return "SEQ_2_SEQ_LM"
    # PEFT looks for the head in the file
    return task if task == "CAUSAL_LM" or has_head else None


def _writes_from_text(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder of texts with its head: what PEFT's class for such models can call."""
    encoded = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    can_generate = getattr(model, "can_generate", lambda: False)
    return bool(encoded and getattr(model, "main_input_name", "") == "input_ids" and can_generate())


def find_differences(into: AdapterState, given: AdapterState) -> list[str]:
    """A line for each tensor that only one of two adapters has, or that has two shapes."""
    ours, theirs = tensors_of(into), tensors_of(given)
    problems = [f"{name}: the adapter has no such tensor" for name in ours.keys() - theirs.keys()]
    problems += [f"{name}: the model has no such tensor" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name}: other tokens in the adapter than in the model"
        for name in into.rows.keys() & given.rows.keys()
        if not torch.equal(into.rows[name].index_N.cpu(), given.rows[name].index_N.cpu())
    ]
    return problems + [
        f"{name}: {tuple(theirs[name].shape)} in the adapter, {tuple(ours[name].shape)} in the model"
        for name in ours.keys() & theirs.keys()
        if theirs[name].shape != ours[name].shape
    ]


def tensors_of(state: AdapterState) -> dict[str, Tensor]:
    """Everything that is trained, by layer and short name."""
    parts = {f"{layer}.{part}": t for layer, adapter in state.layers.items() for part, t in adapter.tensors().items()}
    rows = {f"{name} of {len(each.index_N)} tokens": each.rows_ND for name, each in state.rows.items()}
    return {**parts, **state.extra, **rows}


def error_of(what: str, lines: list[str]) -> DoraError:
    """An error with a line for each problem."""
    return DoraError(f"{what}:\n  {list_some(lines)}")
