"""What figures were made on: the names and versions that belong beside them."""

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each installed package, None for the others."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
