"""One process at a time writes into a run's folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import importlib.util
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..documents import decode_json
from ..errors import UsageError
from ..process import is_alive

# Windows has no such locks
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None

NAME = ".lock"
_HOST = socket.gethostname()
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
_SHARED, _ALONE, _AT_ONCE = 1, 2, 4  # as the system's own header has them
_TRIES, _PAUSE = 20, 0.05  # another process may be asking who holds it


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; the file in it says which process does.

    The system releases the lock of a process that is gone, so a killed run needs no repair. Where the file system
    has no locks, the number of the process decides.

    Raises:
        UsageError: if another process holds it.
    """
    path = folder / NAME
    handle = _take(path)
    if handle is None:
        raise UsageError(f"out: {_describe(path)}")
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps({"host": _HOST, "process": os.getpid()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def find_holder(folder: Path) -> str | None:
    """What to say of the live process that writes into a folder; None if there is none."""
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        # shared, so that several may ask at once
        free = _lock(handle, path, _SHARED)
    finally:
        os.close(handle)
    return None if free else _describe(path)


def _take(path: Path) -> int | None:
    """The open file with its lock; None if another process has it."""
    for _ in range(_TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # its last holder may have deleted it meanwhile
        if _lock(handle, path, _ALONE) and _is_at(handle, path):
            return handle
        os.close(handle)
        time.sleep(_PAUSE)
    return None


def _lock(handle: int, path: Path, kind: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(handle, kind | _AT_ONCE)
            return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return False
    holder = _read(path)
    process = holder.get("process")
    gone = isinstance(process, int) and (process == os.getpid() or not is_alive(process))
    return not holder or (holder.get("host") == _HOST and gone)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = decode_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(path: Path) -> str:
    holder = _read(path)
    who = f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown machine')}"
    return (
        f"{who} is writing into {path.parent}; wait until it ends, stop it, or choose another `out` (where it is gone "
        f"and its file system has no locks, delete {path})"
    )
