"""The layers that an adapter puts in the place of a model's: chosen, checked and made before the first is put in."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..config import DoraConfig, matches
from ..errors import UsageError, did_you_mean
from ..kernels.cache import Group
from ..layers.base.linear import Dense
from ..layers.base.opaque import Opaque
from ..layers.convolution import DoraConv
from ..layers.embedding import DoraEmbedding, DoraTokenEmbedding
from ..layers.experts import AdaptedExperts
from ..layers.factors.bank import Bank, BankFactors, bank_for
from ..layers.factors.fused import FusedFactors, check_parts
from ..layers.layer import DoraLayer
from ..layers.linear import DoraLinear
from ..layers.magnitude import DoraMagnitude
from ..layers.rows import TrainedRows
from ..layers.wrapper import AdapterLayer, TrainedCopy, base_module
from ..quantization import keep_readable
from ..state import AdapterState
from .fresh import note_frozen_parts
from .registry import error_of
from .scan import Scan, ask_model
from .targets import (
    ALL_LINEAR,
    check_layers,
    choose,
    choose_magnitudes,
    choose_parameters,
    describe_choice,
    match_endings,
    match_modules,
)


class Targets(NamedTuple):
    """What of a model an adapter is for, by name."""

    adapted: list[str]
    """Layers and parameters."""
    whole: list[str]
    """Modules that are trained whole."""
    rows: dict[str, tuple[int, ...]]
    """Tokens that are trained one by one, by the embedding's or head's name."""
    notes: tuple[str, ...] = ()
    """What to say about the choice, a line each."""
    from_file: bool = False
    """Whether the adapter was trained already, so that a tied weight may be changed in one of its places."""
    apart: bool = False
    """Whether modules that share a weight have been trained to weights of their own."""


def choose_by_config(found: Scan, config: DoraConfig) -> Targets:
    """What the settings name.

    Raises:
        UsageError: if something is misspelt or cannot be adapted: all problems of a kind at once.
    """
    whole, layers = _choose_whole(found, config), choose(found, config)
    if config.target_modules in (None, ALL_LINEAR):
        layers = [name for name in layers if not any(f"{name}.".startswith(f"{each}.") for each in whole)]
    chosen = [*layers, *choose_parameters(found, config.target_parameters)]
    _check_patterns(config, chosen)
    rows = _choose_rows(found, config)
    notes = [*describe_choice(found, config, chosen), *note_frozen_parts(found, [*chosen, *whole, *rows])]
    return Targets(chosen, whole, rows, tuple(notes))


def _choose_rows(found: Scan, config: DoraConfig) -> dict[str, tuple[int, ...]]:
    """The modules of `trainable_token_indices`, with their tokens: of a list, the model's input embedding."""
    asked = config.trainable_token_indices
    if not asked:
        return {}
    if not isinstance(asked, dict):
        embedding = ask_model(found.model, "get_input_embeddings")
        own = None if embedding is None else base_module(embedding)
        names = [name for name, module in found.modules.items() if module is own]
        if not names:
            raise UsageError("trainable_token_indices: name the embedding, {embed_tokens: [...]}; this model has none")
        return {names[0]: asked}
    return {
        name: each for end, each in asked.items() for name in match_modules(found, (end,), "trainable_token_indices")
    }


def _make_rows(found: Scan, targets: Targets, taken: Collection[str]) -> dict[str, AdapterLayer]:
    """The layers of tokens trained one by one; what is tied to one of them has the same rows."""
    layers: dict[str, AdapterLayer] = {}
    for name, tokens in targets.rows.items():
        mine = TrainedRows(found.modules[name], tokens)
        layers[name] = mine
        for other in found.other_names(f"{name}.weight"):
            place = other.removesuffix(".weight")
            if place not in targets.rows:
                layers[place] = TrainedRows(found.modules[place], tokens, like=mine)
    if both := sorted(layers.keys() & set(taken)):
        raise UsageError(f"trainable_token_indices: {', '.join(both)} is adapted or trained whole too; leave one out")
    return layers


def _choose_whole(found: Scan, config: DoraConfig) -> list[str]:
    return match_endings(found, config.modules_to_save, "modules_to_save") if config.modules_to_save else []


def _check_patterns(config: DoraConfig, chosen: list[str]) -> None:
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


def choose_by_state(found: Scan, config: DoraConfig, state: AdapterState, source: str) -> Targets:
    """What an adapter that is there already has values for.

    Raises:
        DoraError: if it is an adapter of another model.
    """
    experts = [name for name, layer in state.layers.items() if layer.kind == "experts"]
    chosen = [name for name in found.modules if name in state.layers and name not in experts]
    if absent := sorted(state.layers.keys() - {*chosen, *found.stacks}):
        raise error_of(f"{source} is an adapter of another model; this one has no", absent)
    _check_shapes(found, state, source)
    check_layers(found, chosen, tied=True)
    parameters = choose_parameters(found, experts)
    whole = _choose_saved(found, config, state)
    apart = any(
        not torch.equal(value, state.extra[other])
        for name, value in state.extra.items()
        for other in found.other_names(name)
        if other in state.extra
    )
    return Targets([*chosen, *parameters], whole, _choose_rows(found, config), from_file=True, apart=apart)


def _choose_saved(found: Scan, config: DoraConfig, state: AdapterState) -> list[str]:
    """The modules that a file has whole: as in PEFT, where the ending of a name is enough."""
    chosen = set()
    for key in state.extra:
        parts = key.split(".")
        places = (".".join(parts[:i]) for i in range(1, len(parts)))
        chosen.add(next((p for p in places if p in found.modules and p.endswith(config.modules_to_save)), ""))
    return [name for name in found.modules if name and name in chosen]


def make_layers(found: Scan, config: DoraConfig, targets: Targets) -> tuple[dict[str, AdapterLayer], list[str]]:
    """What takes the place of a model's modules, made before the first is put in, and the biases to train.

    There is a layer for each adapted one, for the holders of adapted parameters, and for each module that is trained
    whole. What trains is as it was.

    Raises:
        UsageError: if one place is in another, or a fused projection is not of the parts that the settings say.
        DoraError: if a layer is of a kind that cannot be adapted.
    """
    _check_whole(found, targets)
    biases = find_biases(found, config, targets)
    flags = [(p, p.requires_grad) for p in found.model.parameters()]
    try:
        layers = _make_layers(found, config, targets)
        keep_readable(found.model)
        return layers, biases
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _make_layers(found: Scan, config: DoraConfig, targets: Targets) -> dict[str, AdapterLayer]:
    parameters = [name for name in targets.adapted if name in found.stacks]
    bases = {name: found.bases[name] for name in targets.adapted if name not in found.stacks}
    holders = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    _check_nested(holders, [*bases, *targets.whole])
    check_parts(bases, config)
    alone = choose_magnitudes(found, config)
    bank = bank_for(list(bases.values()), config)
    adapted = {name: _make_layer(base, name, config, bank, alone=name in alone) for name, base in bases.items()}
    # a quantized weight is dense during its own layer's call alone
    Group(layer.cache for layer in adapted.values() if not isinstance(layer.base, Opaque))
    layers: dict[str, AdapterLayer] = {**adapted}
    for holder in holders:
        inside = [name for name in parameters if name.rpartition(".")[0] == holder]
        layers[holder] = AdaptedExperts(found.modules[holder], inside, config)
    copies = {name: TrainedCopy(found.modules[name]) for name in targets.whole}
    if not targets.apart:
        _tie_copies(copies)
    return {**layers, **copies, **_make_rows(found, targets, [*layers, *copies])}


def _tie_copies(copies: Mapping[str, TrainedCopy]) -> None:
    """Let copies of modules that share a weight share its copy, so that the tie stays."""
    made: dict[int, nn.Parameter] = {}
    for copy in copies.values():
        for key, _ in list(copy.trained.named_parameters()):
            owner, _, child = key.rpartition(".")
            original = copy.base_layer.get_parameter(key)
            kept = made.setdefault(id(original), copy.trained.get_parameter(key))
            setattr(copy.trained.get_submodule(owner), child, kept)


_LAYERS: dict[str, type[DoraLayer]] = {
    "convolution": DoraConv,
    "transposed_convolution": DoraConv,
    "embedding": DoraEmbedding,
}


def _make_layer(base: Dense, name: str, config: DoraConfig, bank: Bank | None, *, alone: bool) -> DoraLayer:
    module, parts, size = base.module, config.fused_parts(name), (config.rank_of(name), config.scale_of(name))
    by_token = base.kind == "embedding" and config.has_magnitude and config.embedding_axis == "token"
    if alone and by_token:
        raise UsageError(f"{name}: magnitude_modules have no lengths of tokens; leave embedding_axis as dimension")
    if alone:
        return DoraMagnitude(module, 1, 1.0, config, base)
    if bank is not None:
        return DoraLinear(module, config.r, 1.0, config, base, BankFactors(base, bank, config.d_initial))
    if parts is not None:
        return DoraLinear(module, *size, config, base, FusedFactors(base, parts, config.init_lora_weights))
    layer = DoraTokenEmbedding if by_token else _LAYERS.get(base.kind, DoraLinear)
    return layer(module, *size, config, base)


def _check_whole(found: Scan, targets: Targets) -> None:
    """Check that each module that is trained whole is a place of its own: a copy of a tied weight is not tied."""
    whole = targets.whole
    problems = [f"{name} is in target_modules too" for name in whole if name in targets.adapted]
    problems += [
        f"{name} is trained whole, and {inside[0]} in it is adapted"
        for name in whole
        if (inside := [layer for layer in targets.adapted if layer.startswith(name + ".")])
    ]
    for name in whole:
        for parameter in [each for each in found.parameters if each.startswith(name + ".")]:
            owners = {each.rpartition(".")[0] for each in found.other_names(parameter)}
            apart = (each for each in owners if not f"{each}.".startswith(name + ".") and each not in whole)
            if not targets.from_file and (others := sorted(apart)):
                problems.append(f"{name} is tied to {', '.join(others)}; a copy of it would break the tie")
    if problems:
        raise UsageError("modules_to_save: " + "; ".join(dict.fromkeys(problems)))


def _check_nested(holders: list[str], others: list[str]) -> None:
    """Check that nothing is in a module whose parameters are adapted: it is a place of its own."""
    if nested := [
        f"{other} is in {holder}" for holder in holders for other in others if other.startswith(holder + ".")
    ]:
        raise UsageError(
            f"target_parameters: {'; '.join(nested)}, whose own parameters are adapted; leave one of the two out"
        )


def find_biases(found: Scan, config: DoraConfig, targets: Targets) -> list[str]:
    """The biases to train, by their name in the base model; a module trained whole has a copy of its own."""
    if config.bias == "none":
        return []
    owned = {f"{name}.bias" for name in targets.adapted}
    biases = {
        name: p
        for name, p in found.parameters.items()
        if name == found.names[id(p)][0]
        and name.endswith("bias")
        and (config.bias == "all" or name in owned)
        and not any(name.startswith(module + ".") for module in targets.whole)
    }
    if small := [name for name, p in biases.items() if p.dtype.itemsize < 4]:
        raise UsageError(
            f"bias: {config.bias!r} trains {small[0]} in {biases[small[0]].dtype}, where small steps are lost; "
            "load the model in float32"
        )
    return list(biases)


def _check_shapes(found: Scan, state: AdapterState, source: str) -> None:
    """Check that every adapted shape and kind is the model's."""
    wrong, kinds = [], []
    for name, adapter in state.layers.items():
        base, stack = found.bases.get(name), found.stacks.get(name)
        shape = base.row_shape if base is not None else None if stack is None else stack.shape
        if shape is not None and adapter.kind == "token_embedding":
            shape = shape[::-1]
        if shape not in (None, adapter.shape):
            wrong.append(f"{name}: {adapter.shape} in the adapter, {shape} in the model")
        if base is not None and base.kind != adapter.kind.removeprefix("token_"):
            kinds.append(f"{name}: {in_words(adapter.kind)} in the adapter, {in_words(base.kind)} in the model")
    if problems := wrong + kinds:
        raise error_of(f"{source} is an adapter of another model; these shapes differ", problems)


def in_words(kind: str) -> str:
    """The kind of a layer, for a person."""
    return kind.replace("_", " ")
