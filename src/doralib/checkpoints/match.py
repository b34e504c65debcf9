"""Which tensor of a checkpoint each part of an adapter belongs to; everything that does not fit is told at once."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapters.experts import find_transposed_experts, find_weights, join_rows, stack_experts
from ..adapters.names import StoredPart, match_names
from ..adapters.spelling import find_stored_spelling
from ..errors import DoraError, nearest
from ..functional import swapped_channels
from ..state import AdapterState, LayerAdapter, RowValues
from .heads import take_new_head


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
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Stored(Protocol):
    """What has to be known of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def code(self) -> str:
        """Its dtype's name."""

    @property
    def plain(self) -> bool:
        """Whether it holds floating-point numbers that mean themselves."""


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
    copies = _find_tied_head(stored, config) if untie else {}
    stored = {**stored, **{head: stored[embedding] for head, embedding in copies.items()}}
    values = _drop_tied_copies(state.extra, stored, config)
    tied_rows = _drop_tied_rows(state.rows, stored, config)
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
    resized = _find_resized({**state.resized, **values}, names, stored)
    sized = {
        name: _Resized(each, tuple(resized[name].shape)) if name in resized else each for name, each in stored.items()
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
    for copy, embedding in copies.items():
        if embedding in rows and not {copy} & {*rows, *layers, *whole}:
            rows[copy] = rows[embedding]
    tie = None if copies or head else _find_stored_tie(stored, config)
    apart = tie is not None and _are_apart(tie, rows, layers, whole)
    untied = bool(copies) or apart
    problems += _find_stored_untied(tie) if tie and apart and not untie else []
    problems += _explain_missing(missing, stored, config)
    problems += _find_misfits(layers, whole, sized)
    problems += _find_not_finite(layers, {**whole, **head}) + _find_bad_rows(rows, sized)
    if len(values) == len(state.extra):
        embeddings = [*whole, *(name for name in layers if layers[name].kind.endswith("embedding"))]
        problems += _find_untied(embeddings, stored, config)
    transposed, undecided = _find_transposed(layers, sized, config)
    problems += _find_uneven(rows, sized) + undecided + bad_parts + _find_lone_parts(values.keys() & match.parts.keys())
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


@dataclass(frozen=True)
class _Resized:
    """A stored tensor with the rows of another vocabulary."""

    stored: Stored
    shape: tuple[int, ...]

    @property
    def code(self) -> str:
        return self.stored.code

    @property
    def plain(self) -> bool:
        return self.stored.plain


def _find_resized(
    values: Mapping[str, Tensor], names: Mapping[str, str], stored: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """The embeddings and heads that have another number of tokens, by their stored names."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if (target := names.get(name, "")).endswith((*_EMBEDDINGS, *_HEADS)):
            (size, *others), (mine, *same) = stored[target].shape or (0,), tuple(value.shape) or (0,)
            found |= {target: value} if others == same and size != mine else {}
    return found


def _find_tied_head(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, str]:
    """The embedding by the name of the head that is tied to it; nothing where the head is stored."""
    embeddings = [name for name in stored if name.endswith(_EMBEDDINGS)]
    if not _is_tied(stored, config) or len(embeddings) != 1:
        return {}
    (embedding,) = embeddings
    front = "language_model." if embedding.startswith("language_model.model.") else ""
    return {front + _HEADS[config.get("model_type") == "gpt_neox"]: embedding}


def _find_stored_tie(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Embedding and head of a model that ties them and has both in its files, as older tools wrote them."""
    inner = config.get("text_config")
    ties = [part.get("tie_word_embeddings") for part in (config, inner if isinstance(inner, dict) else {})]
    embeddings = [name for name in stored if name.endswith(_EMBEDDINGS)]
    heads = [name for name in stored if name.endswith(_HEADS)]
    return (embeddings[0], heads[0]) if True in ties and len(embeddings) == len(heads) == 1 else None


def _are_apart(
    tie: tuple[str, str],
    rows: dict[str, RowValues],
    layers: Mapping[str, LayerAdapter],
    whole: Mapping[str, Tensor],
) -> bool:
    """Whether the adapter changes a tied weight in one of its places only, or otherwise; rows go to both."""
    embedding, head = tie
    if embedding in rows and not {head} & {*rows, *layers, *whole}:
        rows[head] = rows[embedding]
    if not {embedding, head} & {*rows, *layers, *whole}:
        return False
    if embedding in whole and head in whole:
        return not torch.equal(whole[embedding], whole[head])
    return not (embedding in rows and head in rows and _are_equal(rows[embedding], rows[head]))


def _find_stored_untied(tie: tuple[str, str]) -> list[str]:
    return [
        f"{tie[1]}: is tied to {tie[0]} by config.json, and the adapter changes the two differently; merge with "
        "--untie, which says that they are not tied"
    ]


def _drop_tied_rows(
    rows: Mapping[str, RowValues], stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> dict[str, RowValues]:
    """The rows, less those of a tied head that equal the embedding's."""
    kept = dict(rows)
    embeddings = [each for name, each in rows.items() if name.endswith(_EMBEDDINGS)]
    for name, each in rows.items():
        if name.endswith(_HEADS) and _is_tied(stored, config) and any(_are_equal(each, other) for other in embeddings):
            del kept[name]
    return kept


def _are_equal(one: RowValues, other: RowValues) -> bool:
    return torch.equal(one.index_N, other.index_N) and torch.equal(one.rows_ND, other.rows_ND)


def _find_bad_rows(rows: Mapping[str, RowValues], stored: Mapping[str, Stored]) -> list[str]:
    """Rows of another width, of a quantized tensor, with a gap before new ones, or that are no numbers."""
    problems = []
    for name, each in rows.items():
        (V, *width), D = stored[name].shape, each.rows_ND.shape[1]
        last = int(each.index_N.max()) if len(each.index_N) else -1
        if width != [D] or not stored[name].plain:
            problems.append(f"{name}: the adapter has rows of {D}, the checkpoint {stored[name].code} {(V, *width)}")
        elif gap := sorted({*range(V, last)} - {*each.index_N.tolist()}):
            problems.append(f"{name}: trains token {last}, and neither it nor the checkpoint has {gap[0]}")
        elif not bool(each.rows_ND.isfinite().all()):
            problems.append(f"{name}: the adapter holds NaN or infinite rows; merge an earlier checkpoint of the run")
    return problems


def _find_uneven(rows: Mapping[str, RowValues], stored: Mapping[str, Stored]) -> list[str]:
    """An embedding and a head that would have different numbers of tokens, where the adapter changes them."""
    sizes = {name: each.shape[0] for name, each in stored.items() if name.endswith((*_EMBEDDINGS, *_HEADS))}
    for name, each in rows.items():
        sizes[name] = max(sizes[name], int(each.index_N.max()) + 1 if len(each.index_N) else 0)
    changed = {name for name in sizes if isinstance(stored[name], _Resized) or sizes[name] > stored[name].shape[0]}
    ends = {name: sizes[name] for name in sizes if changed}
    if len(set(ends.values())) < 2:
        return []
    return [f"the vocabulary would have several sizes: {', '.join(f'{name} {size}' for name, size in ends.items())}"]


def is_conv1d_model(config: Mapping[str, Any]) -> bool:
    """Whether the model's type is one of those with HF Conv1D layers."""
    return bool(_list_model_types(config) & _CONV1D_MODELS)


def _drop_tied_copies(
    extra: Mapping[str, Tensor], stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The whole tensors, less an output head that equals the trained embedding of a model that ties the two."""
    values = dict(extra)
    embeddings = [value for name, value in extra.items() if name.endswith(_EMBEDDINGS)]
    for name, value in extra.items():
        tied = name.endswith(_HEADS) and _is_tied(stored, config)
        if tied and any(value.shape == other.shape and torch.equal(value, other) for other in embeddings):
            del values[name]
    return values


def _is_tied(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> bool:
    """Whether the output head is not stored because it is the input embedding."""
    has_head = any(name.endswith(_HEADS) for name in stored)
    return not has_head and any(name.endswith(_WITH_HEAD) for name in config.get("architectures") or [])


def _explain_missing(missing: list[str], stored: Mapping[str, Stored], config: Mapping[str, Any]) -> list[str]:
    tied = _is_tied(stored, config)
    hint = f" (the nearest is {near[0]})" if missing and (near := nearest(missing[0], stored, count=1)) else ""
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        hint = f": the base is quantized ({method}); merge into the model in full precision"
    return [
        f"{name}: is tied to the input embedding in this model, so changing it would change both; "
        "merge with --untie, which gives the head a tensor of its own"
        if tied and name.endswith(_HEADS)
        else f"{name}: the checkpoint has no such tensor" + hint * (i == 0)
        for i, name in enumerate(missing)
    ]


def _find_untied(embeddings: list[str], stored: Mapping[str, Stored], config: Mapping[str, Any]) -> list[str]:
    """An embedding trained as a copy of its own cannot go where the output head is the same tensor."""
    return [
        f"{name}: the output head is tied to this embedding, which was trained apart; replacing it would change both; "
        "merge with --untie, which gives the head a tensor of its own"
        for name in embeddings
        if name.endswith(_EMBEDDINGS) and _is_tied(stored, config) and config.get("tie_word_embeddings", True)
    ]


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


def _find_not_finite(layers: Mapping[str, LayerAdapter], values: Mapping[str, Tensor]) -> list[str]:
    tensors = {name: tuple(adapter.tensors().values()) for name, adapter in layers.items()}
    tensors |= {name: (value,) for name, value in values.items()}
    return [
        f"{name}: the adapter holds NaN or infinite numbers; merge an earlier checkpoint of the run"
        for name, each in tensors.items()
        if not all(bool(tensor.isfinite().all()) for tensor in each)
    ]


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
    """model_type of the model and of the models inside it."""
    own = {config["model_type"]} if isinstance(config.get("model_type"), str) else set()
    return own.union(*(_list_model_types(value) for value in config.values() if isinstance(value, dict)))
