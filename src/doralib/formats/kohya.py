"""kohya's sd-scripts and LyCORIS: one safetensors file, module paths with underscores, a length per output (or not)."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import DoraConfig
from ..errors import DoraError, UsageError, nearest, raise_problems
from ..state import AdapterState, LayerAdapter
from .base import Format, Hints, ParsedAdapter, RawAdapter
from .pipeline import find_component, spell_for_files, spell_otherwise, strip_component
from .tensors import (
    check_only_layers,
    compute_alpha,
    group_by_layer,
    name_tensors,
    note_missing_alpha,
    parse_layers,
    read_alpha,
)
from .unet_names import find_diffusers_names, find_original_names

_KEYS = {"a": "lora_down.weight", "b": "lora_up.weight", "mid": "lora_mid.weight", "alpha": "alpha", "m": "dora_scale"}
# prefix of a key to the parts of a pipeline that it may mean; none: the model itself
_PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lycoris": (),
}
_PREFIX_OF = {
    "unet": "lora_unet",
    # with diffusers' names inside; sd-scripts itself writes lora_unet with the original model's names
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
_OTHER_KINDS = ("hada_", "lokr_", "oft_", "boft_", "glora_", "on_input", "diff", "w_norm", "b_norm")


def detect(raw: RawAdapter) -> bool:
    """Whether keys are paths with underscores, as kohya's and LyCORIS'; ai-toolkit's say magnitude for dora_scale."""
    heads = {key.split(".")[0] for key in raw.tensors}
    ours = any(head.startswith(f"{prefix}_") for head in heads for prefix in _PREFIXES)
    return ours and not any(key.endswith(".magnitude") for key in raw.tensors)


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """kohya's or LyCORIS' adapter, its names looked up among the base model's.

    Raises:
        UsageError: if no base model is given to look the names up in.
        DoraError: listing every name that is not there or could be two modules, every magnitude along the input axis,
            and all else that does not belong.
    """
    return read_fields(raw, hints, _KEYS, "the kohya / LyCORIS adapter")


def read_fields(raw: RawAdapter, hints: Hints, keys: Mapping[str, str], title: str) -> ParsedAdapter:
    """Read an adapter as `read` does, with other endings of its keys, by our field."""
    raise_problems(title, _list_other_kinds(raw.tensors))
    parts, problems = group_by_layer(raw.tensors, keys)
    names, unresolved = _resolve_names(list(parts), hints)
    problems += unresolved

    def layer(name: str, part: dict[str, Tensor]) -> LayerAdapter:
        a, b = _expand(part)
        m_O = part.get("m")
        if m_O is not None and keys["m"] == "dora_scale":  # a `magnitude` has one axis
            m_O = _read_lengths(m_O, b.shape[0], a.shape[1])
        adapter = LayerAdapter(a, b, m_O, read_alpha(part, hints, a.shape[0]) / a.shape[0])
        shape = tuple(hints.shapes.get(name, adapter.shape))
        if adapter.shape != shape:
            raise DoraError(f"(out, in) {adapter.shape} in the adapter, {shape} in the base model")
        return adapter

    named = {names.get(key, key): part for key, part in parts.items()}
    return parse_layers(title, named, layer, keys, problems, notes=note_missing_alpha(parts, hints))


def write(_config: DoraConfig, state: AdapterState, hints: Hints) -> RawAdapter:
    """The adapter as kohya and LyCORIS (wd_on_output) write it.

    Raises:
        UsageError: if whole tensors were trained, or two names become the same with underscores.
    """
    return write_fields(state, hints, _KEYS)


def write_fields(state: AdapterState, hints: Hints, keys: Mapping[str, str]) -> RawAdapter:
    """Write an adapter as `write` does, with other endings of its keys, by our field."""
    check_only_layers(state, "kohya / LyCORIS", ("linear", "convolution"))
    tensors: dict[str, Tensor] = {}
    # SD 1.5 and 2, of one text encoder, say lora_te; all later models lora_te1
    parts = {find_component(name) for name in (*state.layers, *hints.shapes)}
    alone = not parts & {"text_encoder_2", "text_encoder_3", "transformer"}
    for name, layer in state.layers.items():
        key = _underscore_name(name, hints.component)
        key = key.replace("lora_te1_", "lora_te_", 1) if alone and key.startswith("lora_te1_") else key
        if f"{key}.{keys['a']}" in tensors:
            raise UsageError(f"{name} and another layer are both {key} in a file with underscores for dots")
        shape = (-1, *[1] * (layer.a_RI.dim() - 1)) if keys["m"] == "dora_scale" else (-1,)
        m = None if layer.m_O is None else layer.m_O.reshape(shape)
        tensors |= name_tensors(key, keys, layer.a_RI, layer.b_OR, m, alpha=torch.tensor(compute_alpha(layer)))
    said: dict[str, set[float]] = {"ss_network_dim": {layer.rank for layer in state.layers.values()}}
    said["ss_network_alpha"] = {compute_alpha(layer) for layer in state.layers.values()}
    metadata = {key: f"{min(values):g}" if len(values) == 1 else "Dynamic" for key, values in said.items()}
    return RawAdapter(tensors, {}, {"ss_network_module": "lycoris.kohya", **metadata})


def _underscore_name(name: str, component: str | None) -> str:
    """A module's key in a file of this kind."""
    part = find_component(name) or component
    prefix, inside = _PREFIX_OF.get(part or "", "lycoris"), strip_component(name, part)
    if part is not None:
        inside = strip_component(spell_for_files(f"{part}.{inside}"), part)
    return f"{prefix}_{inside}".replace(".", "_")


def _resolve_names(keys: list[str], hints: Hints) -> tuple[dict[str, str], list[str]]:
    """Module names by keys with underscores, and a line for each that has none or several.

    Raises:
        UsageError: if there are no names to look among.
    """
    if not hints.shapes:
        raise UsageError(
            f"names like {keys[0] if keys else 'lora_unet_...'} have underscores for dots; which are which, only the "
            "base model's own names can say: give --base MODEL"
        )
    known: dict[str, list[str]] = defaultdict(list)
    for module in hints.shapes:
        known[module.replace(".", "_")].append(module)
    for name, module in _list_other_names(hints).items():
        known[name.replace(".", "_")].append(module)
    names, problems = {}, []
    for key in keys:
        found = _find_candidates(key, known)
        if len(found) == 1:
            names[key] = found[0]
        elif found:
            problems.append(f"{key}: is ambiguous, it could be {' or '.join(found)}")
        else:
            near = nearest(key.partition("_")[2], known, count=1)
            hint = f" (the nearest is {known[near[0]][0]})" if near else ""
            problems.append(f"{key}: no module of the base model has this name{hint}")
    taken: dict[str, str] = {}
    for key, name in names.items():
        if name in taken:
            problems.append(f"{key}: is {name}, which {taken[name]} is too")
        taken[name] = key
    return names, problems


def _list_other_names(hints: Hints) -> dict[str, str]:
    """Modules by other names, with their part in front: a U-Net's of the other layout, the original code's or
    diffusers'; a text encoder's of transformers' other class.
    """
    spelled = {spell_otherwise(name): name for name in hints.shapes}
    found = {other: name for other, name in spelled.items() if other is not None and other not in hints.shapes}
    for front in ("unet.", ""):
        inside = {name.removeprefix(front): name for name in hints.shapes if name.startswith(front)}
        others = find_original_names(inside) | find_diffusers_names(inside)
        found |= {front + other: inside[name] for name, other in others.items() if other not in inside}
    return found


def _read_lengths(scale: Tensor, num_out: int, num_in: int) -> Tensor:
    """dora_scale as one length per output, (O,).

    Raises:
        DoraError: if it has one per input, or it cannot be told.
    """
    shape = tuple(scale.shape)
    per_input = f"dora_scale {shape} has one length per input ({num_in}; LyCORIS with wd_on_output=False)"
    cannot = "DoRA and every other format keep one per output, and the one cannot be written as the other: "
    remedy = "merge it with LyCORIS into its base model"
    if scale.dim() == 1:
        if num_out == num_in == shape[0]:
            raise DoraError(f"dora_scale {shape} of a square layer: one length per output or per input? Ambiguous")
        if shape[0] == num_in:
            raise DoraError(f"{per_input}; {cannot}{remedy}")
    if scale.numel() == num_out and shape[0] == num_out:
        return scale.flatten()
    if scale.dim() > 1 and scale.numel() == num_in == shape[1]:
        raise DoraError(f"{per_input}; {cannot}{remedy}")
    raise DoraError(f"dora_scale {shape} fits neither the {num_out} outputs nor the {num_in} inputs")


def _find_candidates(key: str, known: Mapping[str, list[str]]) -> list[str]:
    found: list[str] = []
    for prefix, parts in _PREFIXES.items():
        if not key.startswith(f"{prefix}_"):
            continue
        rest = key.removeprefix(f"{prefix}_")
        inside = [name for part in parts for name in known.get(f"{part}_{rest}", []) if find_component(name) == part]
        # a lone model's names have no component in front
        alone = [name for name in known.get(rest, []) if find_component(name) is None or not parts]
        found += inside or alone
    return list(dict.fromkeys(found))


def _expand(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B; Tucker's middle (R, R, k...) goes into A exactly: both only mix channels before the kernel."""
    a, b = part["a"], part["b"]
    if "mid" not in part:
        return a, b
    mid = part["mid"]
    fits = mid.dim() == a.dim() > 2 and mid.shape[0] == b.shape[1] and mid.shape[1] == a.shape[0]
    if not fits or a[0, 0].numel() != 1:
        found = f"lora_down {tuple(a.shape)}, lora_mid {tuple(mid.shape)}, lora_up {tuple(b.shape)}"
        raise DoraError(f"is no Tucker convolution: {found}")
    return torch.einsum("ij...,jc->ic...", mid, a.flatten(1)), b


def _list_other_kinds(tensors: Mapping[str, Tensor]) -> list[str]:
    found = sorted({key for key in tensors if key.partition(".")[2].startswith(_OTHER_KINDS)})
    return [f"{key}: LoHa, LoKr, OFT and full differences are not A and B of a LoRA" for key in found]


FORMAT = Format("kohya", "kohya / LyCORIS", detect, read, write, "lora.safetensors", pipelines=True)
