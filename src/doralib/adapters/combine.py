"""Adapters of a model combined in weight space: each contributes its own merged change."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import DoraConfig
from ..errors import UsageError
from ..formats.tensors import make_config
from ..layers.layer import DoraLayer
from ..state import AdapterState, LayerAdapter
from .adapt import Model
from .build import Targets, find_biases
from .registry import adapter_of, base_biases, config_of, error_of, layers_of, parts_of, state_of
from .save_load import add_state
from .scan import Scan


def add_weighted_adapter(model: Model, adapters: Mapping[str, float], adapter_name: str) -> Model:
    """Put an adapter beside the others that changes every weight by the weighted sum of what they change it.

    V = W + Σ w_i (V_i - W), which one DoRA adapter says exactly (`functional.combined_factors`); its rank is the sum
    of theirs. LoRA alone stays LoRA. What was trained whole (modules_to_save, biases) is combined in the same way,
    T + Σ w_i (T_i - T). The new adapter is like any other: `set_adapter`, `save_adapter`.

    Raises:
        UsageError: for an unknown name, a weight that is no number, or a name that is taken.
        DoraError: if there is a row that no adapter can say: the whole weight row is cancelled and a change is left.
    """
    if not adapters or not all(math.isfinite(weight) for weight in adapters.values()):
        raise UsageError(f"add_weighted_adapter needs a finite weight by each adapter's name, got {dict(adapters)}")
    for name in adapters:
        adapter_of(model, name)
    _check_mixed(model, adapters)
    _check_kinds(model, adapters)
    layers = _combine_layers(model, adapters)
    configs = [config_of(model, name) for name in adapters]
    biases = [config.bias for config in configs]
    whole = {place for name in adapters for place, layer in layers_of(model, name).items() if layer.trains_whole}
    by_token = any(layer.kind == "token_embedding" for layer in layers.values())
    config = make_config(
        layers,
        embedding_axis="token" if by_token else "dimension",
        modules_to_save=tuple(sorted(whole)),
        bias=next((each for each in ("all", "lora_only") if each in biases), "none"),
        dropout_mode=configs[0].dropout_mode,
    )
    found = Scan(model)
    extra = _combine_tensors(found, adapters, config, sorted(whole))
    add_state(found, adapter_name, config, AdapterState(layers, extra), "the combination")
    return model


@torch.no_grad()
def _combine_layers(model: nn.Module, adapters: Mapping[str, float]) -> dict[str, LayerAdapter]:
    by_place: dict[str, list[tuple[float, DoraLayer]]] = {}
    for name, weight in adapters.items():
        for place, layer in parts_of(model, name).items():
            assert isinstance(layer, DoraLayer)
            by_place.setdefault(place, []).append((weight, layer))
    # PEFT's file has a magnitude in every layer or in none
    with_m = any(layer.lora_magnitude_vector is not None for layers in by_place.values() for _, layer in layers)
    combined, lost = {}, []
    for place, layers in by_place.items():
        made = _combine_layer(layers, with_m=with_m)
        if made.m_O is not None and made.m_O.isnan().any():
            lost.append(f"{place}: {int(made.m_O.isnan().sum())} rows")
        combined[place] = made
    if lost:
        raise error_of("the weights cancel whole rows of W and leave a change, which no adapter can say", lost)
    return combined


def _combine_layer(layers: list[tuple[float, DoraLayer]], *, with_m: bool) -> LayerAdapter:
    base, norm = layers[0][1].base, layers[0][1].cache
    parts = []
    for weight, layer in layers:
        (a_RI, b_OR), s = layer.state().factors, layer.scale
        keep = slice(None) if b_OR.any() and a_RI.any() else slice(0, 0)
        parts.append(F.Share(weight, a_RI[keep], b_OR[:, keep], layer.gain(), s))
    a_RI, b_OR, G_O = F.combined_factors(parts)
    if not len(a_RI):
        a_RI, b_OR = a_RI.new_zeros(1, base.shape[1]), b_OR.new_zeros(base.shape[0], 1)
    dtype, (O, *row) = F.sum_dtype(base.dtype), base.row_shape
    a, b = a_RI.to(dtype), b_OR.to(dtype)
    m_O = None
    if with_m:
        # by the norm that the layer itself will take, so that its gain is G to the last bits
        m_O = (G_O * base.adapted_row_norm(norm.base_norm_sq(), a, b, 1.0)).to(dtype)
    return LayerAdapter(a.view(-1, *row), b.view(O, -1, *(1 for _ in row[1:])), m_O, 1.0, base.kind)


def _combine_tensors(
    found: Scan, adapters: Mapping[str, float], config: DoraConfig, whole: list[str]
) -> dict[str, Tensor]:
    """What was trained whole."""
    states = {name: state_of(found.model, name).extra for name in adapters}
    layers = sorted({place for name in adapters for place in layers_of(found.model, name)} - set(whole))
    names = {key for extra in states.values() for key in extra} | {*find_biases(found, config, Targets(layers, whole))}
    with base_biases(found.model):
        base = {name: found.parameters[name].detach().double() for name in sorted(names)}
    combined = {}
    for key, T in base.items():
        changes = [w * (states[name][key].to(T) - T) for name, w in adapters.items() if key in states[name]]
        combined[key] = torch.stack([T, *changes]).sum(0).float()
    return combined


def _check_mixed(model: nn.Module, adapters: Mapping[str, float]) -> None:
    """Check that no module is trained whole by one adapter and turned by another: its change would be of both kinds."""
    layers = [(place, layer) for name in adapters for place, layer in layers_of(model, name).items()]
    whole = {place for place, layer in layers if layer.trains_whole}
    if both := sorted(whole & {place for place, layer in layers if not layer.trains_whole}):
        raise error_of("one adapter trains these whole and another adapts them; they cannot be combined", both)


def _check_kinds(model: nn.Module, adapters: Mapping[str, float]) -> None:
    """Check that there are no stacks of experts, and no embeddings with lengths of tokens here, of dimensions there."""
    kinds = {(place, part.kind) for name in adapters for place, part in parts_of(model, name).items()}
    problems = [
        f"{place}: a stack of experts; merge the adapters into a checkpoint (doralib merge)"
        for place, kind in sorted(kinds)
        if kind == "experts"
    ]
    if len({kind for _, kind in kinds if kind.endswith("embedding")}) > 1:
        problems.append("some embeddings have a length for each token and others for each dimension")
    if problems:
        raise error_of("these adapters cannot be combined", problems)
