"""The operators a layer computes with: one public function each, and which file's is used where.

`eager` is plain torch, for every device and dtype. On a GPU with Triton `fused` takes its place.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_gpu(tensor: Tensor) -> ModuleType | None:
    """`fused`, where its Triton kernels take this tensor: on a GPU, not in float64."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or not _has_triton():
        return None
    return importlib.import_module(".fused", __name__)


def dora_linear(x: Tensor, *operands: Any) -> Tensor:
    """`eager.dora_linear`, by the fastest way there is for x."""
    module = on_gpu(x) or importlib.import_module(".eager", __name__)
    y: Tensor = module.dora_linear(x, *operands)
    return y
