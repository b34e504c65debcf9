"""The operators a layer computes with, one public function each, and which file's is used where.

`eager` is plain torch, for every device and dtype. On a GPU where Triton's kernels have passed their trial `fused`
takes its place.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from . import eager
from .dropout import Dropout
from .selfcheck import passes

_passed: dict[tuple[torch.device, torch.dtype], bool] = {}


def on_gpu(tensor: Tensor) -> ModuleType | None:
    """`fused`, where it takes this tensor: on a GPU, not in float64, once its numbers there were found right."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return None
    key = (tensor.device, tensor.dtype)
    # a compiler that looks on must not trace the trial
    if key not in _passed and not torch.compiler.is_compiling():
        _passed[key] = _try(*key)
    return _fused() if _passed.get(key, False) else None


def _try(device: torch.device, dtype: torch.dtype) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return passes(_fused(), device, dtype)


def _fused() -> ModuleType:
    from . import fused  # noqa: PLC0415  # imports triton, which is optional

    return fused


def dora_linear(
    x: Tensor,
    W_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    s: float,
    bias_O: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """`eager.dora_linear`, by the fastest way there is for x."""
    way = on_gpu(x) or eager
    y: Tensor = way.dora_linear(x, W_OI, a_RI, b_OR, gain_O, s, bias_O, dropout)
    return y
