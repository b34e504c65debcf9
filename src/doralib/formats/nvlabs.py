"""The paper's own code (NVlabs/DoRA): adapter_model.bin, an early PEFT with peft_type DORA. Read only."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import DoraError, nearest, raise_problems
from ..state import MAGNITUDE
from .base import SETTINGS_FILE, Format, Hints, ParsedAdapter, RawAdapter
from .peft import from_peft

_MAGNITUDE = ".weight_m_wdecomp.weight"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDE_ONLY = ("Wdecompose_target_modules", "wdecompose_target_modules")
_TAKEN = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "base_model_name_or_path")


def detect(raw: RawAdapter) -> bool:
    """Whether it is the official code's."""
    keys = any("weight_m_wdecomp" in key for key in raw.tensors)
    return keys or raw.settings.get("peft_type") == "DORA"


def read(raw: RawAdapter, hints: Hints) -> ParsedAdapter:
    """The official code's adapter; modules of magnitude alone get A and B of rank 1 and zeros.

    Raises:
        DoraError: listing missing magnitudes (one of the forks' savers drops them), magnitude-only modules whose inputs
            no base model tells, and all else that does not belong.
    """
    tensors = dict(raw.tensors)
    layers = {key.removesuffix(_A) for key in tensors if key.endswith(_A)}
    magnitudes = {key.removesuffix(_MAGNITUDE) for key in tensors if key.endswith(_MAGNITUDE)}
    alone = sorted(magnitudes - layers)
    problems = [f"{name}: lacks weight_m_wdecomp.weight; it cannot be guessed" for name in sorted(layers - magnitudes)]
    problems += _find_dropped(raw.settings, alone)
    problems += [
        f"{name}: its magnitude is {tuple(shape)}, not (out, 1)"
        for name in sorted(magnitudes)
        if len(shape := tensors[name + _MAGNITUDE].shape) != 2 or shape[1] != 1
    ]
    if raw.settings.get("enable_lora"):
        problems.append("enable_lora: adapts slices of fused projections, which is not read")
    for name in alone:
        m_O1 = tensors[name + _MAGNITUDE]
        try:
            num_in = _find_num_in(_strip(name), len(m_O1), hints)
        except DoraError as error:
            problems.append(f"{name}: {error}")
            continue
        tensors |= {name + _A: m_O1.new_zeros(1, num_in), name + _B: m_O1.new_zeros(len(m_O1), 1)}
    raise_problems("the NVlabs adapter", problems)
    settings = _rename_settings(raw.settings, hints, tensors)
    short, whole = ([_strip(name) for name in names] for names in (alone, layers))
    config, state = from_peft(
        {_rename(key): tensor.flatten() if key.endswith(_MAGNITUDE) else tensor for key, tensor in tensors.items()},
        {**settings, "rank_pattern": dict.fromkeys(short, 1)},
    )
    own = {
        "detach_norm": bool(raw.settings.get("dora_simple", True)),
        "magnitude_modules": _choose_endings(raw.settings, short, whole),
        "rank_pattern": {},
    }
    return ParsedAdapter(config.model_copy(update=own), state)


def _find_dropped(settings: Mapping[str, Any], alone: list[str]) -> list[str]:
    """Modules that the settings call magnitude-only, of which the file has no magnitude."""
    return [
        f"{ending}: is magnitude-only in the settings, and the file has no weight_m_wdecomp.weight of such a module"
        for ending in _list_magnitude_only(settings)
        if not any(name == ending or name.endswith("." + ending) for name in alone)
    ]


def _list_magnitude_only(settings: Mapping[str, Any]) -> list[str]:
    return [ending for field in _MAGNITUDE_ONLY for ending in settings.get(field) or []]


def _choose_endings(settings: Mapping[str, Any], alone: list[str], layers: list[str]) -> tuple[str, ...]:
    """The settings' own words for the modules of magnitude alone, where they name just these; else whole names."""
    said = tuple(f".{ending}" for ending in _list_magnitude_only(settings))
    just = all(f".{name}".endswith(said) for name in alone) and not any(f".{name}".endswith(said) for name in layers)
    return tuple(_list_magnitude_only(settings)) if said and just else tuple(alone)


def _find_num_in(name: str, num_out: int, hints: Hints) -> int:
    """Inputs of a module of which the file has the magnitude alone."""
    if not hints.shapes:
        raise DoraError("is magnitude-only; how many inputs it has only the base model says: give --base MODEL")
    found = [each for each in hints.shapes if f".{each}".endswith(f".{name}") or f".{name}".endswith(f".{each}")]
    if not found:
        near = nearest(name, hints.shapes, count=1)
        raise DoraError("no module of the base model has this name" + (f" (the nearest is {near[0]})" if near else ""))
    if len(found) > 1:
        raise DoraError(f"could be {' or '.join(found)} of the base model")
    shape = hints.shapes[found[0]]
    if len(shape) != 2 or num_out not in shape:
        raise DoraError(f"has {num_out} magnitudes, the base model's weight is {tuple(shape)}")
    return shape[1] if shape[0] == num_out else shape[0]


def _strip(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _rename(key: str) -> str:
    return key.removesuffix(_MAGNITUDE) + f".{MAGNITUDE}" if key.endswith(_MAGNITUDE) else key


def _rename_settings(settings: Mapping[str, Any], hints: Hints, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if not settings and hints.alpha is None:
        raise DoraError(
            "the NVlabs adapter has no adapter_config.json beside it, so lora_alpha is unknown; give --alpha"
        )
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(_A)}
    taken = {field: settings[field] for field in _TAKEN if settings.get(field) is not None}
    if hints.alpha is not None:
        taken.setdefault("lora_alpha", hints.alpha)
    return {"r": min(ranks, default=8), **taken, "peft_type": "LORA", "use_dora": True}


FORMAT = Format("nvlabs", "NVlabs/DoRA", detect, read, None, "adapter_model.bin", SETTINGS_FILE, variant_of="peft")
