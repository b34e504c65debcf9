"""What a recipe will take of each device, found without its weights: bytes, seconds a step, and the largest batch.

The model is built from its config.json on the meta device with one block and with two, and a step of it is traced:
bytes grow by equal parts with each block and each row, so all else follows.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...checkpoints.kind import find_kind, is_pipeline
from ...checkpoints.models import load_config
from ...data.rows import RawRows
from ...errors import UsageError
from ...process import read_machine_memory
from ...recipe import Recipe
from .batch import Lengths, assume_full, measure_lengths
from .calibration import NotCalibrated, time_step
from .growth import Growth
from .parts import GIB, MemoryPart, Setting, find_strategy, in_gib
from .sampled import Sampled, SampledRows
from .skeleton import TEXT_HEADS, Skeleton

_TOO_MUCH = 1.15
"""So much more than there is, and a run is refused."""


@dataclass(frozen=True)
class Estimate:
    """What one process takes of its device."""

    device: str
    processes: int
    strategy: str
    rows: int
    """Of one batch of one process."""
    lengths: Lengths | SampledRows
    parts: tuple[MemoryPart, ...]
    limit_bytes: int | None
    largest_rows: int | None
    """The largest batch that fits; 0 where none does, None where the device's memory is not known."""
    advice: tuple[str, ...]
    seconds_per_step: float | None
    seconds_how: str

    @property
    def peak_bytes(self) -> int:
        """The most at once."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """Whether the device has as much; None where that is not known."""
        return None if self.limit_bytes is None else self.peak_bytes <= self.limit_bytes

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        told = {key: value for key, value in asdict(self).items() if key not in ("parts", "lengths")}
        parts = {part.name: {"bytes": part.bytes, "how": part.how} for part in self.parts}
        return {
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            **told,
            "lengths": asdict(self.lengths),
            "parts": parts,
        }

    def summary(self) -> str:
        """One line."""
        of = "" if self.limit_bytes is None else f" of {in_gib(self.limit_bytes)}"
        largest = max(self.parts, key=lambda part: part.bytes)
        each = "each process takes " if self.processes > 1 else ""
        more = "; it may not fit" if self.fits is False else ""
        return f"{each}about {in_gib(self.peak_bytes)}{of}, most of it {largest.name} ({in_gib(largest.bytes)}){more}"


def estimate_run(
    recipe: Recipe,
    *,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    rows: RawRows | None = None,
    sample: Callable[[], Sampled] | None = None,
    calibrate: bool = True,
) -> Estimate:
    """Estimate memory and time of a recipe; reads the model's config.json and none of its weights.

    Args:
        gpus: Plan for so many GPUs instead of this device.
        gpu_memory: GiB of each.
        rows: The data, where they have been read: lengths are measured then.
        sample: Makes batches of them, for a model that sees more than text; without it such a model is not planned.
        calibrate: Run a few small steps for the time; only this device can be timed.

    Raises:
        UsageError: if there is no such model, or its step cannot be known beforehand.
    """
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = gpus is not None or gpu_memory is not None
    processes = gpus or (1 if planned else int(os.environ.get("WORLD_SIZE", "1")))
    setting = Setting(recipe, "cuda" if planned else here.type, processes, find_strategy(recipe, processes))
    count = int(recipe.training.get("per_device_train_batch_size", 8))
    limit = round(gpu_memory * GIB) if gpu_memory else None if planned else _find_limit(here)
    lengths: Lengths | SampledRows
    kind = _find_kind(recipe)
    if kind in (None, "causal", *TEXT_HEADS):
        config, head = load_config(recipe.model), kind if kind in TEXT_HEADS else None
        lengths = assume_full(recipe, config) if rows is None or head else measure_lengths(recipe, config, rows)
        skeleton = Skeleton(recipe, config, head)
        labels = None if head is not None else min(lengths.labels, lengths.longest)
        growth = Growth.of(skeleton, lengths.longest, labels)
        seconds, how = None, "not timed: another device is planned for"
        if not planned:
            seconds, how = _time(skeleton, lengths, count, here, calibrate=calibrate)
    else:
        if sample is None:
            raise UsageError("a plan for this kind of model needs its data, whose rows say how large a batch is")
        sampled = sample()
        lengths, growth = sampled.rows, Growth.of_sampled(sampled)
        seconds, how = None, "not timed: only language models are"
    parts = setting.parts(growth, count, lengths)
    largest = None if limit is None else setting.find_largest(growth, limit, lengths)
    made = Estimate(
        setting.device, processes, setting.strategy, count, lengths, parts, limit, largest, (), seconds, how
    )
    if limit is None or made.fits:
        return made
    return replace(made, advice=setting.advise(growth, parts, limit, count, largest))


def _find_kind(recipe: Recipe) -> Any:
    """What the model sees and gives, as `ModelSettings.kind` has it; None of a model of text."""
    if is_pipeline(recipe.model.path):
        return "text-to-image"
    return find_kind(load_config(recipe.model).to_dict()) if recipe.model.kind == "auto" else recipe.model.kind


def check_fits(estimate: Estimate) -> None:
    """Check that the device has the memory, or nearly: what is estimated may be a little less.

    Raises:
        UsageError: if not, with what to change.
    """
    if estimate.limit_bytes is not None and estimate.peak_bytes > _TOO_MUCH * estimate.limit_bytes:
        advice = "".join(f"\n  {line}" for line in estimate.advice)
        raise UsageError(
            f"this run does not fit: {estimate.summary()}; change it:{advice}\n"
            "  `doralib plan RECIPE` shows the arithmetic; --no-memory-check trains all the same"
        )


def _find_limit(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = read_machine_memory()
    # processes beside each other share it
    return None if memory is None else memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _time(
    skeleton: Skeleton, lengths: Lengths, rows: int, device: torch.device, *, calibrate: bool
) -> tuple[float | None, str]:
    if not calibrate:
        return None, "not timed: --no-calibration"
    if lengths.labels == 0 or not hasattr(skeleton.plain, "get_output_embeddings"):
        return None, "not timed: only language models are"
    missing = skeleton.recipe.model.quantization in ("nf4", "fp4", "int8") and not importlib.util.find_spec(
        "bitsandbytes"
    )
    if missing:
        return None, "not timed: bitsandbytes is not installed"
    try:
        batches = int(skeleton.recipe.training.get("gradient_accumulation_steps", 1))
        return time_step(skeleton, lengths, rows, batches, device)
    except NotCalibrated as why:
        return None, f"not timed: {why}"
