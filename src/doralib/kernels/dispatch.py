"""Which file's operators are used where: `eager` is plain torch, for every device and dtype.

On a GPU where Triton's kernels have passed their trial `fused` takes its place.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

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
