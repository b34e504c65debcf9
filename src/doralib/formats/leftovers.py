"""What savers leave in keys and settings without meaning anything by it; taken off, with a note of each kind."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DoraError
from ..state import MAGNITUDE
from .base import RawAdapter

# torch.compile, FSDP and activation checkpointing put their own names into the path, DDP in front
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DDP = "module."
_LAYERS = r"lora_A|lora_B|weight_m_wdecomp"
_PARAMETERS = r"lora_embedding_A|lora_embedding_B|vera_lambda_d|vera_lambda_b|base_model\.vera_A|base_model\.vera_B"
# a live model keeps its adapters by name: `lora_A.default.weight`, `lora_embedding_A.default`
_NAMED_LAYER = re.compile(rf"(.+\.(?:{_LAYERS}))\.([^.]+)(\.weight|\.bias)")
_NAMED_PARAMETER = re.compile(rf"((?:.+\.)?(?:{_PARAMETERS}))\.([^.]+)()")
# the magnitude is a module there, and in its file a tensor
_NAMED_MAGNITUDE = re.compile(rf"(.+\.{MAGNITUDE})\.((?!weight$)[^.]+)(?:\.weight)?()")
_MAGNITUDE_MODULE = re.compile(rf"(.+\.{MAGNITUDE})\.weight")


def remove_leftovers(raw: RawAdapter) -> RawAdapter:
    """The adapter by the keys and settings that its format has, with notes of what was taken off.

    Raises:
        DoraError: if the file holds several adapters, or two keys become the same.
    """
    settings, notes = _repair_settings(raw)
    front = _DDP if all(key.startswith(_DDP) for key in raw.tensors) else ""
    tensors = _rename(raw.tensors, lambda key: _WRAPPERS.sub("", key).removeprefix(front))
    if tensors.keys() != raw.tensors.keys():
        notes.append("names of wrappers (DDP, FSDP, torch.compile) are taken off the keys")
    if names := _find_adapter_names(tensors):
        if len(names) > 1:
            raise DoraError(f"the file holds several adapters ({', '.join(sorted(names))}); save one of them alone")
        name = names.pop()
        tensors = _rename(tensors, lambda key: _drop_adapter_name(key, name))
        notes.append(f"the adapter's name {name!r} is taken off the keys")
    # diffusers' text encoders want it so, and that format reads it
    if any(_MAGNITUDE_MODULE.fullmatch(key) and key.startswith("base_model.") for key in tensors):
        alone = _drop_twins(tensors)
        if len(alone) == len(tensors):
            notes.append(f"{MAGNITUDE}.weight is read as {MAGNITUDE}")
        tensors = _rename(alone, lambda key: _MAGNITUDE_MODULE.sub(r"\1", key))
    return replace(raw, tensors=tensors, settings=settings, notes=(*raw.notes, *notes))


def _drop_twins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the second key of magnitudes that stand there twice, as we write them.

    Raises:
        DoraError: if the two are not the same.
    """
    twins = {key: m[1] for key in tensors if (m := _MAGNITUDE_MODULE.fullmatch(key)) and m[1] in tensors}
    for key, first in twins.items():
        # by bytes, as float8 and other dtypes cannot be compared
        one, other = tensors[key].contiguous(), tensors[first].contiguous()
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not (alike and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))):
            raise DoraError(f"{key} and {first} are two keys of one magnitude, with different numbers")
    return {key: tensor for key, tensor in tensors.items() if key not in twins}


def _find_adapter_names(tensors: Mapping[str, Tensor]) -> set[str]:
    patterns = (_NAMED_LAYER, _NAMED_PARAMETER, _NAMED_MAGNITUDE)
    found = {match[2] for key in tensors for each in patterns if (match := each.fullmatch(key))}
    return found - {"weight", "bias"}


def _drop_adapter_name(key: str, name: str) -> str:
    for pattern in (_NAMED_LAYER, _NAMED_PARAMETER, _NAMED_MAGNITUDE):
        if (match := pattern.fullmatch(key)) and match[2] == name:
            return match[1] + match[3]
    return key.replace(f".modules_to_save.{name}.", ".modules_to_save.")


def _rename(tensors: Mapping[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if (new := change(key)) in renamed:
            raise DoraError(f"{key}: the file has another tensor that is {new} too")
        renamed[new] = tensor
    return renamed


def _repair_settings(raw: RawAdapter) -> tuple[dict[str, Any], list[str]]:
    """The settings with a peft_type and a use_dora that can be read, if PEFT's they are."""
    settings, notes = dict(raw.settings), []
    magnitudes = any(MAGNITUDE in key for key in raw.tensors)
    if "peft_type" in settings:
        kind = settings["peft_type"]
        if kind is None:
            bank = any(".vera_lambda_" in key for key in raw.tensors)
            settings["peft_type"] = ("DVORA" if magnitudes else "VERA") if bank else "LORA"
            notes.append(f"peft_type is null in the settings: taken as {settings['peft_type']}, by the tensors")
        elif isinstance(kind, str):
            settings["peft_type"] = kind.rpartition(".")[2].upper()  # "lora", "PeftType.LORA"
    if settings.get("use_dora", False) is None:
        settings["use_dora"] = magnitudes
        notes.append(f"use_dora is null in the settings: taken as {magnitudes}, by the tensors")
    return settings, notes
