"""Experts that one side holds in a stack and the other as a weight for each: a model, a checkpoint, an adapter."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor

from ..state import ExpertsValues, LayerAdapter

# of a stack's name in transformers' models, what its rows are called in checkpoints that keep every expert apart
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),
}
_PLACES = ((".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts"))
# a layer that is one expert's
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
# transformers' models that store (experts, in, out)
_TRANSPOSED = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})


def find_weights(layers: Mapping[str, LayerAdapter], stored: Collection[str]) -> dict[str, tuple[str, LayerAdapter]]:
    """The adapted layer, and the adapter of this weight, by the names of the tensors that are changed.

    A stack of experts goes by its own name, or by the name of every expert's weight, with that expert's share, where
    the checkpoint keeps them apart: rows do not depend on each other, so each is merged alone.
    """
    weights: dict[str, tuple[str, LayerAdapter]] = {}
    for name, adapter in layers.items():
        found = {f"{name}.weight": adapter}
        if adapter.kind == "experts":
            found = _split_experts(name, adapter, stored) or {name: adapter}
        weights |= {weight: (name, each) for weight, each in found.items()}
    return weights


def _split_experts(name: str, adapter: LayerAdapter, stored: Collection[str]) -> dict[str, LayerAdapter]:
    holder, _, field = name.rpartition(".")
    E, O, _ = adapter.shape
    for before, after in _PLACES:
        for parts in _PARTS.get(field, ()):
            place = holder.replace(before, after)
            if not any(each.endswith(f"{_strip_prefix(place)}.0.{parts[0]}.weight") for each in stored):
                continue
            size = O // len(parts)
            return {
                f"{place}.{e}.{part}.weight": _take_share(adapter, e, slice(i * size, (i + 1) * size))
                for e in range(E)
                for i, part in enumerate(parts)
            }
    return {}


def _take_share(adapter: LayerAdapter, e: int, rows: slice) -> LayerAdapter:
    m = adapter.m_O
    return LayerAdapter(adapter.a_RI[e], adapter.b_OR[e, rows], None if m is None else m[e, rows], adapter.scale)


Lengths = Callable[[str, int], Tensor]


def stack_experts(
    layers: Mapping[str, LayerAdapter], known: Mapping[str, Sequence[int]], lengths: Lengths | None
) -> tuple[dict[str, LayerAdapter], dict[str, str]]:
    """Put layers that are one expert's each into the stacks that a model has instead; all others stay as they are.

    Also the stack by the name of each layer that went into it. Rows do not depend on each other, so this is the same
    adapter: A of the parts (gate, up) one below the other, B with a block for each. Experts and parts without a layer
    keep their rows.

    Args:
        known: the shapes of the model's weights by name.
        lengths: reads the row lengths of a stack of this name with O rows, (E, O).
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name in known:
        ends[_strip_prefix(name)].append(name)
    groups: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name in layers:
        if (match := _EXPERT.fullmatch(name)) and f"{_strip_prefix(name)}.weight" not in ends:
            groups[match[1]][int(match[2]), match[3]] = name
    stacks: dict[str, LayerAdapter] = {}
    source: dict[str, str] = {}
    for holder, named in groups.items():
        for place, field, choices in _list_stacks(holder):
            stored = ends.get(_strip_prefix(f"{place}.{field}"), [])
            parts = next((each for each in choices if any(part in each for _, part in named)), None)
            if not stored or parts is None or f"{place}.{field}" in stacks:
                continue
            mine = {key: layers[name] for key, name in named.items() if key[1] in parts}
            made = _stack(mine, parts, stored[0], tuple(known[stored[0]]), lengths)
            if made is not None:
                stacks[f"{place}.{field}"] = made
                source |= {named[key]: f"{place}.{field}" for key in mine}
    return {**{name: layer for name, layer in layers.items() if name not in source}, **stacks}, source


def _list_stacks(holder: str) -> Iterator[tuple[str, str, tuple[tuple[str, ...], ...]]]:
    """The stacks that experts of this place may be in: place and name, and what its rows are called one by one."""
    for after, before in _PLACES:
        place = holder.replace(before, after) if holder.endswith(before) else holder
        for field, choices in _PARTS.items():
            yield place, field, choices


def _stack(
    layers: Mapping[tuple[int, str], LayerAdapter],
    parts: Sequence[str],
    name: str,
    shape: tuple[int, ...],
    lengths: Lengths | None,
) -> LayerAdapter | None:
    """The stack of these layers, by expert and part; None where the model's of this name is not for them."""
    one = next(iter(layers.values()))
    (O, I), E, P = one.shape, shape[0], len(parts)
    if sorted(shape[1:]) != sorted((P * O, I)) or any(layer.shape != (O, I) for layer in layers.values()):
        return None
    with_m = any(layer.m_O is not None for layer in layers.values())
    m_EPO = None
    if with_m and len(layers) < E * P:
        if lengths is None:
            return None
        m_EPO = lengths(name, P * O).reshape(E, P, O)
    placed = {(e, parts.index(part)): layer for (e, part), layer in layers.items()}
    values, scale = _put_together(placed, (E, P), m_EPO)
    return LayerAdapter(values=values, scale=scale)


def join_rows(parts: Mapping[int, LayerAdapter], count: int, lengths: Callable[[], Tensor]) -> LayerAdapter:
    """One layer whose rows are those of several, one after the other; rows of none of them stay.

    Args:
        parts: by their place among the ``count`` equal shares of the rows.
        lengths: reads the row lengths of the whole, (O,), where a share has no adapter.
    """
    with_m, shares = any(layer.m_O is not None for layer in parts.values()), len(parts)
    m_EPO = lengths().reshape(1, count, -1) if with_m and shares < count else None
    values, scale = _put_together({(0, i): layer for i, layer in parts.items()}, (1, count), m_EPO)
    return LayerAdapter(values.a_RI[0], values.b_OR[0], None if values.m_O is None else values.m_O[0], scale)


def _put_together(
    layers: Mapping[tuple[int, int], LayerAdapter], size: tuple[int, int], m_EPO: Tensor | None
) -> tuple[ExpertsValues, float]:
    """A of each expert's parts one below the other, B with a block for each, and the scale of all.

    Args:
        m_EPO: lengths of the rows without a layer.
    """
    one, (E, P) = next(iter(layers.values())), size
    (O, I), R = one.shape, max(layer.rank for layer in layers.values())
    scales = {layer.scale for layer in layers.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    a_EPRI, b_EPOPR = one.a_RI.new_zeros(E, P, R, I), one.b_OR.new_zeros(E, P, O, P, R)
    if m_EPO is not None:
        m_EPO = m_EPO.to(one.a_RI).clone()
    elif any(layer.m_O is not None for layer in layers.values()):
        m_EPO = one.a_RI.new_zeros(E, P, O)
    for (e, p), layer in layers.items():
        a_EPRI[e, p, : layer.rank] = layer.a_RI
        b_EPOPR[e, p, :, p, : layer.rank] = layer.b_OR * (layer.scale / scale)
        if m_EPO is not None and layer.m_O is not None:
            m_EPO[e, p] = layer.m_O
    m_EO = None if m_EPO is None else m_EPO.flatten(1)
    return ExpertsValues(a_EPRI.flatten(1, 2), b_EPOPR.flatten(3).flatten(1, 2), m_EO), scale


def share_rows(layer: LayerAdapter, count: int) -> list[LayerAdapter]:
    """Equal shares of a layer's rows, each a layer of its own with the same A."""
    size = layer.shape[0] // count
    m = layer.m_O
    return [
        LayerAdapter(layer.a_RI, layer.b_OR[rows], None if m is None else m[rows], layer.scale)
        for rows in (slice(i * size, (i + 1) * size) for i in range(count))
    ]


def _strip_prefix(name: str) -> str:
    """Without the prefix, which a checkpoint may spell differently."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def find_transposed_experts(
    stacks: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], types: Collection[str]
) -> tuple[set[str], list[str]]:
    """The stacks that are stored (experts, in, out), and a line for each of which it cannot be known.

    Unequal sizes tell, of square stacks beside them too; else the model's type.

    Args:
        stacks: the stored shape and (E, O, I), by name.
        types: model_type of the model and of the models inside it.
    """
    uneven = {name: shape == (E, I, O) for name, (shape, (E, O, I)) in stacks.items() if O != I}
    square = [name for name in stacks if name not in uneven]
    found = {name for name, turned in uneven.items() if turned}
    if len(set(uneven.values())) == 1:
        return found | (set(square) if found else set()), []
    if types and not uneven:
        return (set(square) if _TRANSPOSED & set(types) else set()), []
    return found, [f"{name}: is square, and may be stored (experts, in, out) or (experts, out, in)" for name in square]
