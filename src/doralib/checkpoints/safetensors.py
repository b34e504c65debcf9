"""Checkpoints on disk as names, places and row blocks: what safetensors headers say, and plain reads of the bytes.

Nothing is memory-mapped, so the memory in use is the blocks that were asked for.
Format: https://github.com/huggingface/safetensors (8 bytes of length, little endian; JSON; the data).
"""

import ctypes
import errno
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..disk import format_bytes
from ..documents import decode_json
from ..errors import DoraError, UsageError
from ..files import explain_git_lfs, find_file, list_folder, read_json
from .limits import read_config

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# weights as plain numbers; float8 and integers mean something only with scales kept elsewhere
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot")
# `model.safetensors.index.json`, of a variant `model.safetensors.index.fp16.json`
_INDEX = re.compile(r"\.(safetensors|bin)\.index(\.[^.]+)?\.json$")
# transformers' name of a model's weights, and diffusers'
_MODEL_NAMES = ("model", "diffusion_pytorch_model")
_COPY_BLOCK = 4 << 20
# between two file systems, or on one that cannot
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
_VARIANT = re.compile(r"(?:model|diffusion_pytorch_model)\.(?:safetensors\.index\.)?([^.-]+)(?:\.safetensors|\.json)")
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


class Stored(Protocol):
    """What has to be known of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def code(self) -> str:
        """Its dtype's name."""

    @property
    def plain(self) -> bool:
        """Whether it holds floating-point numbers that mean themselves."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place in a file."""

    name: str
    code: str
    """safetensors' name of the dtype, e.g. ``"BF16"``."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """First byte, counted from the start of the file."""
    nbytes: int

    @property
    def plain(self) -> bool:
        """Whether it holds floating-point numbers that mean themselves."""
        return self.code in PLAIN

    @property
    def matrix(self) -> tuple[int, int]:
        """Its shape as rows: the first axis by all others."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    def cast(self, code: str) -> Self:
        """The same tensor in another dtype."""
        return replace(self, code=code, nbytes=math.prod(self.shape) * DTYPES[code].itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.matrix[1] * DTYPES[self.code].itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes."""

    path: Path
    slots: tuple[Slot, ...]
    metadata: Mapping[str, str] | None
    data_start: int
    size: int

    def header(self) -> bytes:
        """Everything before the data, as it is."""
        with self.path.open("rb") as file:
            return file.read(self.data_start)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's weights in one safetensors file, or in shards with an index; what was read when it was opened."""

    folder: Path
    shards: tuple[Shard, ...]
    index: Path | None
    """The ``.safetensors.index.json``, if there is one."""
    slots: Mapping[str, Slot]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the headers of the checkpoint in a folder, or of one .safetensors file; every size is checked.

        Raises:
            UsageError: if there is none.
            DoraError: listing every shard or tensor that the index promises and the folder lacks, and every file cut
                short.
        """
        path = Path(path)
        weights = path if path.is_file() else _find_weights_file(path)
        if not _INDEX.search(weights.name):
            shard = read_shard(weights)
            return cls(weights.parent, (shard,), None, {slot.name: slot for slot in shard.slots})
        return cls._open_index(weights)

    @classmethod
    def _open_index(cls, index: Path) -> Self:
        weight_map = _read_weight_map(index)
        shards, problems = {}, []
        for name in sorted(set(weight_map.values())):
            try:
                shards[name] = read_shard(index.parent / name)
            except DoraError as error:
                problems.append(str(error))
        found = {(file, slot.name): slot for file, shard in shards.items() for slot in shard.slots}
        for name, file in weight_map.items():
            if file in shards and (file, name) not in found:
                problems.append(f"{file} has no tensor {name}, which {index.name} says is there")
        if problems:
            raise DoraError("\n  ".join([f"the checkpoint in {index.parent} is not whole:", *problems]))
        slots = {name: found[file, name] for name, file in weight_map.items()}
        return cls(index.parent, tuple(shards.values()), index, slots)

    def config(self) -> dict[str, Any]:
        """The model's config.json; empty if it has none.

        Raises:
            DoraError: as `read_config`.
        """
        path = self.folder / "config.json"
        return read_config(path) if path.is_file() else {}

    def companions(self) -> tuple[list[Path], list[Path]]:
        """The model's other files, relative to its folder, and those to leave out: weights in any format, and links.

        A link is followed where the weights themselves are, which in the hub's cache is a folder of its own.
        """
        ours = {shard.path.name for shard in self.shards} | ({self.index.name} if self.index else set())
        keep: list[Path] = []
        leave: list[Path] = []
        if not (self.folder / "config.json").is_file():
            return keep, leave  # a lone file among others: what lies beside it is not its model
        folders = {self.folder.resolve(), *(shard.path.resolve().parent for shard in self.shards)}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder)
            if str(name) not in ours and not any(part.startswith(".") for part in name.parts[:-1]):
                inside = not folders.isdisjoint(path.resolve().parents)
                (leave if _is_weights(name) or not inside else keep).append(name)
        return keep, leave


def read_shard(path: Path) -> Shard:
    """The header of one safetensors file.

    Raises:
        UsageError: if there is no such file.
        DoraError: if it is cut short, or not safetensors.
    """
    size = find_file(path).stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        data_start = 8 + length
        if size < 8 or length > _LONGEST_HEADER:
            raise DoraError(_explain_not_safetensors(path))
        if data_start > size:
            raise DoraError(_explain_cut(path, size, data_start))
        header = _parse_header(path, file.read(length))
    metadata = header.pop("__metadata__", None)
    try:
        if metadata is not None and not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError
        slots = sorted(
            (_make_slot(path, data_start, name, entry) for name, entry in header.items()), key=lambda s: s.start
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise DoraError(f"{path} has a header that is not safetensors'; download it again") from None
    _check_sizes(path, size, data_start, slots)
    return Shard(path, tuple(slots), metadata, data_start, size)


def read_rows(slot: Slot, rows: slice) -> Tensor:
    """A block of a tensor's rows as (rows, everything else) in the stored dtype, in new memory.

    Raises:
        DoraError: if torch has no such dtype.
    """
    if slot.code not in DTYPES:
        raise DoraError(f"{slot.file} stores {slot.name} as {slot.code}, which is no dtype that torch has")
    first, last, _ = rows.indices(slot.matrix[0])
    count = max(0, last - first)
    block = torch.empty(count, slot.matrix[1], dtype=DTYPES[slot.code])
    if block.numel():
        _fill(block, slot, slot.start + first * slot.row_bytes)
    return block


def read_whole(slot: Slot) -> Tensor:
    """A whole tensor in its own shape and stored dtype."""
    return read_rows(slot, slice(None)).view(slot.shape)


def cast_to(name: str, block: Tensor, code: str) -> Tensor:
    """Numbers in the dtype of a file, to be written.

    Raises:
        DoraError: if one is too large for float16.
    """
    cast = block.to(DTYPES[code]).contiguous()
    if code == "F16" and bool((cast.isinf() & block.isfinite()).any()):
        largest = block.abs().max().item()
        raise DoraError(f"{name} holds {largest:.3g}, too large for float16; merge with --dtype bfloat16")
    return cast


def view_bytes(block: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for reading and writing files; valid while the tensor lives."""
    # torch's own bridge needs numpy and refuses bfloat16
    return memoryview((ctypes.c_ubyte * block.nbytes).from_address(block.data_ptr())).cast("B")


def lay_out(slots: Sequence[Slot], file: Path, metadata: Mapping[str, str] | None) -> tuple[bytes, list[Slot]]:
    """The header of a new file that holds these tensors in this order, and their places in it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    ends = list(itertools.accumulate((slot.nbytes for slot in slots), initial=0))
    for slot, start in zip(slots, ends, strict=False):
        entries[slot.name] = {
            "dtype": slot.code,
            "shape": list(slot.shape),
            "data_offsets": [start, start + slot.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8, as safetensors writes them
    header = len(text).to_bytes(8, "little") + text
    placed = [replace(slot, file=file, start=len(header) + start) for slot, start in zip(slots, ends, strict=False)]
    return header, placed


def read_bytes(file: Path, start: int, count: int) -> Tensor:
    """A range of a file, (count,) in uint8; shorter where the file ends."""
    block = torch.empty(count, dtype=torch.uint8)
    view = view_bytes(block)
    with file.open("rb", buffering=0) as source:
        source.seek(start)
        done = 0
        while done < count and (got := source.readinto(view[done:])):
            done += got
    return block[:done]


def copy_bytes(source: Path, start: int, count: int, target: Path, at: int) -> None:
    """Copy a range of one file into another that exists, inside the kernel where it can."""
    with source.open("rb", buffering=0) as src, target.open("r+b", buffering=0) as dst:
        done = 0
        while done < count:
            done += _copy_some(src, dst, count - done, start + done, at + done)


def write_at(target: Path, at: int, block: Tensor) -> None:
    """Write the bytes of a contiguous tensor into a file that exists."""
    view = view_bytes(block)
    with target.open("r+b", buffering=0) as file:
        file.seek(at)
        done = 0
        while done < len(view):
            done += file.write(view[done:]) or 0


def _copy_some(src: FileIO, dst: FileIO, count: int, start: int, at: int) -> int:
    """Bytes copied, at least one."""
    try:
        kernel = getattr(os, "copy_file_range", None)  # Linux alone has it
        got = kernel(src.fileno(), dst.fileno(), count, start, at) if kernel else -1
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        got = -1
    if got < 0:
        src.seek(start)
        dst.seek(at)
        got = dst.write(src.read(min(count, _COPY_BLOCK))) or 0
    if got == 0:
        raise DoraError("a shard became shorter while it was copied; nothing was written")
    return got


def _is_weights(name: Path) -> bool:
    weights = name.suffix in _WEIGHTS or bool(_INDEX.search(name.name))
    return weights or name.name == "adapter_config.json"


def _fill(block: Tensor, slot: Slot, at: int) -> None:
    view = view_bytes(block)
    with slot.file.open("rb", buffering=0) as file:
        file.seek(at)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:]) or 0
            if got == 0:
                raise DoraError(f"{slot.file} became shorter while {slot.name} was read; nothing was written")
            done += got


def find_variant(folder: Path, variant: str) -> Path:
    """The file of weights, or the index of its shards, of one variant (fp16, ema, ...) that a folder holds.

    Raises:
        UsageError: if it holds none of this name, with those that it holds.
    """
    for name in _MODEL_NAMES:
        for file in (f"{name}.{variant}.safetensors", f"{name}.safetensors.index.{variant}.json"):
            if (folder / file).is_file():
                return folder / file
    found = sorted({match[1] for file in folder.glob("*.safetensors*") if (match := _VARIANT.fullmatch(file.name))})
    there = f"it has {', '.join(found)}" if found else f"it has no variants, and holds: {list_folder(folder)}"
    raise UsageError(f"--variant {variant}: {folder} has no such weights; {there}")


def _find_weights_file(folder: Path) -> Path:
    """The file that transformers would read; else the only one there is."""
    if not folder.is_dir():
        raise UsageError(f"there is no model folder {folder}")
    for name in _MODEL_NAMES:
        for file in (f"{name}.safetensors", f"{name}.safetensors.index.json"):
            if (folder / file).is_file():
                return folder / file
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = [file for file in folder.glob(pattern) if not file.name.startswith("adapter_")]
        if len(found) == 1:
            return found[0]
    raise UsageError(
        f"{folder} has no model.safetensors or model.safetensors.index.json; it holds: {list_folder(folder)}\n"
        "  of several variants choose one with --variant; weights in another format: load them in transformers and "
        "save_pretrained them first"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    whole = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not whole or not weight_map:
        raise DoraError(f"{index} has no weight_map from tensors to files; download it again")
    # read as Windows does, a drive or a backslash is a path too, wherever the index was written
    if outside := sorted({file for file in weight_map.values() if PureWindowsPath(file).name != file}):
        raise DoraError(f"{index} names files outside its own folder: {', '.join(outside)}")
    return weight_map


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = decode_json(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise DoraError(_explain_not_safetensors(path))
    return header


def _make_slot(path: Path, data_start: int, name: str, entry: Mapping[str, Any]) -> Slot:
    start, end = entry["data_offsets"]
    return Slot(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), path, data_start + start, end - start)


def _check_sizes(path: Path, size: int, data_start: int, slots: list[Slot]) -> None:
    """Every tensor as long as its shape says, one after the other, up to the end of the file."""
    end = data_start
    for slot in slots:
        known = slot.code in DTYPES
        if slot.start != end or (known and slot.nbytes != math.prod(slot.shape) * DTYPES[slot.code].itemsize):
            raise DoraError(f"{path} has a header that contradicts itself at {slot.name}; download it again")
        end = slot.start + slot.nbytes
    if size < end:
        raise DoraError(_explain_cut(path, size, end))
    if size > end:
        raise DoraError(f"{path} has {format_bytes(size - end)} after its last tensor; download it again")


def _explain_cut(path: Path, size: int, need: int) -> str:
    missing = f"{size:,} bytes of {need:,} or more, {need - size:,} are missing"
    return f"{path} is cut short: {missing}; download or copy it again"


def _explain_not_safetensors(path: Path) -> str:
    not_one = f"{path} ({format_bytes(path.stat().st_size)}) is not a safetensors file; download or copy it again"
    return explain_git_lfs(path) or not_one
