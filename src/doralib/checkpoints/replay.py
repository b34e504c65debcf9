"""Whether a merged checkpoint is, bit for bit, what its base and its adapters make; everything is read anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..disk import format_bytes
from ..errors import list_some
from ..files import read_json
from .merge import Ingredient, plan_again
from .safetensors import read_bytes
from .stream import NewFile, Sink, ignore_progress, stream_weights


@dataclass(frozen=True)
class Replay:
    """What a replay of a merge found."""

    tensors: int
    bytes: int
    """Compared, of all tensors."""
    faults: tuple[str, ...]
    """A line for each tensor, header or file that is not as it should be."""

    @property
    def passed(self) -> bool:
        """Whether every bit is as it should be."""
        return not self.faults

    def text(self) -> str:
        """For a person."""
        if self.passed:
            return f"replayed bit for bit: {self.tensors} tensors, {format_bytes(self.bytes)}, all equal"
        count = len(self.faults)
        head = f"NOT what base and adapters make: {count} difference{'s' * (count != 1)} in {self.tensors} tensors"
        return "\n  ".join([head, list_some(self.faults)])


def verify_bits(
    merged: Path,
    adapters: str | Path | Sequence[Ingredient],
    base: str | Path,
    dtype: str | None = None,
    *,
    untie: bool = False,
) -> Replay:
    """Make every tensor again by blocks, as the merge did, and compare its bits with those that stand in the files.

    Tensors that no adapter touches are compared with the base's, and headers with those that belong there. Memory
    holds what a merge needs and as much again.

    Args:
        dtype: as it was given to the merge, and so is ``untie``.

    Raises:
        DoraError: if an adapter does not fit the base.
    """
    ingredients = [Ingredient(Path(adapters))] if isinstance(adapters, str | Path) else list(adapters)
    files, plan = plan_again(merged, ingredients, base, dtype, untie=untie)
    starts = {file.path: torch.tensor(sorted(out.start for out in file.outs)) for file in files}
    differences: list[tuple[Path, Tensor]] = []

    def compare(file: Path, at: int, want: Tensor) -> None:
        expected = want.reshape(-1).view(torch.uint8)
        got = read_bytes(file, at, len(expected)) if file.is_file() else expected[:0]
        if len(places := (got != expected[: len(got)]).nonzero().flatten()):
            differences.append((file, _count_by_tensor(places + at, starts[file])))

    def compare_copy(source: Path, start: int, count: int, target: Path, at: int) -> None:
        compare(target, at, read_bytes(source, start, count))

    stream_weights(files, plan, ignore_progress, Sink(compare, compare_copy))
    faults = []
    for file in files:
        counts = sum((count for path, count in differences if path == file.path), torch.zeros(len(file.outs)))
        faults += _describe(file, counts.long().tolist())
    faults += _check_index(merged, files)
    strange = {path.name for path in merged.glob("*.safetensors")} - {file.path.name for file in files}
    faults += [f"{name}: no file of this merge" for name in sorted(strange)]
    return Replay(sum(len(file.outs) for file in files), sum(file.nbytes for file in files), tuple(faults))


def _count_by_tensor(places: Tensor, starts: Tensor) -> Tensor:
    """How many of these bytes of a file are in each of its tensors, which begin at ``starts``."""
    return torch.bincount(torch.bucketize(places, starts, right=True) - 1, minlength=len(starts))


def _check_index(merged: Path, files: Sequence[NewFile]) -> list[str]:
    """A line for an index that is missing, or says other files than the tensors are in."""
    indexes = sorted(merged.glob("*.safetensors.index*.json"))
    if len(files) > 1 and not indexes:
        return ["the index of the shards is missing"]
    expected = {out.name: file.path.name for file in files for out in file.outs}
    return [
        f"{index.name}: does not say where the tensors are"
        for index in indexes
        if read_json(index).get("weight_map") != expected
    ]


def _describe(file: NewFile, counts: Sequence[int]) -> list[str]:
    """A line for the file, its header and each of its tensors that is not as it should be."""
    name = file.path.name
    if not file.path.is_file():
        return [f"{name}: is missing"]
    size, expected = file.path.stat().st_size, len(file.header) + file.nbytes
    header = bytes(read_bytes(file.path, 0, len(file.header)).tolist())
    faults = [f"{name}: has another header"] * (header != file.header)
    faults += [f"{name}: has {size:,} bytes, not {expected:,}"] * (size != expected)
    tensors = zip(sorted(file.outs, key=lambda out: out.start), counts, strict=True)
    return faults + [f"{out.name}: {count:,} of {out.nbytes:,} bytes differ" for out, count in tensors if count]
