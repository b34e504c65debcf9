"""An adapter by the names of a live model."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..config import DoraConfig, matches
from ..state import AdapterState, FusedValues, LayerAdapter, RowValues
from .experts import find_weights, share_rows, stack_experts
from .names import match_names
from .registry import error_of
from .scan import Scan
from .spelling import find_live_spelling


def match_model(found: Scan, config: DoraConfig, state: AdapterState) -> tuple[DoraConfig, AdapterState]:
    """The adapter with the model's own names, of which its file may have older ones or those of another wrapper.

    What the model does not have keeps its name. Settings that go by names say the new ones.

    Raises:
        DoraError: if a name may mean several layers.
    """
    stacks = {name: stack.shape for name, stack in found.stacks.items()}
    shapes = {name: tuple(p.shape) for name, p in found.parameters.items()}
    shapes |= stacks | {f"{name}.weight": base.row_shape for name, base in found.bases.items()}
    divided, whole, sources = _divide(found, state, shapes)
    stacked, parents = stack_experts(divided, shapes, partial(_read_lengths, found))
    wanted = find_weights(stacked, shapes)

    def fits(name: str, target: str) -> bool:
        if name not in wanted:
            return name not in whole or shapes[target] == tuple(whole[name].shape)
        return _row_shape(wanted[name][1].narrowed(shapes[target])) == shapes[target]

    tensors = dict.fromkeys([*whole, *state.rows, *state.resized])
    names = [*wanted, *(name for name in tensors if name not in wanted)]
    match = match_names(names, shapes, fits, partial(find_live_spelling, found.model))
    if match.problems:
        raise error_of("it cannot be told which layers the adapter belongs to", match.problems)
    layers, origins = {}, {}
    for name, (source, layer) in wanted.items():
        place = match.found.get(name, name).removesuffix("" if layer.kind == "experts" else ".weight")
        layers[place] = layer.narrowed(shapes.get(f"{place}.weight", ()))
        stacked_from = [old for old, parent in parents.items() if parent == source]
        origins[place] = stacked_from or [sources.get(source, source)]
    extra = {match.found.get(name, name): value for name, value in whole.items()}
    rows = _drop_tied(found, {match.found.get(name, name): value for name, value in state.rows.items()})
    resized = {match.found.get(name, name): value for name, value in state.resized.items()}
    if layers.keys() != state.layers.keys() or {*extra, *rows} != {*state.extra, *state.rows}:
        config = _rename_settings(config, state, match.found, layers, origins)
        tokens = {name.removesuffix(".weight"): tuple(each.index_N.tolist()) for name, each in rows.items()}
        config = config.model_copy(update={"trainable_token_indices": tokens or ()})
    return config, replace(state, layers=layers, extra=extra, rows=rows, resized=resized)


def _divide(
    found: Scan, state: AdapterState, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, LayerAdapter], dict[str, Tensor], dict[str, str]]:
    """The layers and whole tensors, those divided that the model has in parts; also the layer that each part is of."""
    layers, whole = dict(state.layers), dict(state.extra)
    sources: dict[str, str] = {}
    strange = [name for name, layer in layers.items() if layer.kind == "linear" and f"{name}.weight" not in shapes]
    if not strange or (spelling := find_live_spelling(found.model)) is None:
        return layers, whole, sources
    for name in strange:
        targets = spelling.split(f"{name}.weight")
        if targets and all(target in shapes for target in targets):
            new = [target.removesuffix(".weight") for target in targets]
            layers |= dict(zip(new, share_rows(layers.pop(name), len(new)), strict=True))
            sources |= dict.fromkeys(new, name)
    for name in state.extra:
        targets = spelling.split(name) if name not in shapes else ()
        if targets and all(target in shapes for target in targets):
            whole |= dict(zip(targets, whole.pop(name).chunk(len(targets)), strict=True))
    return layers, whole, sources


def _drop_tied(found: Scan, rows: dict[str, RowValues]) -> dict[str, RowValues]:
    """The rows, less those of a weight that is another's too and has the same."""
    kept: dict[str, RowValues] = {}
    for name in sorted(rows, key=lambda name: [*found.parameters, name].index(name)):
        mine, others = rows[name], [kept[other] for other in found.other_names(name) if other in kept]
        if not any(torch.equal(mine.index_N, o.index_N) and torch.equal(mine.rows_ND, o.rows_ND) for o in others):
            kept[name] = mine
    return kept


def _row_shape(layer: LayerAdapter) -> tuple[int, ...]:
    return layer.shape[::-1] if layer.kind == "token_embedding" else layer.shape


def _read_lengths(found: Scan, name: str, _num_rows: int) -> Tensor:
    """Of the rows of a stack, (E, O)."""
    return torch.stack([F.row_norm_sq(W_OI).sqrt() for W_OI in found.stacks[name].W_EOI.detach()])


def _rename_settings(
    config: DoraConfig,
    before: AdapterState,
    names: Mapping[str, str],
    layers: Mapping[str, LayerAdapter],
    origins: Mapping[str, list[str]],
) -> DoraConfig:
    """The settings with every layer by its whole name in the model."""
    first = {name: origin[0] for name, origin in origins.items()}
    stacks = [name for name, layer in layers.items() if layer.kind == "experts"]
    changes: dict[str, Any] = {
        "target_modules": tuple(name for name in layers if name not in stacks),
        "target_parameters": tuple(stacks),
        "exclude_modules": None,
        "modules_to_save": _rename_modules(config.modules_to_save, before, names),
    }
    if not config.has_bank:
        fused = [name for name, layer in layers.items() if isinstance(layer.values, FusedValues)]
        ranks = {name: config.rank_of(first[name]) if name in fused else layer.rank for name, layer in layers.items()}
        roots = {name: ranks[name] ** 0.5 if config.use_rslora else ranks[name] for name in layers}
        changes |= {
            "rank_pattern": {name: r for name, r in ranks.items() if r != config.r},
            "alpha_pattern": {
                name: layer.scale * roots[name]
                for name, layer in layers.items()
                if not abs(layer.scale * roots[name] - config.lora_alpha) <= 1e-6 * config.lora_alpha
            },
            "fused_modules": {name: parts for name in layers if (parts := config.fused_parts(first[name]))},
            "magnitude_modules": tuple(name for name in layers if _is_named(first[name], config.magnitude_modules)),
        }
    return config.model_copy(update=changes)


def _is_named(name: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return matches(names, name)
    return any(name == each or name.endswith(f".{each}") for each in names)


def _rename_modules(modules: tuple[str, ...], before: AdapterState, names: Mapping[str, str]) -> tuple[str, ...]:
    """Modules saved whole, by the new names of their tensors."""
    renamed: dict[str, dict[str, None]] = defaultdict(dict)
    for old in before.extra:
        parts, new = old.split("."), names.get(old, old)
        places = [(".".join(parts[:i]), "." + ".".join(parts[i:])) for i in range(1, len(parts))]
        for module, (place, inside) in itertools.product(modules, places):
            if _is_named(place, (module,)) and new.endswith(inside):
                renamed[module][new.removesuffix(inside)] = None
    return tuple(dict.fromkeys(new for module in modules for new in renamed[module] or {module: None}))
