"""Which class adapts which layer, and what is trained beside the layers."""

from torch import nn

from .bank import Bank, DoraBank, bank_for
from .bases import open_base
from .config import DoraConfig
from .convolutions import DoraConv
from .embeddings import DoraEmbedding, DoraTokenEmbedding
from .errors import UsageError
from .experts import AdaptedExperts, expert_weights
from .fused_layers import DoraFused, refuse_misfits
from .layers import DoraLinear, TrainedCopy
from .magnitudes import DoraMagnitude
from .targets import magnitudes

Wrapper = DoraLinear | TrainedCopy | AdaptedExperts


def wrappers_for(model: nn.Module, config: DoraConfig, chosen: list[str], whole: list[str]) -> dict[str, Wrapper]:
    """What takes the place of a module, by its name: for each chosen layer, for the holders of chosen parameters, and
    for each module that is trained whole.

    Raises:
        UsageError: if a fused projection is not of the parts that the settings say.
        DoraError: if a layer is of a kind that cannot be adapted.
    """
    weights = expert_weights(model)
    parameters, chosen = [n for n in chosen if n in weights], [n for n in chosen if n not in weights]
    refuse_misfits(model, config, chosen)
    alone = set(magnitudes(model, config))
    bank = bank_for([model.get_submodule(name) for name in chosen], config)
    wrappers: dict[str, Wrapper] = {
        name: _adapted_layer(model.get_submodule(name), name, config, bank, alone=name in alone) for name in chosen
    }
    for holder in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
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


def refuse_whole(model: nn.Module, chosen: list[str], whole: list[str]) -> None:
    """Say everything that stands in the way of training these modules whole.

    Raises:
        UsageError: if anything does.
    """
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(name)
    problems = [
        f"{name} is in target_modules too" if each == name else f"{name} is trained whole, and {each} in it is adapted"
        for name in whole
        for each in chosen
        if each == name or each.startswith(f"{name}.")
    ]
    for name in whole:
        inside = {name, *(f"{name}.{n}" for n, _ in model.get_submodule(name).named_modules())}
        for p in model.get_submodule(name).parameters():
            if others := owners[id(p)] - inside:
                problems.append(f"{name} is tied to {', '.join(sorted(others))}; a copy of it would break the tie")
    if problems:
        raise UsageError("modules_to_save: " + "; ".join(dict.fromkeys(problems)))


def bias_names(model: nn.Module, config: DoraConfig, chosen: list[str]) -> list[str]:
    """The biases to train, by their name in the adapted model."""
    if config.bias == "none":
        return []
    owned = {f"{name}.bias": f"{name}.base_layer.bias" for name in chosen}
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and (config.bias == "all" or n in owned)}
    if small := [name for name, p in biases.items() if p.dtype.itemsize < 4]:
        raise UsageError(
            f"bias: {config.bias!r} trains {small[0]} in {biases[small[0]].dtype}, where small steps are lost; "
            "load the model in float32"
        )
    return [owned.get(name, name) for name in biases]
