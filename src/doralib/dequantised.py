"""Live models with quantised layers: merging into them, and putting plain layers in their place."""

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Dense, Quantised, open_base
from .layers import DoraLinear, original
from .live import put, wrapped
from .requantised import Requantised, swallowed, table
from .sharded import refuse_sharded
from .switched import Switched, Wrapper

# what transformers leaves on a model that it loaded quantised
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


class Merging:
    """One merge of a live model: what becomes of each layer, and what quantising it again cost.

    Args:
        dequantise: Put plain layers, in the model's dtype, in the place of all quantised ones, adapted or not; the
            model then saves and loads as one that never was quantised. Otherwise the adapted ones are quantised again
            in their own settings, with a warning where that loses most of the change.
    """

    def __init__(self, model: nn.Module, *, dequantise: bool) -> None:
        refuse_sharded(model, "merge", "save the adapter and merge it into the checkpoint's files: doralib merge")
        self.model = model
        self.dtype = plain_dtype(model) if dequantise else None
        self.errors: list[Requantised] = []

    def merged(self, name: str, wrapper: Wrapper | Switched) -> nn.Module:
        """The layer with its adapter, or the active one of several, folded in."""
        layer = _quantised_layer(wrapper)
        if layer is None:
            return wrapper.merged()
        assert isinstance(layer.base, Quantised)
        V_OI = layer.merged_weight()
        if self.dtype is not None:
            return plain_layer(layer.base, V_OI, self.dtype)
        module = layer.base.replaced(V_OI)
        again = open_base(module)
        assert isinstance(again, Quantised)
        error = Requantised.measured(name, layer.base.storage.name, layer.base.rows, V_OI, again.rows)
        self.errors.append(error)
        return module

    def finish(self) -> None:
        """Make the layers without an adapter plain too, where that is wanted."""
        if self.dtype is not None:
            dequantise(self.model, self.dtype)

    def warn(self) -> None:
        """Say so where most of the change was lost."""
        if swallowed(self.errors):
            remedy = "doralib.merge(model, dequantise=True), or merge the saved adapter into the unquantised model"
            lost = f"quantising the merged weights again lost most of the change; {remedy}"
            warnings.warn(f"{lost}\n{table(self.errors)}", stacklevel=3)


def merge_report(model: nn.Module) -> list[Requantised]:
    """What `merge` or `merge_adapter` would do to each quantised layer, in model order; the model is not changed.

    Of several adapters the active one counts.
    """
    merging = Merging(model, dequantise=False)
    for name, wrapper in wrapped(model):
        if _quantised_layer(wrapper) is not None:
            merging.merged(name, wrapper)
    return merging.errors


@torch.no_grad()
def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put a plain layer in the place of every quantised one that is known, and forget that the model was quantised.

    Args:
        dtype: By default the model's own.
    """
    dtype = dtype or plain_dtype(model)
    for name, module in list(model.named_modules()):
        base = open_base(module)
        if isinstance(base, Quantised):
            put(model, name, plain_layer(base, base.W_OI, dtype).train(module.training))
    if any(isinstance(open_base(module), Quantised) for module in model.modules()):
        return
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
    """What the model would be in without quantisation: as its config says, else as most of its other parameters are."""
    named = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    counts = Counter[torch.dtype]()
    frozen = {id(p) for _, wrapper in wrapped(model) for p in original(wrapper).parameters()}
    masters = {id(p) for _, wrapper in wrapped(model) for p in wrapper.parameters()} - frozen
    for module in model.modules():
        base = open_base(module)
        if isinstance(base, Quantised):
            remembered = base.storage.plain_dtype
            counts.update([remembered] if remembered else [])
        else:
            own = [p for p in module.parameters(recurse=False) if id(p) not in masters]
            counts.update(p.dtype for p in own if p.dtype.is_floating_point)
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _quantised_layer(wrapper: Wrapper | Switched) -> DoraLinear | None:
    """The layer that a merge folds in here, where its base is quantised."""
    layer = wrapper.folded if isinstance(wrapper, Switched) else wrapper
    return layer if isinstance(layer, DoraLinear) and isinstance(layer.base, Quantised) else None


def _unmark(model: Any) -> None:
    """What transformers' `remove_quantization_config` does, and the flags that it leaves."""
    was_quantised = any(name in model.__dict__ for name in _MARKS)
    for name in _MARKS:
        model.__dict__.pop(name, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
    if was_quantised:
        model.is_quantized = False
