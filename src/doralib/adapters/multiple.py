"""Several adapters on one model: which there are, which one computes, and one for each row of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers.multi_adapter import MultiAdapter, RowPlan
from ..layers.wrapper import base_module
from .adapt import Model, remove
from .registry import (
    adapter_of,
    bias_of,
    check_not_full,
    free_record_of,
    layers_of,
    make_multiple,
    places_of,
    record_of,
    set_module,
    show_current_biases,
)

# what a model calls its batch, where it is not given by position
_BATCHES = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's adapters, in the order they came."""
    return tuple(record_of(model).adapters)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that computes; None: the base model does."""
    return record_of(model).active


def set_adapter(model: Model, adapter_name: str | None) -> Model:
    """Let this adapter compute, or with None the base model; no tensor is copied or computed again.

    Parameters stay as trainable as they are; those of an adapter that takes no part get no gradient.

    Raises:
        UsageError: if there is no adapter of this name.
    """
    record = free_record_of(model)
    if adapter_name is not None:
        adapter_of(model, adapter_name)
    if adapter_name == record.active:
        return model
    check_not_full(record)
    for place in _make_all_multiple(model):
        place.active = adapter_name
    record.active = adapter_name
    show_current_biases(model)
    _train_biases(model)
    return model


def delete_adapter(model: Model, adapter_name: str) -> Model:
    """Take one adapter off; if it was active the base model computes, and with the last one the model is plain again.

    Raises:
        UsageError: if there is no adapter of this name.
    """
    record = free_record_of(model)
    adapter_of(model, adapter_name)
    if len(record.adapters) == 1:
        return remove(model)
    if record.active == adapter_name:
        set_adapter(model, None)
    for name, place in places_of(model):
        multiple = make_multiple(model, name)
        if multiple.adapter_layer(adapter_name) is not None:
            del multiple.adapters[adapter_name]
        if not multiple.adapters:
            set_module(model, name, base_module(multiple).train(place.training))
    del record.adapters[adapter_name]
    trained = {bias for adapter in record.adapters.values() for bias in adapter.biases}
    for bias in record.biases.keys() - trained:
        del record.biases[bias]
    return model


@contextmanager
def adapter_rows(model: Model, names: Sequence[str | None]) -> Iterator[Model]:
    """Let each row of a batch go through its own adapter, inside a with block; None: the base model.

    One product with each frozen weight serves the whole batch. Every batch must have as many rows as there are names;
    `generate` with num_beams or num_return_sequences repeats each row, so each name must be repeated as often. Under
    gradient checkpointing backward() must be called inside the block.

    Raises:
        UsageError: for an unknown name, for adapters that cannot go by rows (biases, experts), and from the model when
            a batch has another number of rows.
    """
    rows, record = RowPlan(names), record_of(model)
    _check_rows(model, rows)
    before, places = record.rows, _make_all_multiple(model)
    hooks = [
        model.register_forward_pre_hook(partial(_check_batch, rows), with_kwargs=True),
        model.register_forward_hook(partial(_watch_backward, rows)),
    ]
    _set_rows(model, places, rows)
    try:
        yield model
    finally:
        _set_rows(model, places, before)
        for hook in hooks:
            hook.remove()


def _make_all_multiple(model: nn.Module) -> list[MultiAdapter]:
    return [make_multiple(model, name) for name, _ in places_of(model)]


def _set_rows(model: nn.Module, places: list[MultiAdapter], rows: RowPlan | None) -> None:
    record_of(model).rows = rows
    for place in places:
        place.rows = rows
    show_current_biases(model)


def _train_biases(model: nn.Module) -> None:
    """The biases of the active adapter train, and those of others do not."""
    record = record_of(model)
    mine = record.adapters[record.active].biases if record.active is not None else {}
    for bias in record.biases:
        bias_of(model, bias).requires_grad_(bias in mine)


def _check_rows(model: nn.Module, rows: RowPlan) -> None:
    if not rows.names:
        raise UsageError("adapter_rows needs a name, or None, for each row of the batch")
    check_not_full(record_of(model))
    problems = []
    for name in rows.groups:
        if name is None:
            continue
        _, adapter = adapter_of(model, name)
        if adapter.biases:
            problems.append(f"{name} trains biases, which a batch shares")
    # a router hands an expert tokens of any row
    experts = [
        place
        for name in record_of(model).adapters
        for place, layer in layers_of(model, name).items()
        if "experts" in place.split(".") or any(p.kind == "experts" for p in layer.adapter_parts(place).values())
    ]
    if experts:
        problems.append(f"{experts[0]} sees tokens, not rows: adapters of experts cannot go by rows")
    if problems:
        raise UsageError("\n  ".join(["adapters by row:", *problems]))


def _check_batch(rows: RowPlan, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = [*args, *(kwargs.get(name) for name in _BATCHES)]
    batch = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
    if batch is None or len(batch) == len(rows.names):
        return
    times, rest = divmod(len(batch), len(rows.names))
    hint = ""
    if not rest:
        hint = (
            f"; where generate repeats rows (num_beams, num_return_sequences) repeat each name too: "
            f"[name for name in names for _ in range({times})]"
        )
    raise UsageError(f"adapter_rows has {len(rows.names)} names, and the batch has {len(batch)} rows{hint}")


def _watch_backward(rows: RowPlan, model: nn.Module, _args: Any, output: Any) -> None:
    """Refuse a backward pass whose checkpoints would be computed again with other adapters."""
    if not (torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())):
        return

    def refuse(_gradient: Tensor) -> None:
        if record_of(model).rows is not rows:
            raise UsageError(
                "gradient checkpointing computes layers again in the backward pass: call backward() inside the block "
                "of adapter_rows"
            )

    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(refuse)
