"""The layers that an adapter puts in place of a plain model's: chosen, checked and made before the first is put in."""

from torch import nn

from ..config import DoraConfig, matches
from ..errors import DoraError, UsageError, did_you_mean
from ..kernels.cache import Group
from ..layers.base.registry import open_base
from ..layers.convolution import DoraConv
from ..layers.embedding import DoraEmbedding, DoraTokenEmbedding
from ..layers.experts import AdaptedExperts
from ..layers.fused import DoraFused, refuse_misfits
from ..layers.linear import DoraLinear
from ..layers.magnitude import DoraMagnitude
from ..layers.multi_adapter import Wrapper
from ..layers.vera import Bank, DoraBank, bank_for
from ..layers.wrapper import TrainedCopy
from ..quantization import keep_readable
from ..state import AdapterState
from .registry import listed
from .scan import adaptable, expert_weights
from .targets import choose, choose_parameters, magnitudes, matching, refuse


def chosen_by_config(model: nn.Module, config: DoraConfig) -> tuple[list[str], list[str]]:
    """Names of the layers and parameters to adapt and of the modules to train whole, on a plain model."""
    chosen = [*choose(model, config), *choose_parameters(model, config.target_parameters)]
    _refuse_idle_patterns(config, chosen)
    return chosen, matching(model, config.modules_to_save, "modules_to_save") if config.modules_to_save else []


def _refuse_idle_patterns(config: DoraConfig, chosen: list[str]) -> None:
    """A misspelt key would leave its layers at the common rank, in silence."""
    known = dict.fromkeys(name.rpartition(".")[2] for name in chosen)
    problems = [
        f"{field}: {key!r} is none of the adapted layers{did_you_mean(key, known)}"
        for field, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for key in keys
        if not any(matches(key, name) for name in chosen)
    ]
    if problems:
        raise UsageError("\n".join([*problems, f"  the adapted layers end in {', '.join(known)}"]))


def chosen_by_state(
    model: nn.Module, config: DoraConfig, state: AdapterState, source: str
) -> tuple[list[str], list[str]]:
    """The same for an adapter that is there already."""
    experts = tuple(name for name, layer in state.layers.items() if layer.kind == "experts")
    chosen = [name for name, _ in model.named_modules() if name in state.layers and name not in experts]
    if absent := sorted(state.layers.keys() - {*chosen, *expert_weights(model)}):
        raise listed(f"{source} is an adapter of another model; this one has no", absent)
    refuse(model, chosen, _shapes_that_fit(source, state, model))
    chosen += choose_parameters(model, experts)
    return chosen, matching(model, config.modules_to_save, "modules_to_save") if config.modules_to_save else []


def wrappers_for(
    model: nn.Module, config: DoraConfig, chosen: list[str], whole: list[str]
) -> tuple[dict[str, Wrapper], list[str]]:
    """What takes the place of a plain model's modules, made before the first is put in, and the biases to train.

    There is a wrapper for each chosen layer, for the holders of chosen parameters, and for each module that is trained
    whole. A refusal changes nothing.

    Raises:
        UsageError: if one place is in another, or a fused projection is not of the parts that the settings say.
        DoraError: if a layer is of a kind that cannot be adapted.
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
    weights = expert_weights(model)
    parameters, chosen = [n for n in chosen if n in weights], [n for n in chosen if n not in weights]
    holders = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    _refuse_nested(holders, [*chosen, *whole])
    refuse_misfits(model, config, chosen)
    alone = set(magnitudes(model, config))
    bank = bank_for([model.get_submodule(name) for name in chosen], config)
    wrappers: dict[str, Wrapper] = {
        name: _adapted_layer(model.get_submodule(name), name, config, bank, alone=name in alone) for name in chosen
    }
    Group(layer.cache for layer in wrappers.values() if isinstance(layer, DoraLinear))
    for holder in holders:
        inside = [name for name in parameters if name.rpartition(".")[0] == holder]
        wrappers[holder] = AdaptedExperts(model.get_submodule(holder), inside, config)
    return wrappers | {name: TrainedCopy(model.get_submodule(name)) for name in whole}


_LAYERS: dict[str, type[DoraLinear]] = {
    "convolution": DoraConv,
    "transposed_convolution": DoraConv,
    "embedding": DoraEmbedding,
}


def _adapted_layer(module: nn.Module, name: str, config: DoraConfig, bank: Bank | None, *, alone: bool) -> DoraLinear:
    base, parts = open_base(module), config.fused_parts(name)
    by_token = (
        base is not None and base.kind == "embedding" and config.has_magnitude and config.embedding_axis == "token"
    )
    if alone and by_token:
        raise UsageError(f"{name}: magnitude_modules have no lengths of tokens; leave embedding_axis as dimension")
    if alone:
        return DoraMagnitude(module, 1, 1.0, config)
    if bank is not None:
        return DoraBank(module, bank, config)
    if parts is not None:
        return DoraFused(module, parts, config.rank_of(name), config.scale_of(name), config)
    if by_token:
        return DoraTokenEmbedding(module, config.rank_of(name), config.scale_of(name), config)
    layer = DoraLinear if base is None else _LAYERS.get(base.kind, DoraLinear)
    return layer(module, config.rank_of(name), config.scale_of(name), config)


def _refuse_whole(model: nn.Module, chosen: list[str], whole: list[str]) -> None:
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(name)
    problems = [f"{name} is in target_modules too" for name in whole if name in chosen]
    problems += [
        f"{name} is trained whole, and {held[0]} in it is adapted"
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


def _refuse_nested(holders: list[str], others: list[str]) -> None:
    """A module whose parameters are adapted is a place of its own: nothing in it can be another."""
    if nested := [
        f"{other} is in {holder}" for holder in holders for other in others if other.startswith(holder + ".")
    ]:
        raise UsageError(
            f"target_parameters: {'; '.join(nested)}, whose own parameters are adapted; leave one of the two out"
        )


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
    known = linear | {name: weight.shape for name, weight in expert_weights(model).items()}
    for name in state.layers.keys() & linear.keys():
        if state.layers[name].kind == "token_embedding":
            known[name] = known[name][::-1]
    wrong = [
        f"{name}: {adapter.shape} in the adapter, {known[name]} in the model"
        for name, adapter in state.layers.items()
        if name in known and known[name] != adapter.shape
    ]
    for name in state.layers.keys() & linear.keys():
        adapter, base = state.layers[name], open_base(model.get_submodule(name))
        if base is not None and base.kind != adapter.kind.removeprefix("token_"):
            wrong.append(f"{name}: {in_words(adapter.kind)} in the adapter, {in_words(base.kind)} in the model")
    if wrong:
        raise listed(f"{source} is an adapter of another model; these shapes differ", wrong)
    return linear


def in_words(kind: str) -> str:
    """The kind of a layer, for a person."""
    return kind.replace("_", " ")
