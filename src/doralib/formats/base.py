"""What a file format is: tensors and settings to an adapter's state and back; and what formats share."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError, UsageError
from ..state import MAGNITUDE, AdapterState, LayerAdapter


@dataclass(frozen=True)
class RawAdapter:
    """A file as it stands."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The JSON beside it, if there is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Words inside a safetensors file."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """doralib_config.json beside it: what PEFT's files have no word for."""


@dataclass(frozen=True)
class Hints:
    """What the caller knows and a file may not say."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Weights of the base model by module name; a pipeline's under ``unet.``, ``text_encoder.`` and so on."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The base model's config.json."""
    alpha: float | None = None
    """lora_alpha, for files that forget it."""
    component: str | None = None
    """The part of a pipeline that the adapter belongs to, e.g. ``unet``."""
    lengths: Callable[[AdapterState], Mapping[str, Tensor]] | None = None
    """Length of each row of W + s B A by layer, (O,): reads the base model's weights."""


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter from a file."""

    config: DoraConfig
    state: AdapterState
    notes: tuple[str, ...] = ()
    """What had to be assumed, for a person."""


@dataclass(frozen=True)
class Format:
    """One tool's files."""

    name: str
    title: str
    """For a person."""
    detect: Callable[[RawAdapter], bool]
    read: Callable[[RawAdapter, Hints], ParsedAdapter]
    write: Callable[[DoraConfig, AdapterState, Hints], RawAdapter] | None
    tensors_file: str = "adapter_model.safetensors"
    settings_file: str | None = None
    """None: the tensors are all there is, in one file."""
    keeps: tuple[str, ...] = ()
    """What its files say besides the layers: settings of training by our names, and base_model."""
    dropout_mode: str = "adapter"
    """What dropout means to the tool."""
    methods: tuple[str, ...] = ("dora", "lora")
    """Of the adapters that can be written."""
    pipelines: bool = False
    """Whether a file may hold adapters of several parts of a diffusion pipeline."""
    own_settings: bool = False
    """Whether doralib_config.json is kept beside it, for all that the files themselves have no word for."""
    needs_weights: bool = False
    """Whether writing takes the base model's weights: ``Hints.lengths``."""
    variant_of: str | None = None
    """The format whose names it has too; a file that both take for theirs is of this one."""
    note: str = ""
    """What the user of a written file has to know."""


def check_only_layers(state: AdapterState, title: str, kinds: tuple[str, ...] = ("linear",)) -> None:
    """Nothing, if the adapter is layers of these kinds alone, which is all that most tools' files can hold.

    Raises:
        UsageError: naming the layers and whole tensors that would be lost.
    """
    if others := [f"{name} ({layer.kind})" for name, layer in state.layers.items() if layer.kind not in kinds]:
        raise UsageError(
            f"{title} has no DoRA of {', '.join(others[:5])}; it takes {' and '.join(kinds)} layers: merge"
        )
    if state.extra:
        names = ", ".join(sorted(state.extra)[:5])
        raise UsageError(
            f"{title} files hold layers' adapters alone; this adapter also trained {len(state.extra)} whole tensors "
            f"({names}), which would be lost: convert to peft, or merge"
        )


TensorsByLayer = dict[str, dict[str, Tensor]]


def group_by_layer(tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> tuple[TensorsByLayer, list[str]]:
    """Tensors by layer and field, and a line for each that is neither.

    Args:
        fields: our field ("a", "b", "m", ...) by the ending of its key.
    """
    parts: TensorsByLayer = {}
    problems = []
    endings = sorted(fields, key=len, reverse=True)
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.endswith("." + e) and key != "." + e), None)
        if ending is None:
            problems.append(f"{key} {tuple(tensor.shape)}: is no part of a LoRA or DoRA layer; nothing may be dropped")
            continue
        part = parts.setdefault(key.removesuffix("." + ending), {})
        if fields[ending] in part:
            problems.append(f"{key}: its layer has the same tensor under another key")
        part[fields[ending]] = tensor
    return parts, problems


def build_layers(
    parts: TensorsByLayer,
    make: Callable[[str, dict[str, Tensor]], LayerAdapter],
    keys: Mapping[str, str],
    problems: list[str],
) -> dict[str, LayerAdapter]:
    """Every layer that can be made; a line in ``problems`` for each that cannot.

    If one layer has a magnitude, all need one.

    Args:
        keys: ending of the key by our field, for the lines.
    """
    with_m = any("m" in part for part in parts.values())
    needed = ("a", "b", "m") if with_m else ("a", "b")
    layers = {}
    for name, part in parts.items():
        missing = [keys[field] for field in needed if field not in part]
        if missing:
            problems.append(f"{name}: lacks {', '.join(missing)}")
            continue
        try:
            layers[name] = make(name, part)
        except DoraError as error:
            problems.append(f"{name}: {error}")
    if not parts and not problems:
        problems.append("the file holds no tensor at all")
    return layers


def check_complete(found: Mapping[str, Tensor], keys: Mapping[str, str], config: DoraConfig) -> None:
    """Nothing, if a layer has all its tensors and none too many.

    Raises:
        DoraError: naming them.
    """
    missing = [key for field, key in keys.items() if field not in found]
    if config.method == "lora":
        if "m_O" in found:
            raise DoraError(f"has a {MAGNITUDE}, but use_dora is false in the settings")
    elif "m_O" not in found:
        missing.append(MAGNITUDE)
    if missing:
        raise DoraError(f"lacks {', '.join(missing)}")


def unify_rank(state: AdapterState, title: str) -> tuple[int, dict[str, LayerAdapter]]:
    """The rank of all layers, and the layers; those of magnitude alone, which have none, get zeros of that rank.

    Raises:
        UsageError: if there are several ranks.
    """
    ranks = sorted({layer.rank for layer in state.layers.values() if not layer.magnitude_alone} or {1})
    if len(ranks) > 1:
        raise UsageError(f"{title} has one rank for all layers, this adapter has {', '.join(map(str, ranks))}")

    def of_that_rank(layer: LayerAdapter) -> LayerAdapter:
        if not layer.magnitude_alone:
            return layer
        (O, I), R = layer.shape, ranks[0]
        return LayerAdapter(layer.a_RI.new_zeros(R, I), layer.b_OR.new_zeros(O, R), layer.m_O, layer.scale, layer.kind)

    return ranks[0], {name: of_that_rank(layer) for name, layer in state.layers.items()}


def read_number(tensor: Tensor) -> float:
    """The value of a tensor that holds one, e.g. alpha.

    Raises:
        DoraError: if it holds several.
    """
    if tensor.numel() != 1:
        raise DoraError(f"alpha is {tuple(tensor.shape)}, not one number")
    return float(tensor)


def compute_alpha(adapter: LayerAdapter) -> float:
    """lora_alpha of a layer's own scale, whatever rule made it: alpha / r is the scale."""
    alpha = adapter.scale * adapter.rank
    nearest = round(alpha, 6)
    return nearest if abs(alpha - nearest) <= 1e-6 * abs(alpha) else alpha


def check_alpha(found: ParsedAdapter, alpha: float) -> ParsedAdapter:
    """An adapter read with an alpha given for what it leaves unsaid; a note where some layers say another.

    Raises:
        UsageError: if all of them say another, or alpha means nothing to them.
    """
    layers = {name: layer for name, layer in found.state.layers.items() if not layer.magnitude_alone}
    if found.config.has_bank or not layers:
        raise UsageError(f"--alpha {alpha:g}: no layer of this adapter is scaled by an alpha; leave --alpha out")
    rslora = found.config.use_rslora
    own = [layer.scale * math.sqrt(layer.rank) if rslora else compute_alpha(layer) for layer in layers.values()]
    others = [value for value in own if not math.isclose(value, alpha, rel_tol=1e-5)]
    stated = ", ".join(f"{value:g}" for value in sorted(set(others))[:5])
    # fused projections have an alpha of all parts' ranks together
    if not others or (len(others) == len(own) and math.isclose(found.config.lora_alpha, alpha, rel_tol=1e-5)):
        return found
    if len(others) == len(own):
        raise UsageError(
            f"--alpha {alpha:g}: the adapter states its own alpha, {stated}; leave --alpha out, which is for files "
            "that forget it (of several adapters, convert those with it first)"
        )
    note = f"{len(others)} of {len(own)} layers state an alpha of their own ({stated}) and keep it"
    return replace(found, notes=(*found.notes, note))


def make_config(layers: Mapping[str, LayerAdapter], **settings: Any) -> DoraConfig:
    """Settings that say of each layer what it is: the commonest rank and alpha, and patterns for the others."""
    ranks = {name: adapter.rank for name, adapter in layers.items()}
    alphas = {name: compute_alpha(adapter) for name, adapter in layers.items()}
    r, alpha = find_commonest(ranks), find_commonest(alphas)
    stacks = tuple(sorted(name for name, adapter in layers.items() if adapter.kind == "experts"))
    return DoraConfig(
        method="dora" if any(adapter.m_O is not None for adapter in layers.values()) else "lora",
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules=tuple(sorted(layers.keys() - set(stacks))),
        target_parameters=stacks,
        **settings,
    )


def find_commonest(values: Mapping[str, Any]) -> Any:
    """The value that most names have; the first of equals."""
    return Counter(values.values()).most_common(1)[0][0]
