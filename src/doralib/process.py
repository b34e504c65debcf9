"""What the operating system says of processes, on Linux, macOS and Windows."""

import os
import sys
from pathlib import Path

# Windows syncs no folders, keeps what is mapped from being replaced, and takes signal 0 for Ctrl-C
ON_WINDOWS = os.name == "nt"
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine; True where it cannot be known."""
    if ON_WINDOWS:
        try:
            import psutil  # noqa: PLC0415  accelerate brings it
        except ImportError:
            return True
        return bool(psutil.pid_exists(pid))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_peak_memory() -> int | None:
    """The most bytes of memory that this process has held so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of a child counts its parent's memory too
        lines = status.read_text(encoding="utf-8").splitlines()
        peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return peaks[0]
    try:
        import resource  # noqa: PLC0415  Windows has none
    except ImportError:
        return _read_peak_on_windows()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_resident_memory() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import psutil  # noqa: PLC0415  accelerate brings it
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def read_machine_memory() -> int | None:
    """Bytes of memory that the machine has, or its container may use; None where the system does not tell."""
    if _CONTAINER.is_file() and (told := _CONTAINER.read_text(encoding="ascii").strip()).isdecimal():
        return min(int(told), _read_installed_memory() or int(told))
    return _read_installed_memory()


def _read_installed_memory() -> int | None:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        import psutil  # noqa: PLC0415  accelerate brings it
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def read_load() -> list[float]:
    """Processes that wanted to run in the last 1, 5 and 15 minutes; empty where the system does not tell."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else []


def _read_peak_on_windows() -> int | None:
    try:
        import psutil  # noqa: PLC0415  accelerate brings it
    except ImportError:
        return None
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else int(peak)
