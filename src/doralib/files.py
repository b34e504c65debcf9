"""Files read and written: text, JSON, YAML, safetensors."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .disk import format_bytes, replacing, sync, work_folder
from .documents import decode_json, decode_yaml
from .errors import DoraError, UsageError, did_you_mean, list_some
from .process import ON_WINDOWS

if TYPE_CHECKING:
    from torch import Tensor

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


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """The SHA-256 of some texts in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


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


def read_tensors(path: str | Path) -> "dict[str, Tensor]":
    """The tensors of one safetensors file, on the CPU, in the stored dtypes.

    Raises:
        UsageError: if there is no such file.
        DoraError: if it is truncated or not safetensors.
    """
    import safetensors.torch  # noqa: PLC0415  whoever reads YAML alone pays no seconds for torch

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


def write_tensors(path: str | Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all; tensors that share memory are written apart."""
    import safetensors.torch  # noqa: PLC0415  as above

    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        ready[name] = tensor.detach().cpu().contiguous()
        if ready[name].untyped_storage().data_ptr() in seen:
            ready[name] = ready[name].clone()
        seen.add(ready[name].untyped_storage().data_ptr())
    need = sum(tensor.nbytes for tensor in ready.values())
    with replacing(path, need) as part, work_folder(part) as folder:
        # safetensors writes to a name of its own first, which a kill would leave for good
        file = folder / "tensors"
        safetensors.torch.save_file(ready, file, metadata={"format": "pt", **(metadata or {})})
        sync(folder)
        file.replace(part)
