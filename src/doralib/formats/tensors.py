"""What formats share: an adapter's layers from a file's tensors, and back."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError, UsageError, list_some, raise_problems
from ..functional import explain_nonfinite, is_finite
from ..state import MAGNITUDE, AdapterState, LayerAdapter
from .base import Hints, ParsedAdapter

_MOST_ALPHA = 1e6


def check_tensors(title: str, tensors: Mapping[str, Tensor], *, allow_nonfinite: bool = False) -> None:
    """Check that each tensor is dense, not empty, and finite floating-point; a count, such as an alpha, may be whole.

    Raises:
        DoraError: listing all that are not.
    """
    unfit = {name: _explain_unfit(tensor, allow_nonfinite=allow_nonfinite) for name, tensor in tensors.items()}
    raise_problems(title, [f"{name}: {why}" for name, why in unfit.items() if why])


def _explain_unfit(tensor: Tensor, *, allow_nonfinite: bool) -> str:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "is no dense tensor of numbers; save it dense"
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{tuple(tensor.shape)} holds {kind}, and an adapter is floating-point numbers" if tensor.dim() else ""
    if not tensor.numel():
        return f"{tuple(tensor.shape)} holds no numbers; take the file from where it is whole"
    if allow_nonfinite or is_finite(tensor):
        return ""
    return f"{explain_nonfinite(tensor)}; take an earlier checkpoint, or pass --allow-nonfinite"


def widen_bytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of float8 as bfloat16, which holds each of their numbers: torch hardly computes in float8."""
    narrow = lambda tensor: tensor.is_floating_point() and tensor.itemsize == 1
    return {name: tensor.to(torch.bfloat16) if narrow(tensor) else tensor for name, tensor in tensors.items()}


def check_factors(**factors: Tensor) -> None:
    """Check that A and B of a layer are matrices, or kernels of as many axes.

    Raises:
        DoraError: naming each that is not.
    """
    if flat := [f"{name} {tuple(tensor.shape)}" for name, tensor in factors.items() if not 2 <= tensor.dim() <= 5]:
        raise DoraError(f"{' and '.join(flat)}: a factor has two axes, or with a kernel up to five")


def check_only_layers(state: AdapterState, title: str, kinds: tuple[str, ...] = ("linear",)) -> None:
    """Check that the adapter is layers of these kinds and nothing else, which is all that most tools' files can hold.

    Raises:
        UsageError: naming the layers and whole tensors that would be lost.
    """
    if others := [f"{name} ({layer.kind})" for name, layer in state.layers.items() if layer.kind not in kinds]:
        named = list_some(others, 5, ", ")
        raise UsageError(f"{title} has no DoRA of {named}; it takes {' and '.join(kinds)} layers: merge")
    if whole := sorted({**state.extra, **state.rows}):
        names = list_some(whole, 5, ", ")
        raise UsageError(
            f"{title} files hold layers' adapters alone; this adapter also trained {len(whole)} whole tensors "
            f"({names}), which would be lost: convert to peft, or merge"
        )


TensorsByLayer = dict[str, dict[str, Tensor]]


def group_by_layer(tensors: Mapping[str, Tensor], *keys: Mapping[str, str]) -> tuple[TensorsByLayer, list[str]]:
    """Group tensors by layer and field; also a line for each that belongs to no layer.

    Args:
        keys: the ending of a key by our field ("a", "b", "m", ...), for each way in which the tool spells them.
    """
    parts: TensorsByLayer = {}
    problems = []
    fields = {ending: field for each in keys for field, ending in each.items()}
    longest_first = sorted(fields, key=len, reverse=True)
    for key, tensor in tensors.items():
        ending = next((e for e in longest_first if key.endswith("." + e) and key != "." + e), None)
        if ending is None:
            problems.append(f"{key} {tuple(tensor.shape)}: is no part of a LoRA or DoRA layer; nothing may be dropped")
            continue
        part = parts.setdefault(key.removesuffix("." + ending), {})
        if fields[ending] in part:
            problems.append(f"{key}: its layer has the same tensor under another key")
        part[fields[ending]] = tensor
    return parts, problems


def parse_layers(
    title: str,
    parts: TensorsByLayer,
    make: Callable[[str, dict[str, Tensor]], LayerAdapter],
    keys: Mapping[str, str],
    problems: list[str],
    *,
    base_model: str | None = None,
    notes: tuple[str, ...] = (),
    **settings: Any,
) -> ParsedAdapter:
    """Make every layer, and the settings that say of each what it is. If one layer has a magnitude, all need one.

    Args:
        title: what is read, for messages.
        keys: the ending of a key by our field, for messages.
        problems: a line for each that is known already.
        settings: of training, as the file says them.

    Raises:
        DoraError: listing these problems, and every layer that cannot be made.
    """
    with_m = any("m" in part for part in parts.values())
    layers, problems = {}, list(problems)
    for name, part in parts.items():
        missing = [keys[field] for field in ("a", "b", "m")[: 2 + with_m] if field not in part]
        if missing:
            problems.append(f"{name}: lacks {', '.join(missing)}")
            continue
        try:
            check_factors(**{keys[field]: part[field] for field in ("a", "b")})
            layers[name] = make(name, part)
        except DoraError as error:
            problems.append(f"{name}: {error}")
    if not parts and not problems:
        problems.append("the file holds no tensor at all")
    raise_problems(title, problems)
    return ParsedAdapter(make_config(layers, **settings), AdapterState(layers, base_model=base_model), notes)


def name_tensors(
    name: str, keys: Mapping[str, str], a: Tensor, b: Tensor, m: Tensor | None, **others: Tensor
) -> dict[str, Tensor]:
    """A layer's tensors by their keys in a file; no key for a magnitude that is None."""
    tensors = {"a": a, "b": b, "m": m, **others}
    return {f"{name}.{keys[field]}": tensor for field, tensor in tensors.items() if tensor is not None}


def check_complete(found: Mapping[str, Tensor], keys: Mapping[str, str], config: DoraConfig) -> None:
    """Check that a layer has all its tensors and none too many.

    Raises:
        DoraError: naming those that are missing or too many.
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
    layers = dict(state.layers)
    for name, layer in state.layers.items():
        if layer.magnitude_alone:
            (O, I), R = layer.shape, ranks[0]
            a_RI, b_OR = layer.a_RI.new_zeros(R, I), layer.b_OR.new_zeros(O, R)
            layers[name] = LayerAdapter(a_RI, b_OR, layer.m_O, layer.scale, layer.kind)
    return ranks[0], layers


def put_scale(b_OR: Tensor, factor: float) -> Tensor:
    """B with a scale in it: in its own dtype where the factor is a power of two, which is exact, else in float32."""
    if math.frexp(factor)[0] == 0.5:
        return b_OR if factor == 1 else b_OR * factor
    return b_OR.to(torch.promote_types(b_OR.dtype, torch.float32)) * factor


def read_alpha(part: Mapping[str, Tensor], hints: Hints, rank: int) -> float:
    """lora_alpha of a layer: its own tensor of that name, the one that the user gives, or the rank.

    Raises:
        DoraError: if the tensor holds several numbers.
    """
    if "alpha" not in part:
        return hints.alpha or rank
    if part["alpha"].numel() != 1:
        raise DoraError(f"alpha is {tuple(part['alpha'].shape)}, not one number")
    alpha = float(part["alpha"])
    if not 0 < alpha <= _MOST_ALPHA:
        raise DoraError(f"alpha is {alpha:g}, and has to be above 0 and at most {_MOST_ALPHA:,.0f}")
    return alpha


def note_missing_alpha(parts: TensorsByLayer, hints: Hints, remedy: str = "") -> tuple[str, ...]:
    """A note of what `read_alpha` takes where layers have no alpha; none if all have one."""
    missing = sum("alpha" not in part for part in parts.values())
    taken = "the rank" if hints.alpha is None else f"{hints.alpha:g}, as given"
    return (f"{missing} layers have no alpha: taken as {taken}{remedy}",) if missing else ()


def compute_alpha(adapter: LayerAdapter) -> float:
    """lora_alpha of a layer, from its scale alpha / r, whatever rule made that."""
    alpha = adapter.scale * adapter.rank
    nearest = round(alpha, 6)
    return nearest if abs(alpha - nearest) <= 1e-6 * abs(alpha) else alpha


def check_alpha(adapter: ParsedAdapter, alpha: float) -> ParsedAdapter:
    """Check the alpha that the user gave against those that the layers state; a note where some state another.

    Raises:
        UsageError: if all of them state another, or none is scaled by an alpha.
    """
    layers = [layer for layer in adapter.state.layers.values() if not layer.magnitude_alone]
    if adapter.config.has_bank or not layers:
        raise UsageError(f"--alpha {alpha:g}: no layer of this adapter is scaled by an alpha; leave --alpha out")
    rslora = adapter.config.use_rslora
    own = [layer.scale * math.sqrt(layer.rank) if rslora else compute_alpha(layer) for layer in layers]
    others = [value for value in own if not math.isclose(value, alpha, rel_tol=1e-5)]
    stated = ", ".join(f"{value:g}" for value in sorted(set(others))[:5])
    # fused projections have an alpha of all parts' ranks together
    if not others or (len(others) == len(own) and math.isclose(adapter.config.lora_alpha, alpha, rel_tol=1e-5)):
        return adapter
    if len(others) == len(own):
        raise UsageError(
            f"--alpha {alpha:g}: the adapter states its own alpha, {stated}; leave --alpha out, which is for files "
            "that forget it (of several adapters, convert those with it first)"
        )
    note = f"{len(others)} of {len(own)} layers state an alpha of their own ({stated}) and keep it"
    return replace(adapter, notes=(*adapter.notes, note))


def make_config(layers: Mapping[str, LayerAdapter], **settings: Any) -> DoraConfig:
    """Make the settings of these layers: the commonest rank and alpha, and patterns for the layers of others."""
    by_token = any(layer.kind == "token_embedding" for layer in layers.values())
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
        **{"embedding_axis": "token" if by_token else "dimension", **settings},
    )


def find_commonest(values: Mapping[str, Any]) -> Any:
    """The value that most names have; of equals the first."""
    return Counter(values.values()).most_common(1)[0][0]
