"""What appears on a disk whole or not at all: files, folders, and sets of files that belong together."""

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from .errors import DoraError, UsageError
from .process import ON_WINDOWS, is_alive

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
# Windows' own number of a full disk, which safetensors passes on
_FULL_BY_WINDOWS = 112
# torch's own writer reports a failed write as a RuntimeError without a number
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|iostream|unexpected pos|file write failed")
_HOST = socket.gethostname()
_SCRATCH = re.compile(rf"\.(?P<name>.+)\.{re.escape(_HOST)}-(?P<pid>\d+)-(?P<id>[0-9a-f]{{8}})\.(?P<kind>part|old)")
_SCRATCH_OF_ANY_HOST = re.compile(r"\..+\.[^/]+-\d+-[0-9a-f]{8}\.(part|old)")
_STREAM = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")
_EXCHANGE, _AT_CWD = 2, -100
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_in_use: set[str] = set()


@contextlib.contextmanager
def replacing(path: str | Path, need: int = 0) -> Iterator[Path]:
    """A new name beside ``path`` for a file or a folder; on success it takes the place of ``path``, else it vanishes.

    Missing parent folders are made. What stood at ``path`` stays until the new one is safely on the disk; a folder and
    the one that replaces it change places in one step where the system can. What is no regular file, such as
    /dev/null, is written through.

    Args:
        path: the final name; a link is followed.
        need: bytes about to be written, if known: refused at once where the disk has less.

    Raises:
        DoraError: if the disk is full.
    """
    if _is_stream(Path(path)):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            yield part
            with part.open("rb") as source, Path(path).open("wb") as stream:
                shutil.copyfileobj(source, stream)
        return
    final = _resolve(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if any(place.name in _in_use for place in (final, *final.parents)):
        # inside what appears as a whole, or not at all
        if need > free_bytes(final.parent):
            raise DoraError(_explain_disk_full(final, need))
        yield final
        return
    _sweep(final)
    part = _name_scratch(final)
    try:
        with _explaining_full_disk(final, need, part):
            yield part
            sync(part)
            _replace(part, final)
    finally:
        _discard(part)


@contextlib.contextmanager
def replacing_together(paths: Sequence[Path], need: int = 0) -> Iterator[list[Path]]:
    """New names for files of one folder that belong together; on success they take their places, else all vanish.

    The last one is the mark: where it stands, all of them do. A folder that is new, or that holds nothing else, appears
    as a whole; beside other files the old set is put aside, mark first, and the new mark comes last.

    Args:
        paths: the final names, the mark last.
        need: bytes about to be written, if known.

    Raises:
        DoraError: if the disk is full.
    """
    folder, names = _resolve(paths[0].parent), [path.name for path in paths]
    if not folder.exists() or _holds_only(folder, names):
        with replacing(folder, need) as part:
            part.mkdir()
            yield [part / name for name in names]
        return
    finals = [folder / name for name in names]
    _sweep_together(finals)
    parts = [_name_scratch(final) for final in finals]
    try:
        with _explaining_full_disk(finals[-1], need, *parts):
            yield parts
            for part in parts:
                sync(part)
            _replace_together(parts, finals)
    finally:
        for part in parts:
            _discard(part)


@contextlib.contextmanager
def work_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside ``path`` for what is needed while it is written; it goes with its content after the block.

    One that a killed process left is deleted too.
    """
    final = _resolve(path)
    match = _SCRATCH.fullmatch(final.name)
    final = final.with_name(match["name"]) if match else final
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final)
    folder = _name_scratch(final)
    folder.mkdir()
    try:
        yield folder
    finally:
        _discard(folder)


def was_cut_short(mark: Path) -> bool:
    """Whether a killed process was writing the set of files that ``mark`` marks, and never came to its end."""
    mark = _resolve(mark)
    return not mark.exists() and any(_is_dead(part) for part in _list_scratch(mark))


def is_scratch(path: Path) -> bool:
    """Whether a name is one that `replacing` gives while it writes, on this machine or another."""
    return _SCRATCH_OF_ANY_HOST.fullmatch(path.name) is not None


def set_aside(path: Path) -> None:
    """Give a file or folder that is about to be deleted a name by which nobody takes it for whole."""
    path.replace(_name_scratch(path))


def clear_scratch(folder: Path) -> None:
    """Delete what killed processes left half written in a folder that no other process writes to."""
    for path in [path for path in folder.rglob(".*") if is_scratch(path)]:
        delete(path)
        _in_use.discard(path.name)


def is_write_error(error: BaseException) -> bool:
    """Whether the system or torch could not write a file, said in our words or not; torch's other errors are none."""
    if isinstance(error, DoraError) and error.__cause__ is not None:
        return is_write_error(error.__cause__)
    said = str(error)
    by_torch = isinstance(error, RuntimeError) and _TORCH_WRITER.search(said) is not None
    return isinstance(error, (OSError, SafetensorError)) or by_torch or (_is_bare(error) and "(os error " in said)


def _is_bare(error: BaseException) -> bool:
    """Whether an error has no class of its own, as those of the package tokenizers."""
    return type(error) is Exception


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
    if not str(path).strip():
        raise UsageError(f"{setting} is empty; name a {'folder' if folder else 'file'}")
    if _is_stream(Path(path)):
        if folder:
            raise UsageError(f"{setting}: {path} is no regular file; choose a folder")
        return
    final = above = _resolve(path)
    if final.exists() and final.is_dir() != folder:
        found, wanted = ("a file", "another folder") if folder else ("a folder", "the name of a file")
        raise UsageError(f"{setting}: {path} is {found}; choose {wanted}")
    while not above.exists() or (above == final and not folder):
        above = above.parent
    if above != final and not above.is_dir():
        raise UsageError(f"{setting}: {path} cannot be made, for {above} is a file; choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"{setting}: {path} cannot be written, for {above} is read-only; choose another folder")


def check_replaceable(path: str | Path, setting: str) -> None:
    """Check that the folder at ``path`` can be made, or replaced as a whole, by a new one beside it.

    Raises:
        UsageError: if it is where something is mounted, the current folder, or in a folder that is read-only.
    """
    final = _resolve(path)
    if final.exists() and (os.path.ismount(final) or final == Path.cwd()):
        what = "where something is mounted" if os.path.ismount(final) else "the current folder"
        raise UsageError(f"{setting}: {path} is {what} and cannot be replaced as a whole; choose a folder inside it")
    if final.exists() and not os.access(final.parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{setting}: {path} cannot be replaced, for {final.parent} is read-only; choose another folder"
        )


def format_bytes(count: int) -> str:
    """A number of bytes for a person to read, e.g. ``"1.5 GB"``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _resolve(path: str | Path) -> Path:
    # Path.resolve raises a RuntimeError where links form a circle
    return Path(os.path.realpath(path))


def _is_stream(path: Path) -> bool:
    """Whether bytes go through a path and not into a file: a device, a pipe, a socket, what is open already."""
    there = path.exists() and not path.is_file() and not path.is_dir()
    return there or _STREAM.fullmatch(str(path)) is not None


def _name_scratch(final: Path, kind: str = "part") -> Path:
    """A hidden name beside ``final`` that says which process uses it."""
    name = f".{_shorten(final.name)}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}"
    _in_use.add(name)
    return final.with_name(name)


def _shorten(name: str) -> str:
    """As much of a file's name as leaves room for more: a name has 255 bytes at most."""
    return os.fsdecode(os.fsencode(name)[:100])


def _list_scratch(final: Path) -> list[Path]:
    """What processes on this machine have written, or put aside, for ``final``."""
    name = _shorten(final.name)
    found = final.parent.glob(f".{glob.escape(name)}.{glob.escape(_HOST)}-*")
    return [path for path in found if (match := _SCRATCH.fullmatch(path.name)) and match["name"] == name]


def _is_dead(scratch: Path) -> bool:
    """Whether the process that made a scratch name on this machine is gone."""
    match = _SCRATCH.fullmatch(scratch.name)
    assert match is not None, scratch
    # in a container every process may have the same number
    return scratch.name not in _in_use if int(match["pid"]) == os.getpid() else not is_alive(int(match["pid"]))


def _sweep(final: Path) -> None:
    """Remove what killed runs on this machine left behind, and bring back what they had set aside."""
    for path in [path for path in _list_scratch(final) if _is_dead(path)]:
        if path.suffix == ".old" and not final.exists():
            path.replace(final)
        else:
            delete(path)


def _sweep_together(finals: Sequence[Path]) -> None:
    """As `_sweep`, for a set: the old files come back together, or not at all."""
    left = {final: [path for path in _list_scratch(final) if _is_dead(path)] for final in finals}
    undone = not finals[-1].exists() and any(path.suffix == ".old" for path in left[finals[-1]])
    for final, paths in left.items():
        for path in paths:
            if undone and path.suffix == ".old":
                path.replace(final)
            else:
                delete(path)


def _holds_only(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder can be replaced as a whole for the sake of these files of its own."""
    there = [item.name for item in folder.iterdir() if not (item.is_file() and is_scratch(item))]
    whole = bool(there) and set(there) <= set(names)
    return whole and not os.path.ismount(folder) and folder != Path.cwd() and os.access(folder.parent, os.W_OK)


def sync(part: Path) -> None:
    """Wait until the bytes are on the disk: a rename may reach it before them. Give files the modes of new files."""
    if part.is_dir():
        mode = part.stat().st_mode & 0o666
        for file in part.rglob("*"):
            # safetensors makes files that their owner alone may read
            if file.is_file() and file.stat().st_mode & 0o777 == 0o600 != mode:
                file.chmod(mode)
            _sync_one(file)
    _sync_one(part)


def _sync_one(file: Path) -> None:
    if ON_WINDOWS and file.is_dir():
        return
    handle = os.open(file, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(part: Path, final: Path) -> None:
    """Rename onto ``final``; a folder in the way changes places with it, or is set aside first."""
    if final.is_dir() and not part.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder stands where the file is to be", str(final))
    if not final.is_dir():
        part.replace(final)
    elif not exchange(part, final):
        aside = _name_scratch(final, "old")
        final.replace(aside)
        try:
            part.replace(final)
        except OSError:
            aside.replace(final)
            raise
        _discard(aside)
    # the new name stands; where the folder cannot be synced, only a loss of power could undo it
    with contextlib.suppress(OSError):
        _sync_one(final.parent)


def _replace_together(parts: Sequence[Path], finals: Sequence[Path]) -> None:
    """Put a set in its place: the old mark goes first, the new mark comes last."""
    asides = [(final, _name_scratch(final, "old")) for final in reversed(finals) if final.exists()]
    done: list[Path] = []
    try:
        for final, aside in asides:
            final.replace(aside)
        for part, final in zip(parts, finals, strict=True):
            part.replace(final)
            done.append(final)
    except OSError:
        for final in done:
            final.unlink()
        for final, aside in reversed(asides):
            if aside.exists():
                aside.replace(final)
        raise
    with contextlib.suppress(OSError):
        _sync_one(finals[0].parent)
    for _, aside in asides:
        _discard(aside)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False, and nothing done, where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _discard(scratch: Path) -> None:
    """Delete a scratch name; what cannot be deleted now goes with the next write to the same place."""
    with contextlib.suppress(OSError):
        delete(scratch)
    _in_use.discard(scratch.name)


@contextlib.contextmanager
def _explaining_full_disk(final: Path, need: int, *parts: Path) -> Iterator[None]:
    if need > free_bytes(final.parent):
        raise DoraError(_explain_disk_full(final, need))
    try:
        yield
    except DoraError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise DoraError(_explain_disk_full(final, max(need, sum(map(count_bytes, parts))))) from error
        if isinstance(error, RuntimeError) and is_write_error(error):
            free = format_bytes(free_bytes(final.parent))
            raise DoraError(f"{final} could not be written: {str(error).splitlines()[0]}; {free} are free") from error
        raise


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is a full disk."""
    if error is None:
        return False
    full = error.errno in _FULL if isinstance(error, OSError) else _is_full_in_words(error)
    return full or _is_disk_full(error.__cause__ or error.__context__)


def _is_full_in_words(error: BaseException) -> bool:
    return (isinstance(error, SafetensorError) or _is_bare(error)) and any(
        f"os error {code})" in str(error) for code in (*_FULL, _FULL_BY_WINDOWS)
    )


def _explain_disk_full(final: Path, need: int) -> str:
    kept = "what stood there before is untouched" if final.exists() else "nothing was left behind"
    wanted = f" needs {format_bytes(need)} or more" if need else ""
    return (
        f"the disk is full: writing {final}{wanted}, and {format_bytes(free_bytes(final))} are free\n"
        f"  {kept}; free some space, or choose another folder"
    )
