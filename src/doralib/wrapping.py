"""The layers that an adapter puts in place of a plain model's: chosen, checked and made before the first is put in."""

from torch import nn

from .bank import Bank, DoraBank, bank_for
from .bases import open_base
from .config import DoraConfig
from .convolutions import DoraConv
from .embeddings import DoraEmbedding
from .errors import DoraError, UsageError
from .layers import DoraLinear, TrainedCopy
from .live import listed
from .magnitudes import DoraMagnitude
from .quantised import keep_readable
from .state import AdapterState
from .switched import Wrapper
from .targets import adaptable, choose, magnitudes, matching, refuse


def chosen_by_config(model: nn.Module, config: DoraConfig) -> tuple[list[str], list[str]]:
    """Names of the layers to adapt and of the modules to train whole, on a plain model."""
    chosen = choose(model, config)
    return chosen, matching(model, config.modules_to_save, "modules_to_save") if config.modules_to_save else []


def chosen_by_state(
    model: nn.Module, config: DoraConfig, state: AdapterState, source: str
) -> tuple[list[str], list[str]]:
    """The same for an adapter that is there already."""
    known = {name for name, _ in model.named_modules()}
    if absent := sorted(state.layers.keys() - known):
        raise listed(f"{source} is an adapter of another model; this one has no", absent)
    chosen = [name for name, _ in model.named_modules() if name in state.layers]
    refuse(model, chosen, _shapes_that_fit(source, state, model))
    return chosen, matching(model, config.modules_to_save, "modules_to_save") if config.modules_to_save else []


def wrappers_for(
    model: nn.Module, config: DoraConfig, chosen: list[str], whole: list[str]
) -> tuple[dict[str, Wrapper], list[str]]:
    """The wrappers of a plain model's layers, made before the first is put in, and the biases to train.

    A refusal changes nothing.
    """
    _refuse_whole(model, chosen, whole)
    biases = bias_names(model, config, chosen, whole)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        wrappers = _wrappers(model, config, chosen, whole)
        keep_readable(model)
        return wrappers, biases
    except DoraError:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
        raise


def _wrappers(model: nn.Module, config: DoraConfig, chosen: list[str], whole: list[str]) -> dict[str, Wrapper]:
    alone = set(magnitudes(model, config))
    bank = bank_for([model.get_submodule(name) for name in chosen], config)
    wrappers: dict[str, Wrapper] = {
        name: _adapted_layer(model.get_submodule(name), name, config, bank, alone=name in alone) for name in chosen
    }
    return wrappers | {name: TrainedCopy(model.get_submodule(name)) for name in whole}


_LAYERS: dict[str, type[DoraLinear]] = {
    "convolution": DoraConv,
    "transposed_convolution": DoraConv,
    "embedding": DoraEmbedding,
}


def _adapted_layer(module: nn.Module, name: str, config: DoraConfig, bank: Bank | None, *, alone: bool) -> DoraLinear:
    if alone:
        return DoraMagnitude(module, 1, 1.0, config)
    if bank is not None:
        return DoraBank(module, bank, config)
    base = open_base(module)
    layer = DoraLinear if base is None else _LAYERS.get(base.kind, DoraLinear)
    return layer(module, config.rank_of(name), config.scale_of(name), config)


def _refuse_whole(model: nn.Module, chosen: list[str], whole: list[str]) -> None:
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(name)
    problems = [f"{name} is in target_modules too" for name in whole if name in chosen]
    problems += [
        f"{name} holds {held[0]}, which is in target_modules"
        for name in whole
        if (held := [layer for layer in chosen if layer.startswith(name + ".")])
    ]
    for name in whole:
        inside = {name, *(f"{name}.{n}" for n, _ in model.get_submodule(name).named_modules())}
        for p in model.get_submodule(name).parameters():
            if others := owners[id(p)] - inside:
                problems.append(f"{name} is tied to {', '.join(sorted(others))}; a copy of it would break the tie")
    if problems:
        raise UsageError("modules_to_save: " + "; ".join(dict.fromkeys(problems)))


def bias_names(model: nn.Module, config: DoraConfig, chosen: list[str], whole: list[str]) -> list[str]:
    """The biases to train, by their name in the base model; a module trained whole has a copy of its own."""
    if config.bias == "none":
        return []
    owned = {f"{name}.bias" for name in chosen}
    biases = {
        name: p
        for name, p in model.named_parameters()
        if name.endswith("bias")
        and (config.bias == "all" or name in owned)
        and not any(name.startswith(module + ".") for module in whole)
    }
    if small := [name for name, p in biases.items() if p.dtype.itemsize < 4]:
        raise UsageError(
            f"bias: {config.bias!r} trains {small[0]} in {biases[small[0]].dtype}, where small steps are lost; "
            "load the model in float32"
        )
    return list(biases)


def _shapes_that_fit(source: str, state: AdapterState, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The layers of a model that can be adapted, once every adapted shape is right."""
    linear = adaptable(model)
    wrong = [
        f"{name}: {adapter.shape} in the adapter, {linear[name]} in the model"
        for name, adapter in state.layers.items()
        if name in linear and linear[name] != adapter.shape
    ]
    for name, adapter in state.layers.items():
        base = open_base(model.get_submodule(name))
        if base is not None and base.kind != adapter.kind:
            wrong.append(f"{name}: {_words(adapter.kind)} in the adapter, {_words(base.kind)} in the model")
    if wrong:
        raise listed(f"{source} is an adapter of another model; these shapes differ", wrong)
    return linear


def _words(kind: str) -> str:
    return kind.replace("_", " ")
