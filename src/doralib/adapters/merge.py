"""Merge an adapter into a live model, for good or so that it can be unmerged bit for bit."""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..errors import DoraError, UsageError
from ..layers.base.linear import Dense
from ..layers.base.opaque import Opaque, Quantized
from ..layers.base.registry import open_base
from ..layers.layer import DoraLayer
from ..layers.wrapper import Place, base_module
from ..quantization.error import QuantizationCost, format_costs, is_change_lost
from .adapt import Model, replace_places, restore_base
from .fsdp import check_unsharded
from .registry import Record, adapter_of, find_record, free_record_of, places_of, record_of, set_module, show_biases
from .scan import Scan

# what transformers leaves on a model that it loaded quantized
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


class Merging:
    """One merge of a live model: what becomes of each layer, and what quantizing it again cost.

    Args:
        dequantise: Put plain layers, in the model's dtype, in the place of all quantized ones, adapted or not; the
            model then saves and loads as one that never was quantized. Otherwise the adapted ones are quantized again
            in their own settings, with a warning where that loses most of the change.
    """

    def __init__(self, model: nn.Module, *, dequantise: bool) -> None:
        check_unsharded(model, "merge", "save the adapter and merge it into the checkpoint's files: doralib merge")
        self.model, self.active = model, record_of(model).active
        self.dtype = plain_dtype(model) if dequantise else None
        self.errors: list[QuantizationCost] = []

    def merge_place(self, name: str, place: Place) -> nn.Module:
        """A plain module with the active adapter merged into it; the frozen one where it has no layer here."""
        layer = place.adapter_layer(self.active)
        if layer is None:
            return base_module(place)
        if not (isinstance(layer, DoraLayer) and isinstance(layer.base, Opaque)):
            return layer.merged()
        if self.dtype is not None:
            return plain_layer(layer.base, layer.merged_weight(), self.dtype)
        if not isinstance(layer.base, Quantized):
            return layer.merged()
        V_OI = layer.merged_weight()
        module = layer.base.with_weight(V_OI)
        again = open_base(module)
        assert isinstance(again, Quantized)
        error = QuantizationCost.measure(name, layer.base.storage.name, layer.base.rows, V_OI, again.rows)
        self.errors.append(error)
        return module

    def warn(self) -> None:
        """Say so where most of the change was lost."""
        if is_change_lost(self.errors):
            remedy = "doralib.merge(model, dequantise=True), or merge the saved adapter into the unquantized model"
            lost = f"quantizing the merged weights again lost most of the change; {remedy}"
            warnings.warn(f"{lost}\n{format_costs(self.errors)}", stacklevel=3)


def merge_report(model: nn.Module) -> list[QuantizationCost]:
    """What `merge` or `merge_adapter` would do to each quantized layer, in model order; the model is not changed.

    Of several adapters the active one counts.
    """
    merging = Merging(model, dequantise=False)
    for name, place in places_of(model):
        if isinstance(open_base(base_module(place)), Quantized):
            merging.merge_place(name, place)
    return merging.errors


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put a plain layer in the place of every one that hides its weight, and forget that the model was quantized.

    Args:
        dtype: By default the model's own.
    """
    dtype = dtype or plain_dtype(model)
    for name, module in list(model.named_modules()):
        base = open_base(module)
        if isinstance(base, Opaque) and base.hides_weight:
            set_module(model, name, plain_layer(base, base.W_OI, dtype).train(module.training))
    _unmark(model)


def plain_layer(base: Dense, W_OI: Tensor, dtype: torch.dtype) -> nn.Linear:
    """An ``nn.Linear`` with this weight and the base's bias, frozen."""
    O, I = base.shape
    with torch.device("meta"):
        module = nn.Linear(I, O, bias=base.bias is not None)
    module.weight = nn.Parameter(W_OI.to(dtype), requires_grad=False)
    if base.bias is not None:
        module.bias = nn.Parameter(base.bias.detach().to(dtype), requires_grad=False)
    return module


def plain_dtype(model: nn.Module) -> torch.dtype:
    """What the model would be in without quantization: as its config says, else as most of its other parameters are."""
    named = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    counts = Counter[torch.dtype]()
    frozen = {id(p) for _, place in places_of(model) for p in base_module(place).parameters()}
    masters = {id(p) for _, place in places_of(model) for p in place.parameters()} - frozen
    for module in model.modules():
        base = open_base(module)
        if isinstance(base, Quantized):
            remembered = base.storage.plain_dtype
            counts.update([remembered] if remembered else [])
        else:
            own = [p for p in module.parameters(recurse=False) if id(p) not in masters]
            counts.update(p.dtype for p in own if p.dtype.is_floating_point)
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _unmark(model: Any) -> None:
    """What transformers' `remove_quantization_config` does, and the flags that it leaves."""
    was_quantised = any(name in model.__dict__ for name in _MARKS)
    for name in _MARKS:
        model.__dict__.pop(name, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
    if was_quantised:
        model.is_quantized = False


def merge(model: Model, *, dequantise: bool = False) -> Model:
    """Merge the adapter, in place: layers with ``g ∘ (W + s B A)``, summed in float32 and cast once.

    Args:
        dequantise: What becomes of quantized layers, see `Merging`.

    Raises:
        UsageError: if the model has other adapters, which would be lost, or none is active.
    """
    record, (name, _) = free_record_of(model), adapter_of(model)
    if others := [other for other in record.adapters if other != name]:
        raise UsageError(
            f"merging {name} would throw {', '.join(others)} away: doralib.delete_adapter(model, name) each, or "
            "merge it with doralib.merge_adapter(model), which can be undone"
        )
    merging = Merging(model, dequantise=dequantise)
    show_biases(model, name)
    tied = Scan(model).names.values()
    replace_places(model, merging.merge_place)
    _tie_again(model, [names for names in tied if len(names) > 1])
    if merging.dtype is not None:
        dequantize(model, merging.dtype)
    restore_base(model, record)
    merging.warn()
    return model


def _tie_again(model: nn.Module, tied: list[list[str]]) -> None:
    """Let weights be one again that were before; where they went apart the model's settings say so."""
    for first, *others in tied:
        module, _, field = first.rpartition(".")
        p = model.get_submodule(module).get_parameter(field)
        for other in others:
            owner, _, child = other.rpartition(".")
            if torch.equal(model.get_submodule(owner).get_parameter(child), p):
                setattr(model.get_submodule(owner), child, p)
            elif getattr(model, "config", None) is not None:
                model.config.tie_word_embeddings = False  # type: ignore[union-attr]


@dataclass
class _Merged:
    """What brings the adapted model back."""

    places: dict[str, Place]
    flags: list[tuple[nn.Parameter, bool]]
    file: Path | None
    """Where the frozen weights are; None: in the wrappers."""


def merge_adapter(model: Model, keep: str | Path = "cpu") -> Model:
    """Merge the active adapter, in place, so that `unmerge_adapter` can take it out again.

    The layers are plain ones until then, and nothing of the model trains. Other adapters stay with the model.
    Quantized layers are quantized again in their own settings, with a warning where that loses most of the change
    (`merge_report`).

    Args:
        keep: "cpu": the frozen weights and the adapters wait in the CPU's memory, quantized weights where they are.
            Else a file for the frozen weights, which are then in no memory; it must stay where it is.

    Raises:
        UsageError: if no adapter is active or it is merged already, if the model is inside adapter_rows, or if
            the file exists.
        DoraError: with a file, if a frozen weight is in a storage that safetensors files cannot hold, quantized ones
            included.
    """
    record = free_record_of(model)
    adapter_of(model)
    file = None if keep == "cpu" else Path(keep)
    _check_mergeable(model, record, file)
    places = dict(places_of(model))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    if file is not None:
        files.write_tensors(file, _frozen(places))
    merged, merging = _Merged({}, flags, file), Merging(model, dequantise=False)
    try:
        for name, place in places.items():
            plain = merging.merge_place(name, place).train(place.training)
            set_module(model, name, plain)
            merged.places[name] = place
            _put_aside(place, plain, emptied=file is not None)
    except DoraError:
        _bring_back(model, merged)
        raise
    model.requires_grad_(False)
    record.merged = merged
    merging.warn()
    return model


def unmerge_adapter(model: Model) -> Model:
    """Take out the adapter that `merge_adapter` merged: weights, values and flags as they were, bit for bit.

    Raises:
        UsageError: if none is merged.
        DoraError: if the file of the frozen weights is gone or damaged; the model stays merged.
    """
    record = find_record(model)
    if record is None or record.merged is None:
        raise UsageError("no adapter is merged; doralib.merge_adapter(model) does that")
    _bring_back(model, record.merged)
    record.merged = None
    return model


def _bring_back(model: nn.Module, merged: _Merged) -> None:
    tensors = {} if merged.file is None else files.read_tensors(merged.file)
    if tensors and (lost := _frozen(merged.places).keys() - tensors.keys()):
        raise DoraError(f"{merged.file} is not the file that the frozen weights were written to: no {min(lost)}")
    for name, place in merged.places.items():
        for key, p in base_module(place).named_parameters():
            if tensors:
                # in memory of its own: the file is mapped, and a product may differ with a tensor's alignment
                p.data = tensors[f"{name}.{key}"].clone()
        plain = model.get_submodule(name)
        set_module(model, name, place.to(_device(plain)).train(plain.training))
    for p, flag in merged.flags:
        p.requires_grad_(flag)


def _check_mergeable(model: nn.Module, record: Record, file: Path | None) -> None:
    if any(adapter.config.method == "full" for adapter in record.adapters.values()):
        raise UsageError("full fine-tuning changes the weights themselves; there is nothing to merge")
    if not record.enabled:
        raise UsageError("the adapter is disabled; doralib.enable(model) first")
    if file is None:
        return
    if file.exists():
        raise UsageError(f"{file} exists already; choose another name")
    odd = [name for name, p in _frozen(dict(places_of(model))).items() if type(p) not in (Tensor, nn.Parameter)]
    if odd:
        raise DoraError(f"a file cannot hold {', '.join(odd[:5])}: a storage of its own kind; keep it on the cpu")


def _frozen(places: dict[str, Place]) -> dict[str, Tensor]:
    """The parameters of the frozen modules that a merge replaces, by their name in the base model."""
    return {f"{name}.{key}": p for name, place in places.items() for key, p in base_module(place).named_parameters()}


def _put_aside(place: Place, plain: nn.Module, *, emptied: bool) -> None:
    """Out of the device's memory, or, with a file, out of all memory; what the plain module shares stays."""
    frozen, staying = base_module(place), {id(p) for p in plain.parameters()}
    if isinstance(open_base(frozen), Quantized):  # scales are no parameters, and must not be parted from their numbers
        staying |= {id(p) for p in frozen.parameters()}
    for p in frozen.parameters():
        if id(p) not in staying:
            p.data = p.data.new_empty(0) if emptied else p.data.cpu()
    for p in place.parameters():
        if id(p) not in staying:
            p.data = p.data.cpu()


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
