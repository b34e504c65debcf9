"""How a checkpoint keeps the experts that a model holds in one stack: together, or as a weight for each."""

from collections.abc import Collection, Mapping

from ..state import LayerAdapter

# of a stack's name in transformers' models, what its rows are called in checkpoints that keep every expert apart
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "up_proj": (("up_proj",),),
}
_PLACES = ((".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts"))
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
            found = _apart(name, adapter, stored) or {name: adapter}
        weights |= {weight: (name, each) for weight, each in found.items()}
    return weights


def _apart(name: str, adapter: LayerAdapter, stored: Collection[str]) -> dict[str, LayerAdapter]:
    holder, _, field = name.rpartition(".")
    E, O, _ = adapter.shape
    for before, after in _PLACES:
        for parts in _PARTS.get(field, ()):
            place = holder.replace(before, after)
            if not any(each.endswith(f"{_from_first_number(place)}.0.{parts[0]}.weight") for each in stored):
                continue
            size = O // len(parts)
            return {
                f"{place}.{e}.{part}.weight": _share(adapter, e, slice(i * size, (i + 1) * size))
                for e in range(E)
                for i, part in enumerate(parts)
            }
    return {}


def _share(adapter: LayerAdapter, e: int, rows: slice) -> LayerAdapter:
    m = adapter.m_O
    return LayerAdapter(adapter.a_RI[e], adapter.b_OR[e, rows], None if m is None else m[e, rows], adapter.scale)


def _from_first_number(name: str) -> str:
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
