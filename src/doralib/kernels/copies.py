"""Tensors' values as they were, compared bit by bit with what they are."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Copy:
    """A tensor's values as they were."""

    __slots__ = ("_address", "_nbytes", "_shape", "value")

    def __init__(self, value: Tensor) -> None:
        """Of a tensor that nobody else writes to."""
        self.value, self._shape, self._nbytes = value, value.shape, value.nbytes
        self._address = value.data_ptr() if _memcmp is not None and _is_plain(value) else None

    def equals(self, now: Tensor) -> bool:
        """Whether a tensor is the same bit by bit, dtype and device included."""
        value = self.value
        if value.dtype is not now.dtype or self._shape != now.shape:
            return False
        if _memcmp is not None and self._address is not None and _is_plain(now):
            return not _memcmp(self._address, now.data_ptr(), self._nbytes)
        return value.device == now.device and torch.equal(value, now)


def _is_plain(t: Tensor) -> bool:
    return t.is_cpu and type(t) in (Tensor, nn.Parameter) and t.is_contiguous()


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    """C's own comparison: `torch.equal` costs a float32 step of 1x256 tokens 8 % (docs/bench.md)."""
    try:
        # PyDLL: to give the interpreter's lock away and take it back would take as long as the comparison
        memcmp = ctypes.PyDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no libc under that name, as on Windows
        return None
    memcmp.argtypes, memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return memcmp


_memcmp = _find_memcmp()
