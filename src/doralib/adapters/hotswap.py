"""Another adapter's values in the place of one that is loaded: a compiled model goes on without compiling again."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..functional import dense_row_norm
from ..layers.experts import AdaptedExperts, DoraExperts, Stack
from ..layers.fused import DoraFused
from ..layers.linear import DoraLinear
from ..layers.magnitude import DoraMagnitude
from ..layers.vera import DoraBank, other_banks
from ..state import AdapterState, FusedAdapter, LayerAdapter
from .fsdp import refuse_sharded
from .inference import forget
from .registry import adapter_of, as_own, bias_of, layers_of, listed, parts_of, record_of, state_of
from .save_load import read_adapter
from .scan import adaptable

Model = TypeVar("Model", bound=nn.Module)


def hotswap_adapter(model: Model, path: str | Path, adapter_name: str | None = None) -> Model:
    """Put the values of an adapter's file into an adapter that the model has; shapes and scales stay as they are.

    A smaller rank is filled up with zeros, and another scale is multiplied into B; LoRA goes into a DoRA layer with
    the length that makes its gain 1. Layers and modules that the file does not have become the base model's. Dropout
    and detach_norm stay the loaded adapter's own.

    Args:
        adapter_name: None: the active one.

    Raises:
        DoraError: everything that does not fit: layers that the loaded adapter does not have, a larger rank, magnitudes
            for LoRA layers. Nothing is changed then.
    """
    name, _ = adapter_of(model, adapter_name)
    refuse_sharded(model, "hotswap_adapter", "doralib.load_adapter fills an adapter of the same ranks")
    _, state = read_adapter(path, model)
    shapes = adaptable(model)
    state = replace(state, layers={k: layer.narrowed(shapes.get(k, ())) for k, layer in state.layers.items()})
    layers, into = parts_of(model, name), state_of(model, name)
    state = as_own(layers, state)
    problems = [f"{key}: {name} has no such layer" for key in state.layers.keys() - into.layers.keys()]
    problems += [f"{key}: {name} has no such tensor" for key in state.extra.keys() - into.extra.keys()]
    problems += [
        f"{key}: {tuple(state.extra[key].shape)} in the adapter, {tuple(into.extra[key].shape)} in the model"
        for key in state.extra.keys() & into.extra.keys()
        if state.extra[key].shape != into.extra[key].shape
    ]
    for place in into.layers.keys() & state.layers.keys():
        problems += [f"{place}: {why}" for why in _misfits(layers[place], into.layers[place], state.layers[place])]
    problems += other_banks(into, state)
    if problems:
        raise listed(f"{path} cannot take the place of {name}", sorted(problems))
    _copy(model, name, state)
    forget(model)
    return model


def _misfits(layer: nn.Module, into: LayerAdapter, given: LayerAdapter) -> list[str]:
    """Why one layer's values cannot go into another's."""
    if (given.kind, given.shape) != (into.kind, into.shape):
        return [f"{given.kind} {given.shape} in the adapter, {into.kind} {into.shape} in the model"]
    turned = all(factor.any() for factor in given.factors)
    checks = {
        "is not of the parts of a fused projection that are adapted in the model": (
            isinstance(layer, DoraFused) and not isinstance(given, FusedAdapter)
        ),
        f"rank {given.rank} is larger than the loaded {into.rank}; load the adapter of the larger rank first": (
            turned and given.rank > into.rank
        ),
        "has a magnitude, and the loaded adapter has none": given.m_O is not None and into.m_O is None,
        "turns its rows, but only their lengths are adapted in the model": turned and isinstance(layer, DoraMagnitude),
        "the random matrices of the loaded adapter are not its own": (
            isinstance(layer, DoraBank) and "d" not in given.tensors()
        ),
        "the loaded adapter began as a part of the weight (pissa, olora), and no other fits over that start": (
            getattr(layer, "start_A", None) is not None
        ),
    }
    return [why for why, wrong in checks.items() if wrong]


@torch.no_grad()
def _copy(model: nn.Module, name: str, state: AdapterState) -> None:
    record = record_of(model)
    for place, layer in layers_of(model, name).items():
        if isinstance(layer, DoraLinear):
            _fill(layer, state.layers.get(place))
            continue
        if isinstance(layer, AdaptedExperts):
            for field, stack in layer.stacks.items():
                _fill_stack(stack, Stack(layer.base_layer, field).W_EOI, state.layers.get(f"{place}.{field}"))
            continue
        originals = dict(layer.base_layer.named_parameters())
        for key, p in layer.trained.named_parameters():
            p.copy_(state.extra.get(f"{place}.{key}", originals[key]))
    biases = record.adapters[name].biases
    for bias in biases:
        holder = bias_of(model, bias) if record.shown == name else biases[bias]
        holder.copy_(state.extra.get(bias, record.biases[bias]))


def _fill(layer: DoraLinear, given: LayerAdapter | None) -> None:
    """The values of a layer, or those with which it does nothing."""
    if isinstance(layer, DoraBank):
        for key, p in {"d": layer.vera_lambda_d, "b": layer.vera_lambda_b}.items():
            p.copy_(given.tensors()[key] if given is not None else torch.zeros_like(p))
        n_O = layer.cache.norm(layer.vera_lambda_d, layer.vera_lambda_b, 1.0, detach=True)
    else:
        if not isinstance(layer, DoraMagnitude):
            _fill_factors(layer, given)
        n_O = layer.cache.norm(layer.a_RI, layer.b_OR, layer.scale, detach=True)
    if layer.lora_magnitude_vector is not None:
        m_O = None if given is None else given.tensors().get("m")
        n_O = n_O[layer.rows] if isinstance(layer, DoraFused) else n_O
        # a row of length zero has an infinite norm there
        layer.lora_magnitude_vector.copy_(n_O.masked_fill(n_O.isinf(), 0) if m_O is None else m_O)


def _fill_factors(layer: DoraLinear, given: LayerAdapter | None) -> None:
    if isinstance(layer, DoraFused):
        _fill_parts(layer, given)
        return
    layer.lora_B.zero_()
    if given is not None and given.rank <= layer.r:
        layer.lora_A[given.rank :] = 0
        layer.lora_A[: given.rank] = given.a_RI.to(layer.lora_A)
        layer.lora_B[:, : given.rank] = given.b_OR.to(layer.lora_B) * (given.scale / layer.scale)


def _fill_parts(layer: DoraFused, given: LayerAdapter | None) -> None:
    layer.lora_fused_B.zero_()
    if not isinstance(given, FusedAdapter):
        return
    R = given.stacked_B.shape[1]
    theirs = zip(given.stacked_A.split(R), given.stacked_B.split([len(rows) for rows in given.rows]), strict=True)
    for (a, b), (new_a, new_b) in zip(layer.factors_by_part, theirs, strict=True):
        a[R:] = 0
        a[:R] = new_a.to(a)
        b[:, :R] = new_b.to(b) * (given.scale / layer.scale)


def _fill_stack(stack: DoraExperts, W_EOI: Tensor, given: LayerAdapter | None) -> None:
    A, B, m = stack.lora_A, stack.lora_B, stack.lora_magnitude_vector
    B.zero_()
    if given is not None:
        A[:, given.rank :] = 0
        A[:, : given.rank] = given.a_RI.to(A)
        B[:, :, : given.rank] = given.b_OR.to(B) * (given.scale / stack.scale)
    if m is not None and given is not None and given.m_O is not None:
        m.copy_(given.m_O)
    elif m is not None:
        weights = zip(W_EOI, A, B, strict=True)
        m.copy_(torch.stack([dense_row_norm(W_OI, a, b, stack.scale) for W_OI, a, b in weights]))
