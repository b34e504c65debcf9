"""Fold an adapter in so that it comes out again bit for bit: the frozen weights are kept, nothing is subtracted."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import files
from .bases import Quantised, open_base
from .dequantised import Merging
from .errors import DoraError, UsageError
from .layers import original
from .live import Record, adapter_of, free_record_of, put, wrapped
from .switched import Switched, Wrapper

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Merged:
    """What brings the adapted model back."""

    wrappers: dict[str, Wrapper | Switched]
    flags: list[tuple[nn.Parameter, bool]]
    file: Path | None
    """Where the frozen weights are; None: in the wrappers."""


def merge_adapter(model: Model, keep: str | Path = "cpu") -> Model:
    """Fold the active adapter in, in place, so that `unmerge_adapter` can take it out again.

    The layers are plain ones until then, and nothing of the model trains. Other adapters stay with the model.
    Quantised layers are quantised again in their own settings, with a warning where that loses most of the change
    (`merge_report`).

    Args:
        keep: "cpu": the frozen weights and the adapters wait in the CPU's memory, quantised weights where they are.
            Else a file for the frozen weights, which are then in no memory; it must stay where it is.

    Raises:
        UsageError: if no adapter is active or it is folded in already, if the model is inside adapter_rows, or if
            the file exists.
        DoraError: with a file, if a frozen weight is in a storage that safetensors files cannot hold, quantised ones
            included.
    """
    record = free_record_of(model)
    adapter_of(model)
    file = None if keep == "cpu" else Path(keep)
    _refuse(model, record, file)
    places = dict(wrapped(model))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    if file is not None:
        files.write_tensors(file, _frozen(places))
    merged, merging = _Merged({}, flags, file), Merging(model, dequantise=False)
    try:
        for name, wrapper in places.items():
            plain = merging.merged(name, wrapper).train(wrapper.training)
            put(model, name, plain)
            merged.wrappers[name] = wrapper
            _put_aside(wrapper, plain, emptied=file is not None)
    except DoraError:
        _bring_back(model, merged)
        raise
    model.requires_grad_(False)
    record.merged = merged
    merging.warn()
    return model


def unmerge_adapter(model: Model) -> Model:
    """Take out the adapter that `merge_adapter` folded in: weights, values and flags as they were, bit for bit.

    Raises:
        UsageError: if none is folded in.
        DoraError: if the file of the frozen weights is gone or damaged; the model stays merged.
    """
    record = getattr(model, "_doralib", None)
    merged = record.merged if isinstance(record, Record) else None
    if not isinstance(record, Record) or merged is None:
        raise UsageError("no adapter is folded in; doralib.merge_adapter(model) does that")
    _bring_back(model, merged)
    record.merged = None
    return model


def _bring_back(model: nn.Module, merged: _Merged) -> None:
    tensors = {} if merged.file is None else files.read_tensors(merged.file)
    if tensors and (lost := _frozen(merged.wrappers).keys() - tensors.keys()):
        raise DoraError(f"{merged.file} is not the file that the frozen weights were written to: no {min(lost)}")
    for name, wrapper in merged.wrappers.items():
        for key, p in original(wrapper).named_parameters():
            if tensors:
                # in memory of its own: the file is mapped, and a product may differ with a tensor's alignment
                p.data = tensors[f"{name}.{key}"].clone()
        plain = model.get_submodule(name)
        put(model, name, wrapper.to(_device(plain)).train(plain.training))
    for p, flag in merged.flags:
        p.requires_grad_(flag)


def _refuse(model: nn.Module, record: Record, file: Path | None) -> None:
    if any(adapter.config.method == "full" for adapter in record.adapters.values()):
        raise UsageError("full fine-tuning changes the weights themselves; there is nothing to fold in")
    if not record.enabled:
        raise UsageError("the adapter is disabled; doralib.enable(model) first")
    if file is None:
        return
    if file.exists():
        raise UsageError(f"{file} exists already; choose another name")
    odd = [name for name, p in _frozen(dict(wrapped(model))).items() if type(p) not in (Tensor, nn.Parameter)]
    if odd:
        raise DoraError(f"a file cannot hold {', '.join(odd[:5])}: a storage of its own kind; keep it on the cpu")


def _frozen(places: dict[str, Wrapper | Switched]) -> dict[str, Tensor]:
    """The parameters of the frozen modules that a merge replaces, by their name in the base model."""
    return {f"{name}.{key}": p for name, place in places.items() for key, p in original(place).named_parameters()}


def _put_aside(wrapper: Wrapper | Switched, plain: nn.Module, *, emptied: bool) -> None:
    """Out of the device's memory, or, with a file, out of all memory; what the plain module shares stays."""
    frozen, staying = original(wrapper), {id(p) for p in plain.parameters()}
    if isinstance(open_base(frozen), Quantised):  # scales are no parameters, and must not be parted from their numbers
        staying |= {id(p) for p in frozen.parameters()}
    for p in frozen.parameters():
        if id(p) not in staying:
            p.data = p.data.new_empty(0) if emptied else p.data.cpu()
    for p in wrapper.parameters():
        if id(p) not in staying:
            p.data = p.data.cpu()


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
