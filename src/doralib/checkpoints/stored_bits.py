"""What bitsandbytes stores beside a quantized weight: checked by headers and settings, before its functions see it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from ..documents import decode_json
from ..errors import DoraError
from .safetensors import Slot, read_whole

STATE = ".quant_state.bitsandbytes__"
"""Between the name of a 4-bit weight and its quant_type, where its settings are: JSON in bytes."""

_Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
_Float = Literal["float16", "bfloat16", "float32"]


class State4bit(BaseModel):
    """The settings of a 4-bit weight."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: _Blocksize
    dtype: _Float
    shape: tuple[PositiveInt, ...]
    """Of the dense weight."""
    nested_blocksize: PositiveInt | None = None
    nested_dtype: _Float | None = None
    nested_offset: FiniteFloat | None = None


def read_settings(weight: str, state: Tensor) -> dict[str, Any]:
    """The settings of a 4-bit weight, as they are written.

    Raises:
        DoraError: if they are damaged.
    """
    try:
        if state.dtype != torch.uint8:
            raise TypeError(f"{state.dtype} for bytes")
        settings: dict[str, Any] = decode_json(bytes(state.tolist()))
        State4bit.model_validate(settings)
    except ValidationError as error:
        why = ", ".join(dict.fromkeys(".".join(map(str, each["loc"])) for each in error.errors()))
    except (ValueError, TypeError) as error:
        why = str(error)
    else:
        return settings
    raise DoraError(f"{weight}: its quantization's settings are damaged ({why}); download it again")


def check_four_bits(weight: str, quant_type: str, parts: Mapping[str, Slot]) -> State4bit:
    """The settings of a 4-bit weight, whose parts were compared with them.

    Raises:
        DoraError: if settings are damaged, or a part is missing, or of another size or dtype.
    """
    state = State4bit.model_validate(read_settings(weight, read_whole(parts[f"{weight}{STATE}{quant_type}"])))
    count = math.prod(state.shape)
    blocks = math.ceil(count / state.blocksize)
    nested = f"{weight}.nested_absmax" in parts
    wanted = {"absmax": ("U8" if nested else "F32", blocks), "quant_map": ("F32", 16)}
    if nested:
        size = state.nested_blocksize or 1
        wanted |= {"nested_absmax": ("F32", math.ceil(blocks / size)), "nested_quant_map": ("F32", 256)}
    wrong = [
        f"{part} ({_describe(parts.get(f'{weight}.{part}'))} for {code} x {length})"
        for part, (code, length) in wanted.items()
        if not _is(parts.get(f"{weight}.{part}"), code, length)
    ]
    if parts[weight].nbytes != (count + 1) // 2:
        wrong.append(f"weight ({parts[weight].nbytes} bytes for {(count + 1) // 2})")
    if nested and None in (state.nested_blocksize, state.nested_dtype, state.nested_offset):
        wrong.append("nested settings (missing)")
    if state.quant_type != quant_type:
        wrong.append(f"quant_type ({state.quant_type} for {quant_type})")
    _raise(weight, wrong)
    return state


def check_eight_bits(weight: str, parts: Mapping[str, Slot], scales: str) -> None:
    """Check the row scales of an 8-bit weight.

    Raises:
        DoraError: if they are of another size or dtype.
    """
    shape, slot = parts[weight].shape, parts[scales]
    fits = len(shape) == 2 and slot.plain and math.prod(slot.shape) == shape[0]
    _raise(weight, [] if fits else [f"SCB ({_describe(slot)} for the rows of {shape})"])


def _is(slot: Slot | None, code: str, length: int) -> bool:
    return slot is not None and slot.code == code and math.prod(slot.shape) == length


def _describe(slot: Slot | None) -> str:
    return "missing" if slot is None else f"{slot.code} x {math.prod(slot.shape)}"


def _raise(weight: str, wrong: list[str]) -> None:
    if wrong:
        raise DoraError(f"{weight}: parts of its quantization do not fit: {', '.join(wrong)}; download it again")
