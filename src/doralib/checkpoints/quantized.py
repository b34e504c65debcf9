"""Quantized layers of a checkpoint on disk: which tensors make one, its dense weight, and the tensors of another.

bitsandbytes 4 bit: weight, weight.absmax, weight.quant_map, weight.nested_absmax, weight.nested_quant_map and, as JSON
in bytes, weight.quant_state.bitsandbytes__nf4 (or fp4). 8 bit: weight, SCB, weight_format. torchao: _weight_qdata,
_weight_scale and so on, and what they mean in the file's metadata.
"""

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..documents import decode_json
from ..errors import DoraError
from ..functional import Rows
from ..quantization.bitsandbytes import Rows4bit, Rows8bit, quantize_4bit, quantize_8bit
from ..quantization.torchao import dequantize_torchao, quantize_torchao
from .match import is_conv1d_model
from .safetensors import Checkpoint, Slot, read_whole
from .stored_bits import STATE, check_eight_bits, check_four_bits, read_settings

Parts = Mapping[str, Tensor]
# JSON of a number, at its longest
_FLOAT = 24


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight: a plain (O, I) one to an adapter, several tensors in the files."""

    name: str
    """Of the weight that it stands for."""
    storage: str
    """E.g. ``"bitsandbytes nf4"``."""
    shape: tuple[int, ...]
    slots: Mapping[str, Slot]
    """The tensors that make it, by name; the first takes the place of the dense weight."""
    code: str = "F32"
    plain: bool = True

    def read(self) -> dict[str, Tensor]:
        """Read its tensors, whole."""
        return {name: read_whole(slot) for name, slot in self.slots.items()}

    def dequantize(self) -> Tensor:
        """Read the dense weight, whole."""
        return self.rows(self.read())[:]

    def rows(self, parts: Parts) -> Rows:
        """The dense weight."""
        raise NotImplementedError

    def quantize_again(self, parts: Parts, W_OI: Tensor) -> dict[str, Tensor]:
        """The tensors of another weight, in the same settings."""
        raise NotImplementedError

    def plan_slot(self, slot: Slot) -> Slot:
        """One of its tensors as it will be once the layer is quantized anew."""
        return slot


class Quantized4bit(QuantizedWeight):
    """bitsandbytes NF4 or FP4."""

    def rows(self, parts: Parts) -> Rows:
        return Rows4bit.of(parts[self.name], self._state(parts))

    def quantize_again(self, parts: Parts, W_OI: Tensor) -> dict[str, Tensor]:
        old, weight = self._state(parts), parts[self.name]
        data, state = quantize_4bit(W_OI, old, nested=old.nested, storage=weight.dtype)
        made = {f"{self.name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        settings = self._settings(parts)
        if old.nested:
            settings["nested_offset"] = state.offset.item()
            length = self.plan_slot(self.slots[self._key]).nbytes
            text = json.dumps(settings).encode().ljust(length)
            made[self._key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        else:
            made[self._key] = parts[self._key]
        return {**made, self.name: data.view(weight.shape)}

    def plan_slot(self, slot: Slot) -> Slot:
        # another offset has another number of digits, but files are laid out before anything is computed
        if slot.name != self._key or f"{self.name}.nested_absmax" not in self.slots:
            return slot
        length = slot.nbytes + _FLOAT
        return replace(slot, shape=(length,), nbytes=length)

    @property
    def _key(self) -> str:
        return next(name for name in self.slots if STATE in name)

    def _settings(self, parts: Parts) -> dict[str, Any]:
        return read_settings(self.name, parts[self._key])

    def _state(self, parts: Parts) -> Any:
        stored = {name.removeprefix(f"{self.name}."): value for name, value in parts.items() if name != self.name}
        return _import_package("bitsandbytes.functional", self).QuantState.from_dict(stored, device=torch.device("cpu"))


class Quantized8bit(QuantizedWeight):
    """bitsandbytes int8, one scale a row."""

    def rows(self, parts: Parts) -> Rows:
        return Rows8bit(parts[self.name], parts[self._scales])

    def quantize_again(self, parts: Parts, W_OI: Tensor) -> dict[str, Tensor]:
        _import_package("bitsandbytes.functional", self)
        CB, SCB = quantize_8bit(W_OI)
        return {**parts, self.name: CB, self._scales: SCB.to(parts[self._scales].dtype)}

    @property
    def _scales(self) -> str:
        return self.name.removesuffix("weight") + "SCB"


@dataclass(frozen=True)
class QuantizedTorchAO(QuantizedWeight):
    """A tensor of torchao's."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the file says of this tensor."""

    def rows(self, parts: Parts) -> Rows:
        return dequantize_torchao(self._tensor(parts))

    def quantize_again(self, parts: Parts, W_OI: Tensor) -> dict[str, Tensor]:
        new = quantize_torchao(self._tensor(parts), W_OI)
        made, metadata = self._support().flatten_tensor_state_dict({self.name: new})
        same = json.loads(metadata[self.name]) == json.loads(self.metadata[self.name])
        if not same or any(made[name].shape != part.shape for name, part in parts.items()):
            raise DoraError(f"{self.name}: torchao quantizes it in other settings now; merge with --dtype bfloat16")
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def _tensor(self, parts: Parts) -> Any:
        support = self._support()
        try:
            made, _ = support.unflatten_tensor_state_dict(dict(parts), dict(self.metadata))
        except Exception as error:
            # torchao's own functions raise whatever Python does
            raise DoraError(f"{self.name}: torchao cannot read it ({error}); download it again") from error
        return made[self.name]

    def _support(self) -> Any:
        return _import_package("torchao.prototype.safetensors.safetensors_support", self)


@functools.lru_cache(maxsize=8)
def find_quantized(checkpoint: Checkpoint) -> Mapping[str, QuantizedWeight]:
    """Find every quantized layer whose tensors are understood, by the name of the weight that it stands for.

    Raises:
        DoraError: if parts of a layer are missing or damaged, or if the model has HF Conv1D layers, whose quantized
            weights may be stored either way.
    """
    found: dict[str, QuantizedWeight] = {}
    slots = checkpoint.slots
    for name in slots:
        weight, _, quant_type = name.partition(STATE)
        if quant_type and weight in slots:
            parts = {weight: slots[weight], **{n: s for n, s in slots.items() if n.startswith(f"{weight}.")}}
            state = check_four_bits(weight, quant_type, parts)
            found[weight] = Quantized4bit(weight, f"bitsandbytes {quant_type}", state.shape, parts)
        layer, _, last = name.rpartition(".")
        weight = f"{layer}.weight"
        if last == "SCB" and weight in slots and slots[weight].code == "I8":
            parts = {n: slots[n] for n in (weight, name, f"{layer}.weight_format") if n in slots}
            check_eight_bits(weight, parts, name)
            found[weight] = Quantized8bit(weight, "bitsandbytes int8", slots[weight].shape, parts)
    found |= _find_torchao(checkpoint)
    if found and is_conv1d_model(checkpoint.config()):
        raise DoraError(f"{checkpoint.folder} has quantized Conv1D layers; take the model in full precision")
    return found


def drop_torchao_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """A file's metadata once none of its tensors is torchao's any more."""
    return {"format": "pt"} if metadata and "tensor_names" in metadata else metadata


def _find_torchao(checkpoint: Checkpoint) -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    metadata = {key: text for shard in checkpoint.shards for key, text in (shard.metadata or {}).items()}
    for name, text in metadata.items():
        described = _parse_description(text)
        module, _, weight = name.rpartition(".")
        parts = {f"{module}._{weight}_{part}": part for part in described.get("_tensor_data_names", ())}
        if "qdata" not in parts.values() or not all(part in checkpoint.slots for part in parts):
            continue
        slots = {part: checkpoint.slots[part] for part in sorted(parts, key=lambda part: parts[part] != "qdata")}
        shape = next(iter(slots.values())).shape
        own = {name: text, "tensor_names": json.dumps([name])}
        found[name] = QuantizedTorchAO(name, f"torchao {described['_type']}", shape, slots, metadata=own)
    return found


def _parse_description(text: str) -> dict[str, Any]:
    try:
        described = decode_json(text)
    except ValueError:
        return {}
    return described if isinstance(described, dict) else {}


def _import_package(name: str, layer: QuantizedWeight) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = name.partition(".")[0]
        raise DoraError(f"{layer.name} is stored as {layer.storage}; install it first: pip install {wanted}") from error
