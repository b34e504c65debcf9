"""What a base model has that can be adapted, and who owns it, found in one look."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property

from torch import nn

from ..layers.base.linear import Dense
from ..layers.base.registry import explain_refusal, open_base
from ..layers.experts import Stack
from ..layers.wrapper import Place, base_module
from .bypass import Bypass, find_bypassed
from .registry import find_record

HEADS = ("score", "classifier", "qa_outputs")
"""What transformers calls the head of a task, which is trained and which PEFT leaves out of all-linear."""


class Scan:
    """The modules and parameters of a base model by name, as they would be if it had no adapters.

    Names of layers, stacks and parameters are those of the base model; what is under an adapter counts as itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        """Each once, under its first name."""
        self.parameters: dict[str, nn.Parameter] = {}
        """Under every name that they have."""
        self.adapted: set[str] = set()
        """Modules with an adapter that this model has no record of, as where a part of it was adapted alone."""
        known, seen = find_record(model) is not None, set()
        for name, module, placed in _base_modules("", model):
            own = {f"{name}.{key}".lstrip("."): p for key, p in module._parameters.items() if p is not None}
            self.parameters |= own
            if id(module) in seen:
                continue
            seen.add(id(module))
            self.modules[name] = module
            if placed and not known:
                self.adapted.add(name)

    @cached_property
    def bases(self) -> dict[str, Dense]:
        """Every layer that can be adapted, opened, in model order."""
        found = {name: open_base(module) for name, module in self.modules.items() if not name.endswith(".base_layer")}
        return {name: base for name, base in found.items() if base is not None}

    @cached_property
    def linear(self) -> list[str]:
        """What "all-linear" means, before anything is left out: linear layers without the output layer, as in PEFT."""
        head = ask_model(self.model, "get_output_embeddings")
        heads = {name for name, module in self.modules.items() if head is not None and module is base_module(head)}
        heads |= {name for name in HEADS if hasattr(self.model, name)}
        return [name for name, base in self.bases.items() if base.kind == "linear" and name not in heads]

    @cached_property
    def unreached(self) -> dict[str, str]:
        """The linear layers that "all-linear" leaves out, with the reason why an adapter on them would do nothing."""
        passed_by = {name: str(each) for name, each in self.bypassed.items() if each.always or each.whole}
        reasons = {name: passed_by[name] for name in self.linear if name in passed_by}
        for name in self.linear:
            if others := self.other_names(f"{name}.weight"):
                reasons[name] = f"it is tied to {', '.join(others)}: one weight cannot be adapted in one place only"
        return reasons | {name: why for name, why in self.refused.items() if isinstance(self.modules[name], nn.Linear)}

    @cached_property
    def refused(self) -> dict[str, str]:
        """What looks like a layer and cannot be adapted, with the reason."""
        absent = {name: module for name, module in self.modules.items() if name not in self.bases}
        reasons = {name: explain_refusal(m) for name, m in absent.items() if not name.endswith(".base_layer")}
        return {name: reason for name, reason in reasons.items() if reason}

    @cached_property
    def bypassed(self) -> dict[str, Bypass]:
        """Layers whose weight the model's own code reads past them."""
        return {name: bypass for name, bypass in find_bypassed(self.modules).items() if name in self.bases}

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """Every stack of weights that can be adapted, by its whole name."""
        return {
            f"{name}.{field}": Stack(module, field)
            for name, module in self.modules.items()
            if name and isinstance(getattr(module, "is_transposed", None), bool) and not name.endswith(".base_layer")
            for field, p in module._parameters.items()
            if p is not None and p.dim() == 3 and p.is_floating_point()
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(O, I), or (O, I / groups, taps...), of every layer that can be adapted."""
        return {name: base.row_shape for name, base in self.bases.items()}

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """Every name of each parameter, by its id."""
        names = defaultdict(list)
        for name, p in self.parameters.items():
            names[id(p)].append(name)
        return names

    def other_names(self, parameter: str) -> list[str]:
        """Other names of a parameter, which is tied where it has any."""
        found = self.names.get(id(self.parameters.get(parameter)), [])
        return [name for name in found if name != parameter]

    def tied(self) -> set[str]:
        """Modules whose weight is another's too, as of an output layer and the embedding: they cannot be adapted."""
        return {name.rpartition(".")[0] for names in self.names.values() if len(names) > 1 for name in names}


def _base_modules(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module under every name that it has, and whether there is an adapter on it."""
    placed = isinstance(module, Place)
    module = base_module(module)
    yield name, module, placed
    for child, inner in module._modules.items():
        if inner is not None:
            yield from _base_modules(f"{name}.{child}" if name else child, inner)


def ask_model(model: nn.Module, name: str) -> nn.Module | None:
    """What one of a transformers model's own methods names, or None: models of sounds, or of two parts, refuse it."""
    get: Callable[[], nn.Module | None] | None = getattr(model, name, None)
    try:
        return None if get is None else get()
    except NotImplementedError:
        return None
