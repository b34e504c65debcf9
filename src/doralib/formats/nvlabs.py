"""The paper's own code (NVlabs/DoRA): adapter_model.bin, an early PEFT with peft_type DORA. Read only."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import DoraError
from .content import Content, Found, Given, refuse
from .peft import from_peft

_MAGNITUDE = ".weight_m_wdecomp.weight"
# the LLaVA fork leaves the adapter's name in the keys
_NAMED = re.compile(r"(.+\.(?:lora_A|lora_B|weight_m_wdecomp))\.([A-Za-z_]\w*)\.weight")
_MAGNITUDE_ONLY = ("Wdecompose_target_modules", "wdecompose_target_modules")
_TAKEN = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "base_model_name_or_path")


def detect(content: Content) -> bool:
    """Whether it is the official code's."""
    keys = any("weight_m_wdecomp" in key for key in content.tensors)
    return keys or content.settings.get("peft_type") == "DORA"


def read(content: Content, given: Given) -> Found:
    """The official code's adapter.

    Raises:
        DoraError: listing magnitude-only modules, missing magnitudes (one of the forks' savers drops them) and all
            else that does not belong.
    """
    tensors = _plain_names(content.tensors)
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    magnitudes = {key.removesuffix(_MAGNITUDE) for key in tensors if key.endswith(_MAGNITUDE)}
    problems = [f"{name}: lacks weight_m_wdecomp.weight; it cannot be guessed" for name in sorted(layers - magnitudes)]
    problems += [
        f"{name}: is magnitude-only ({' / '.join(_MAGNITUDE_ONLY)}), which has no A and B"
        for name in sorted(magnitudes - layers)
    ]
    problems += [
        f"{name}: its magnitude is {tuple(shape)}, not (out, 1)"
        for name in sorted(magnitudes)
        if len(shape := tensors[name + _MAGNITUDE].shape) != 2 or shape[1] != 1
    ]
    if content.settings.get("enable_lora"):
        problems.append("enable_lora: adapts slices of fused projections, which is not read")
    refuse("the NVlabs adapter", problems)
    config, state = from_peft(
        {_peft_key(key): tensor.flatten() if key.endswith(_MAGNITUDE) else tensor for key, tensor in tensors.items()},
        _peft_settings(content.settings, given, tensors),
    )
    simple = bool(content.settings.get("dora_simple", True))
    return Found(config.model_copy(update={"detach_norm": simple}), state)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {match[2] for key in tensors if (match := _NAMED.fullmatch(key))}
    if len(names) > 1:
        raise DoraError(f"the file holds several adapters ({', '.join(sorted(names))}); save one of them alone")
    return {_NAMED.sub(r"\1.weight", key): tensor for key, tensor in tensors.items()}


def _peft_key(key: str) -> str:
    return key.removesuffix(_MAGNITUDE) + ".lora_magnitude_vector" if key.endswith(_MAGNITUDE) else key


def _peft_settings(settings: Mapping[str, Any], given: Given, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if not settings and given.alpha is None:
        raise DoraError(
            "the NVlabs adapter has no adapter_config.json beside it, so lora_alpha is unknown; give --alpha"
        )
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".lora_A.weight")}
    taken = {field: settings[field] for field in _TAKEN if settings.get(field) is not None}
    if given.alpha is not None:
        taken["lora_alpha"] = given.alpha
    return {"r": min(ranks, default=8), **taken, "peft_type": "LORA", "use_dora": True}
