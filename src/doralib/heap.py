"""The C library's heap in commands that compute on a CPU for long."""

import ctypes
import os
import platform

import torch

# numbers of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP_BELOW = 1 << 30
_OWN_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep what one training step frees for the next; whether it does from now on.

    Otherwise it gives large buffers back to the system and takes them anew in each step, where every page costs a
    fault. The price is memory: what is kept is not always of the size that is wanted next. Nothing is changed where
    there is an accelerator, another C library, or a setting of the heap in the environment.
    """
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith(_OWN_SETTINGS) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _KEEP_BELOW) and mallopt(_TRIM_THRESHOLD, _KEEP_BELOW))
