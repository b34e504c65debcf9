"""Bytes in and out: files that appear whole or not at all, JSON, safetensors."""

import codecs
import contextlib
import errno
import glob
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .documents import decode_json, decode_yaml
from .errors import DoraError, UsageError, did_you_mean, list_some
from .process import ON_WINDOWS, is_alive

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
# Windows' own number of a full disk, which safetensors passes on
_FULL_BY_WINDOWS = 112
_HOST = socket.gethostname()
_KINDS: dict[type[Any], str] = {
    dict: "an object, {...}",
    list: "a list",
    object: "a value",
    type(None): "nothing",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


@contextlib.contextmanager
def replacing(path: str | Path, need: int = 0) -> Iterator[Path]:
    """A new name beside ``path`` for a file or a folder; on success it takes the place of ``path``, else it vanishes.

    Missing parent folders are made. What stood at ``path`` stays until the new one is safely on the disk.

    Args:
        path: the final name; a link is followed.
        need: bytes about to be written, if known: refused at once where the disk has less.

    Raises:
        DoraError: if the disk is full.
    """
    final = Path(path).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final)
    if need > free_bytes(final.parent):
        raise DoraError(_explain_disk_full(final, need))
    part = final.with_name(f".{final.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        _sync(part)
        _replace(part, final)
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        raise DoraError(_explain_disk_full(final, max(need, count_bytes(part)))) from error
    finally:
        delete(part)


def delete(path: Path) -> None:
    """Delete a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def count_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if there is nothing."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def free_bytes(path: Path) -> int:
    """Bytes that can still be written at the nearest existing folder above ``path``."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_writable(path: str | Path, setting: str, *, folder: bool) -> None:
    """Check that a folder (or a file) may be written at ``path``, before the work is done.

    Raises:
        UsageError: if a file stands where a folder is needed or a folder where a file is, or the folder above may not
            be written into.
    """
    final = above = Path(path).resolve()
    if final.exists() and final.is_dir() != folder:
        found, wanted = ("a file", "another folder") if folder else ("a folder", "the name of a file")
        raise UsageError(f"{setting}: {path} is {found}; choose {wanted}")
    while not above.exists():
        above = above.parent
    if above != final and not above.is_dir():
        raise UsageError(f"{setting}: {path} cannot be made, for {above} is a file; choose another folder")
    if not os.access(above, os.W_OK):
        raise UsageError(f"{setting}: {path} cannot be written, for {above} is read-only; choose another folder")


def format_bytes(count: int) -> str:
    """A number of bytes for a person to read, e.g. ``"1.5 GB"``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def list_folder(folder: Path) -> str:
    """What a folder holds, the first twelve names, for a message."""
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    return list_some(names, 12, ", ") or "nothing"


def find_file(path: str | Path) -> Path:
    """The path of a file that is there.

    Raises:
        UsageError: if none is, with what the folder holds instead.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file; it holds: {list_folder(path)}")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"there is no file {path}: its folder {folder} does not exist")
    hint = did_you_mean(path.name, [item.name for item in folder.iterdir()])
    raise UsageError(f"there is no file {path.name} in {folder}{hint}\n  it holds: {list_folder(folder)}")


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        DoraError: if it is not UTF-8, with the place.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DoraError(
            f"{path} is not UTF-8 text (byte {error.start}); if it is text, save it again as UTF-8, for example with "
            f"iconv -f latin1 -t utf-8 {path.name}"
        ) from None


def has_byte_order_mark(path: Path) -> bool:
    """Whether a file begins with one, in UTF-8 or UTF-16."""
    with path.open("rb") as file:
        return file.read(3).startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def read_json(path: str | Path, root: type[Any] = dict) -> Any:
    """The value in a JSON file of other people's.

    Args:
        root: the type that the whole has to be of.

    Raises:
        UsageError: if there is no such file.
        DoraError: if it is not JSON, beyond the bounds of `decode_json`, or something else than ``root``.
    """
    path = find_file(path)
    try:
        # Windows' editors and shells put a byte order mark in front, and some write UTF-16
        value = decode_json(path.read_bytes() if has_byte_order_mark(path) else read_text(path))
    except ValueError as error:
        raise DoraError(f"{path} is not whole JSON ({error}); restore it, or write it again") from None
    if not isinstance(value, root):
        raise DoraError(f"{path} should hold {_KINDS[root]}, and {_describe(value)} stands there; restore it")
    return value


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file.

    Raises:
        UsageError: if there is no such file, it is not YAML, or beyond the bounds of `decode_yaml`.
    """
    path = find_file(path)
    try:
        return decode_yaml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {error}") from None


def _describe(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | None) else ""
    kind = _KINDS.get(type(value), type(value).__name__)
    return f"{kind} ({shown:.40})" if shown else kind


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU, in the stored dtypes.

    Raises:
        UsageError: if there is no such file.
        DoraError: if it is truncated or not safetensors.
    """
    path = find_file(path)
    try:
        # tensors are mapped from the file, and Windows lets nobody replace a file that is
        return safetensors.torch.load(path.read_bytes()) if ON_WINDOWS else safetensors.torch.load_file(path)
    except SafetensorError as error:
        if pointer := explain_git_lfs(path):
            raise DoraError(pointer) from None
        raise DoraError(
            f"{path} ({format_bytes(path.stat().st_size)}) is truncated or not a safetensors file ({error}); "
            "copy or download it again"
        ) from None


def explain_git_lfs(path: Path) -> str:
    """What to do about a pointer that git left in the place of a file; empty if the file is none."""
    with path.open("rb") as file:
        found = file.read(40).startswith(b"version https://git-lfs")
    return f"{path} is a git-lfs pointer, not the weights; fetch them with: git lfs pull" if found else ""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all; tensors that share memory are written apart."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        ready[name] = tensor.detach().cpu().contiguous()
        if ready[name].untyped_storage().data_ptr() in seen:
            ready[name] = ready[name].clone()
        seen.add(ready[name].untyped_storage().data_ptr())
    need = sum(tensor.nbytes for tensor in ready.values())
    with replacing(path, need) as part:
        # safetensors makes files that their owner alone may read
        part.touch()
        mode = part.stat().st_mode
        safetensors.torch.save_file(ready, part, metadata={"format": "pt", **(metadata or {})})
        part.chmod(mode)


def _sweep(final: Path) -> None:
    """Remove what killed runs on this machine left behind, and bring back what they had set aside."""
    aside = _set_aside_name(final)
    if aside.exists() and not final.exists():
        aside.replace(final)
    delete(aside)
    for part in final.parent.glob(f".{glob.escape(final.name)}.{glob.escape(_HOST)}-*.part"):
        pid = part.name.removesuffix(".part").rsplit("-", 2)[-2]
        if pid.isdigit() and not is_alive(int(pid)):
            delete(part)


def _sync(part: Path) -> None:
    """Wait until the bytes are on the disk: a rename may reach it before them."""
    for file in [*part.rglob("*"), part]:
        _sync_one(file)


def _sync_one(file: Path) -> None:
    if ON_WINDOWS and file.is_dir():
        return
    handle = os.open(file, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(part: Path, final: Path) -> None:
    """Rename onto ``final``; a folder in the way is set aside first and deleted last."""
    aside = _set_aside_name(final)
    if final.is_dir():
        if not part.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder stands where the file is to be", str(final))
        final.replace(aside)
    try:
        part.replace(final)
    except OSError:
        if aside.exists():
            aside.replace(final)
        raise
    _sync_one(final.parent)
    delete(aside)


def _set_aside_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"os error {code})" in str(error) for code in (*_FULL, _FULL_BY_WINDOWS))


def _explain_disk_full(final: Path, need: int) -> str:
    kept = "what stood there before is untouched" if final.exists() else "nothing was left behind"
    wanted = f" needs {format_bytes(need)} or more" if need else ""
    return (
        f"the disk is full: writing {final}{wanted}, and {format_bytes(free_bytes(final))} are free\n"
        f"  {kept}; free some space, or choose another folder"
    )
