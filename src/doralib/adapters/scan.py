"""What a model has that can be adapted, and who owns it."""

from collections import defaultdict

from torch import nn

from ..layers.base.registry import open_base
from ..layers.experts import Stack
from ..layers.linear import DoraLinear
from ..layers.multi_adapter import Switched, shared


def expert_weights(model: nn.Module) -> dict[str, Stack]:
    """Every stack of weights that can be adapted, by its whole name; those that are adapted already are left out."""
    return {
        f"{name}.{field}": Stack(module, field)
        for name, module in model.named_modules()
        if name and isinstance(getattr(module, "is_transposed", None), bool) and not name.endswith(".base_layer")
        for field, p in module._parameters.items()
        if p is not None and p.dim() == 3 and p.is_floating_point()
    }


def adaptable(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """(O, I), or (O, I / groups, taps...), of every layer that can be adapted, by name; adapted ones included."""
    found, inside = {}, shared(model)
    for name, module in model.named_modules():
        if name.endswith(".base_layer") or id(module) in inside:
            continue
        base = module.base if isinstance(module, DoraLinear) else open_base(_original(module))
        if base is not None:
            found[name] = base.row_shape
    return found


def tied(model: nn.Module) -> set[str]:
    """Modules whose weight is another's too, as of an output layer and the embedding; `refuse` takes none of them."""
    return {name for owners in _owners(model).values() if len(owners) > 1 for name in owners}


def _kind(model: nn.Module, name: str) -> str:
    module = model.get_submodule(name)
    base = module.base if isinstance(module, DoraLinear) else open_base(module)
    return "" if base is None else base.kind


def _original(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, Switched) else module


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each weight tensor."""
    owners = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)].append(name)
    return owners
