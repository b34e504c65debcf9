"""Which tensor of a checkpoint each part of an adapter belongs to; everything that does not fit is told at once."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.experts import find_transposed_experts, find_weights, join_rows, stack_experts
from ..adapters.names import StoredPart, match_names
from ..adapters.spelling import find_stored_spelling
from ..errors import DoraError, nearest
from ..functional import swapped_channels
from ..state import AdapterState, LayerAdapter, RowValues
from .heads import take_new_head
from .safetensors import Stored
from .vocabulary import (
    HEADS,
    Resized,
    are_apart,
    are_equal_rows,
    drop_tied,
    explain_apart,
    find_bad_rows,
    find_resized,
    find_stored_tie,
    find_tied_head,
    find_uneven,
    find_untied,
    is_tied,
    share_rows,
)


def view_as_rows(stored: Tensor, adapter: LayerAdapter, *, transposed: bool) -> Tensor:
    """A whole stored weight as the matrix (O, I) of the rows that the adapter changes; a view where it can be.

    Of experts the stack, (E, O, I).
    """
    if adapter.kind == "experts":
        return stored.mT if transposed else stored
    if adapter.kind == "transposed_convolution":
        return swapped_channels(stored, stored.shape[0] // adapter.shape[1]).flatten(1)
    return stored.flatten(1).T if transposed else stored.flatten(1)


# transformers' models with Conv1D layers, whose weights are stored (in, out), and those layers' names
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True)
class MatchedAdapter:
    """An adapter by the names of a checkpoint's tensors."""

    layers: Mapping[str, LayerAdapter]
    transposed: frozenset[str]
    """Those of ``layers`` whose rows are not stored as rows: HF Conv1D, embeddings, transposed convolutions."""
    values: Mapping[str, Tensor]
    """Tensors that take the place of the checkpoint's."""
    sources: Mapping[str, str]
    """Which of ``adapted`` each of ``layers`` is of: experts that the checkpoint keeps apart share one."""
    adapted: Mapping[str, LayerAdapter]
    """The adapter's layers, in the stacks that the checkpoint has."""
    rows: Mapping[str, RowValues] = field(default_factory=dict)
    """Rows that take the place of the checkpoint's, and beyond its last one are added."""
    resized: Mapping[str, Tensor] = field(default_factory=dict)
    """What the adapter starts from instead of tensors of the checkpoint, which have another number of tokens."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Output heads that the checkpoint does not store, by the embedding that they are tied to and start as."""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    """A classifier's tensors, which the checkpoint does not have, or has for other labels."""
    untied: bool = False
    """Whether the head no longer equals the embedding that it was tied to."""
    parts: Mapping[str, StoredPart] = field(default_factory=dict)
    """By the adapter's layers, which rows of a stored tensor they are of."""


def match_adapter(
    state: AdapterState,
    stored: Mapping[str, Stored],
    config: Mapping[str, Any],
    lengths: Callable[[str, int], Tensor] | None = None,
    *,
    untie: bool = False,
) -> MatchedAdapter:
    """Find every adapted weight and every whole tensor among the stored ones.

    Args:
        stored: the checkpoint's tensors by name.
        config: the model's config.json, or empty.
        lengths: reads the row lengths, (E, O), of a stack of this name with O rows, where some have no adapter.
        untie: whether a head that is tied to the embedding becomes a tensor of its own.

    Raises:
        DoraError: with all names that are not there, all shapes that differ, and everything that cannot be decided.
    """
    copies = find_tied_head(stored, config) if untie else {}
    stored = {**stored, **{head: stored[embedding] for head, embedding in copies.items()}}
    values = drop_tied(state.extra, torch.equal, stored, config)
    tied_rows = drop_tied(state.rows, are_equal_rows, stored, config)
    adapted, _ = stack_experts(state.layers, {name: each.shape for name, each in stored.items()}, lengths)
    wanted = find_weights(adapted, stored)

    def fits(name: str, target: str) -> bool:
        shape = tuple(stored[target].shape)
        if name in wanted:
            return _fits(wanted[name][1].narrowed(shape), shape)
        return name not in values or shape == tuple(values[name].shape)

    together = dict.fromkeys([*wanted, *values, *tied_rows])
    match = match_names(together, stored, fits, lambda: find_stored_spelling(config, stored))
    head = take_new_head(state, {name: each.shape for name, each in stored.items()}, match.found)
    names = {name: target for name, target in match.found.items() if name not in head}
    missing, problems = [name for name in match.missing if name not in head], [*match.problems]
    rows = {names[name]: each for name, each in tied_rows.items() if name in names}
    resized = find_resized({**state.resized, **values}, names, stored)
    sized = {
        name: Resized(each, tuple(resized[name].shape)) if name in resized else each for name, each in stored.items()
    }
    layers = {
        (stored_name := names[key]): adapter.narrowed(tuple(stored[stored_name].shape))
        for key, (_, adapter) in wanted.items()
        if key in names
    }
    sources = {names[key]: source for key, (source, _) in wanted.items() if key in names}
    parts = {wanted[name][0]: part for name, part in match.parts.items() if name in wanted}
    joined, bad_parts = _join_parts(adapted, parts, stored, lengths)
    layers |= joined
    whole = {names[name]: value for name, value in values.items() if name in names}
    tie = None if copies or head else find_stored_tie(stored, config)
    ties = [tie] if tie else [(embedding, copy) for copy, embedding in copies.items()]
    rows = share_rows(ties, rows, {*rows, *layers, *whole})
    apart = tie is not None and are_apart(tie, rows, layers, whole)
    untied = bool(copies) or apart
    problems += [explain_apart(tie)] if tie and apart and not untie else []
    problems += _explain_missing(missing, stored, config)
    problems += _find_misfits(layers, whole, sized)
    problems += find_bad_rows(rows, sized)
    if len(values) == len(state.extra):
        embeddings = [*whole, *(name for name in layers if layers[name].kind.endswith("embedding"))]
        problems += find_untied(embeddings, stored, config)
    transposed, undecided = _find_transposed(layers, sized, config)
    problems += find_uneven(rows, sized) + undecided + bad_parts + _find_lone_parts(values.keys() & match.parts.keys())
    if problems:
        raise DoraError(
            "\n  ".join([f"the adapter does not fit the base model ({len(problems)} problems):", *problems])
        )
    return MatchedAdapter(layers, transposed, whole, sources, adapted, rows, resized, copies, head, untied, parts)


def _join_parts(
    adapted: Mapping[str, LayerAdapter],
    parts: Mapping[str, StoredPart],
    stored: Mapping[str, Stored],
    lengths: Callable[[str, int], Tensor] | None,
) -> tuple[dict[str, LayerAdapter], list[str]]:
    """The adapters of stored tensors that hold several of the model's, and a line for each that cannot be."""
    together: dict[str, dict[int, LayerAdapter]] = {}
    counts = {part.stored: part.count for part in parts.values()}
    for name, part in parts.items():
        together.setdefault(part.stored, {})[part.index] = adapted[name]
    joined, problems = {}, []
    for name, each in together.items():
        (O, *others), count = stored[name].shape, counts[name]
        wrong = [layer.shape for layer in each.values() if layer.shape != (O // count, *others)]
        lacks = len(each) < count and lengths is None
        if wrong or O % count or lacks:
            problems.append(f"{name}: holds {count} layers of the model, and the adapter's shapes are not theirs")
            continue
        joined[name] = join_rows(each, count, partial(_read_lengths, lengths, name, O))
    return joined, problems


def _read_lengths(lengths: Callable[[str, int], Tensor] | None, name: str, num_rows: int) -> Tensor:
    assert lengths is not None
    return lengths(name, num_rows)


def _find_lone_parts(names: Collection[str]) -> list[str]:
    return [f"{name}: is stored together with others, in whose place it cannot come alone" for name in sorted(names)]


def is_conv1d_model(config: Mapping[str, Any]) -> bool:
    """Whether the model's type is one of those with HF Conv1D layers."""
    return bool(_list_model_types(config) & _CONV1D_MODELS)


def _explain_missing(missing: list[str], stored: Mapping[str, Stored], config: Mapping[str, Any]) -> list[str]:
    tied = is_tied(stored, config)
    heads = [name for name in missing if tied and name.endswith(HEADS)]
    problems = [
        f"{name}: is tied to the input embedding in this model, so changing it would change both; "
        "merge with --untie, which gives the head a tensor of its own"
        for name in heads
    ]
    lost = [name for name in missing if name not in heads]
    if lost and "quantization_config" in config:
        # of each layer the same is to be said
        method, more = config["quantization_config"].get("quant_method", "unknown method"), len(lost) - 1
        others = f", nor {more} other{'s' * (more > 1)}" if more else ""
        return [
            *problems,
            f"{lost[0]}: the checkpoint has no such tensor{others}: the base is quantized ({method}); merge into the "
            "model in full precision, with --base",
        ]
    hint = f" (the nearest is {near[0]})" if lost and (near := nearest(lost[0], stored, count=1)) else ""
    return problems + [f"{name}: the checkpoint has no such tensor" + hint * (i == 0) for i, name in enumerate(lost)]


def _find_misfits(
    layers: Mapping[str, LayerAdapter], values: Mapping[str, Tensor], stored: Mapping[str, Stored]
) -> list[str]:
    """Shapes that differ, and stored weights that are not plain numbers."""
    problems = []
    for name, adapter in layers.items():
        shape = stored[name].shape
        if not stored[name].plain:
            problems.append(
                f"{name}: is stored as {stored[name].code}, quantized; merge into the model in full precision"
            )
        elif not _fits(adapter, tuple(shape)):
            problems.append(f"{name}: the adapter needs (out, in) {adapter.shape}, the checkpoint has {shape}")
    for name, value in values.items():
        if stored[name].shape != tuple(value.shape):
            problems.append(f"{name}: the adapter has {tuple(value.shape)}, the checkpoint has {stored[name].shape}")
        elif not stored[name].plain:
            problems.append(f"{name}: is stored as {stored[name].code}, quantized; the adapter's cannot take its place")
    return problems


def _fits(adapter: LayerAdapter, shape: tuple[int, ...]) -> bool:
    if adapter.kind == "experts":
        E, O, I = adapter.shape
        return shape in ((E, O, I), (E, I, O))
    O, I, *taps = adapter.shape
    if adapter.kind == "token_embedding":
        return shape == (O, I)
    if adapter.kind == "linear":
        return shape in ((O, I), (I, O))
    if adapter.kind == "embedding":
        return shape == (I, O)
    if adapter.kind == "convolution":
        return shape == adapter.shape
    # stored (in, out / groups, taps...)
    return len(shape) > 2 and shape[0] % I == 0 and shape == (shape[0], O // (shape[0] // I), *taps)


def _find_transposed(
    layers: Mapping[str, LayerAdapter], stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> tuple[frozenset[str], list[str]]:
    """The weights whose rows are not stored as rows, and those of which it cannot be known.

    Unequal sizes tell. A square weight is transposed where the model's type is known to use Conv1D and the layer has a
    name of one, and is not where the type is another and no unequal weight contradicts.
    """
    others = {name for name, a in layers.items() if a.kind in ("embedding", "transposed_convolution")}
    linear = {name: a for name, a in layers.items() if a.kind == "linear"}
    found, undecided = _find_transposed_linear(linear, stored, config)
    stacks = {name: (tuple(stored[name].shape), a.shape) for name, a in layers.items() if a.kind == "experts"}
    experts, unknown = find_transposed_experts(stacks, _list_model_types(config))
    return frozenset(found | others | experts), undecided + unknown


def _find_transposed_linear(
    layers: Mapping[str, LayerAdapter], stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> tuple[frozenset[str], list[str]]:
    by_shape = {name for name, a in layers.items() if a.shape[0] != a.shape[1] and stored[name].shape == a.shape[::-1]}
    square = [name for name, a in layers.items() if a.shape[0] == a.shape[1]]
    types = _list_model_types(config)
    if is_conv1d_model(config):
        return frozenset(by_shape | {name for name in square if name.split(".")[-2] in _CONV1D_NAMES}), []
    if types and not by_shape:
        return frozenset(), []
    why = f"model_type {', '.join(sorted(types))} is not known to store weights so" if types else "no config.json says"
    others = f" as {min(by_shape)} is" if by_shape else ""
    return frozenset(by_shape), [
        f"{name}: is square, and may be stored (in, out){others} or (out, in): {why}" for name in square
    ]


def _list_model_types(config: Mapping[str, Any]) -> set[str]:
    """model_type of the model and of the models inside it, or what diffusers calls its class."""
    own = {config[key] for key in ("model_type", "_class_name") if isinstance(config.get(key), str)}
    return own.union(*(_list_model_types(value) for value in config.values() if isinstance(value, dict)))
