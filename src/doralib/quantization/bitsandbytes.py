"""bitsandbytes' layers of 4 and 8 bits, read and written through its own functions."""

import copy
import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DoraError
from ..functional import Rows
from .base import Storage

_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Rows4bit:
    """A bitsandbytes 4-bit weight as rows: numbers of 4 bits over the flat weight, a scale for each `blocksize`.

    Dense in float32 it is exact; in the dtype of an input it is what the layer multiplies with it.
    """

    data: Tensor
    state: Any
    absmax: Tensor
    """Scales in float32, their own quantization undone."""
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, data: Tensor, state: Any, dtype: torch.dtype = torch.float32) -> "Rows4bit":
        """From a packed weight, in any quant_storage, and its QuantState."""
        absmax = state.absmax
        if state.nested:
            absmax = _bnb().dequantize_blockwise(state.absmax, state.state2) + state.offset
        return cls(data.contiguous().view(torch.uint8).flatten(), state, absmax.float(), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return tuple(self.state.shape)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.data.device

    def __getitem__(self, rows: slice, /) -> Tensor:
        O, I = self.shape
        block = self.state.blocksize
        first, last, _ = rows.indices(O)
        # whole blocks, so that each has its scale; blocks are even, so that no byte is cut
        start, end = first * I // block * block, min(-(-last * I // block) * block, O * I)
        if last <= first or I == 0:
            return torch.zeros(max(0, last - first), I, dtype=self.dtype, device=self.device)
        absmax = self.absmax[start // block : -(-end // block)].contiguous()
        kinds = {"blocksize": block, "quant_type": self.state.quant_type, "code": self.state.code}
        part = type(self.state)(absmax, shape=torch.Size([1, end - start]), dtype=self.dtype, **kinds)
        data = self.data[start // 2 : (end + 1) // 2]
        flat = _bnb().dequantize_4bit(data.view(-1, 1), part).flatten()
        return flat[first * I - start : last * I - start].view(-1, I)


@dataclass(frozen=True)
class Rows8bit:
    """A bitsandbytes 8-bit weight as rows: int8, and the largest value of each row; dense in float32."""

    CB: Tensor
    SCB: Tensor
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""
        return tuple(self.CB.shape)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.CB.device

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.CB[rows].float() * (self.SCB[rows, None].float() / 127)


class Bits4(Storage):
    """bitsandbytes ``Linear4bit``: NF4 or FP4, scales quantized again or not, in any quant_storage."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"bitsandbytes {self._state.quant_type}"

    @property
    def plain_dtype(self) -> torch.dtype | None:
        return self._state.dtype

    def rows(self) -> Rows:
        self._unpack()
        return Rows4bit.of(self.module.weight.data, self._state)

    def multiplies(self, dtype: torch.dtype) -> bool:
        return bool(self.module.compute_dtype == dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return Rows4bit.of(self.module.weight.data, self._state, dtype)[:]

    def tensors(self) -> list[Tensor]:
        state = self._state
        return [self.module.weight, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]

    def quantize_again(self, W_OI: Tensor) -> nn.Module:
        old, settings = self.module.weight, ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        data, state = quantize_4bit(W_OI, self._state, nested=old.compress_statistics, storage=old.quant_storage)
        kept = {name: getattr(old, name) for name in settings}
        module = self._copy_with(old)
        module.weight = type(old)(
            data, requires_grad=False, quant_state=state, bnb_quantized=True, module=module, **kept
        )
        module.quant_state = state
        return module

    def keep_readable(self) -> None:
        # on CPUs with bfloat16 units the first evaluation would repack the weight: no gradient passes then, and what
        # is read or saved afterwards is another weight (bitsandbytes 0.50)
        self.module.support_avx512bf16_for_cpu = False
        self._unpack()
        state = getattr(self.module.weight, "quant_state", None)
        if state is not None and self.device.type == "cpu" and state.shape[-1] % state.blocksize:
            self._check_product(state)

    def _check_product(self, state: Any) -> None:
        """bitsandbytes' kernel for AVX-512 takes wrong scales for many shapes (0.50.2)."""
        want = self.rows()[:]
        used = _bnb().dequantize_4bit(self.module.weight.data, state).float()
        if not torch.allclose(used, want, rtol=2**-6):
            O, I = want.shape
            raise DoraError(
                f"bitsandbytes multiplies by another weight than it stores for ({O}, {I}) on this CPU: {I} is not a "
                f"multiple of its block of {state.blocksize}; use a GPU, int8, or leave the layer unquantised "
                "(llm_int8_skip_modules)"
            )

    def _unpack(self) -> None:
        """Undo bitsandbytes' repacking for CPUs, with the scales that it had rounded."""
        weight = self.module.weight
        state: Any = getattr(weight, "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            return
        scales = state.absmax.T.reshape(-1).float()
        weight.data, _ = _bnb()._convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(state))
        state.absmax, state.dtype = scales, state.original_dtype
        state.nested, state.state2, state.offset = False, None, None
        state.packing_format_for_cpu = False
        warnings.warn(
            "bitsandbytes repacked 4-bit weights in an earlier evaluation and rounded their scales to bfloat16; adapt "
            "a model before its first evaluation to train on the weights as they were loaded",
            stacklevel=2,
        )

    @property
    def _state(self) -> Any:
        state = getattr(self.module.weight, "quant_state", None) or self.module.quant_state
        if state is None:
            raise DoraError(
                "a bitsandbytes layer is not quantized yet; move the model to its device first: model.to(...)"
            )
        return state


def quantize_4bit(W_OI: Tensor, like: Any, *, nested: bool, storage: torch.dtype) -> tuple[Tensor, Any]:
    """A packed weight and its QuantState, in the settings of another; quantized from float32."""
    data, state = _bnb().quantize_4bit(
        W_OI.float().contiguous(),
        blocksize=like.blocksize,
        compress_statistics=nested,
        quant_type=like.quant_type,
        quant_storage=storage,
    )
    state.dtype = like.dtype
    return data, state


class Bits8(Storage):
    """bitsandbytes ``Linear8bitLt`` with int8 weights, before and after its first forward pass."""

    name = "bitsandbytes int8"

    def rows(self) -> Rows:
        return Rows8bit(*self.tensors())

    def tensors(self) -> list[Tensor]:
        # the first forward pass moves both from the weight to the layer's state
        weight, state = self.module.weight, self.module.state
        CB = state.CB if state.CB is not None else weight.CB
        SCB = state.SCB if state.SCB is not None else weight.SCB
        if SCB is None:
            raise DoraError("a bitsandbytes int8 layer has lost its scales (SCB); load the model again")
        return [weight.data if CB is None else CB, SCB]

    def quantize_again(self, W_OI: Tensor) -> nn.Module:
        CB, SCB = quantize_8bit(W_OI)
        weight = type(self.module.weight)(CB, requires_grad=False, has_fp16_weights=False, CB=CB, SCB=SCB)
        module = self._copy_with(weight)
        module.state = copy.copy(self.module.state)
        module.state.CB = module.state.SCB = None
        return module


def quantize_8bit(W_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and the largest value of each, through float16 as bitsandbytes does it.

    Raises:
        DoraError: if a value is too large for float16.
    """
    largest = W_OI.abs().max().item() if W_OI.numel() else 0.0
    if not largest <= _HALF_MAX:
        raise DoraError(
            f"a merged weight holds {largest:.3g}, too large for bitsandbytes int8; merge into plain weights"
        )
    CB, SCB, _ = _bnb().int8_vectorwise_quant(W_OI.half().contiguous())
    return CB, SCB


def _bnb() -> Any:
    """bitsandbytes' functions; whoever has one of its layers has imported it already."""
    return importlib.import_module("bitsandbytes.functional")
