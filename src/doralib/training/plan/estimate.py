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
from ...process import read_machine_memory, read_resident_memory
from ...recipe import Recipe
from .batch import Lengths, assume_full, measure_lengths
from .calibration import NotCalibrated, time_step
from .sampled import Beside, Sampled, SampledRows
from .skeleton import TEXT_HEADS, Skeleton, Weights, find_dtype, find_widest, weigh
from .trace import StepBytes, trace_step

GIB = 2**30
_CUDA_BYTES = round(0.6 * GIB)
"""The context, the kernels and cuBLAS's own memory, on a GPU of this decade."""
# bytes of state for each byte of trained parameters in float32, by the optimizer's name
_STATE = {"sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0, "adafactor": 0.1, "apollo": 1.0, "galore": 1.0}
_SHARDED = ("fsdp2", "zero3")
_MOST_ROWS = 4096
_TOO_MUCH = 1.15
"""So much more than there is, and a run is refused."""


@dataclass(frozen=True)
class MemoryPart:
    """A part of the memory, and the arithmetic behind it."""

    name: str
    bytes: int
    how: str


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


def in_gib(count: float) -> str:
    """Bytes for a person, in the unit that devices are sold by."""
    return f"{count / GIB:.2f} GiB"


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
    setting = _Setting(recipe, "cuda" if planned else here.type, processes, find_strategy(recipe, processes))
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
    return replace(made, advice=setting.advise(made, growth)) if made.fits is False else made


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


def find_strategy(recipe: Recipe, processes: int) -> str:
    """How several processes share the work."""
    if processes == 1:
        return "one process"
    said = recipe.distributed.strategy
    return "ddp" if said == "launcher" else said


@dataclass(frozen=True)
class Growth:
    """What one block and one row take; all that is linear in both."""

    blocks: int
    weights: tuple[Weights, ...]
    """Of one block and all around them, and of two."""
    widest: int
    itemsize: int
    steps: tuple[tuple[StepBytes, ...], ...]
    """By the number of rows (1, 2), then of blocks."""
    beside: Beside | None = None
    """A pipeline's parts that are not trained."""

    @classmethod
    def of(cls, skeleton: Skeleton, tokens: int, labels: int | None) -> "Growth":
        """Trace a few.

        Args:
            tokens: Of a row.
            labels: Of a row; None: the model has a head that classifies.
        """
        weights, widest, steps = [], 0, ([], [])  # type: ignore[var-annotated]
        for few in skeleton.few:
            for rows in (1, 2):
                # a model of its own, as its first step makes the copies that its layers keep
                model = skeleton.adapted(few)
                steps[rows - 1].append(trace_step(model, rows, tokens, None if labels is None else rows * labels))
            weights.append(weigh(model))
            widest = find_widest(model)
        dtype = find_dtype(skeleton.recipe, skeleton.plain.config)
        return cls(skeleton.count, tuple(weights), widest, dtype.itemsize, tuple(map(tuple, steps)))

    @classmethod
    def of_sampled(cls, sampled: Sampled) -> "Growth":
        """Trace the whole model with one row and with two."""
        steps = []
        for rows in (1, 2):
            model = sampled.adapted()
            steps.append((sampled.trace(model, rows),))
        frozen = (p.dtype.itemsize for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
        itemsize = max(frozen, default=4)
        return cls(1, (weigh(model),), find_widest(model), itemsize, tuple(steps), sampled.beside)

    @property
    def whole(self) -> Weights:
        """All blocks."""
        return self._to_all(self.weights)

    @property
    def block(self) -> Weights:
        """One block; the whole model where it was not cut."""
        first, *more = self.weights
        return more[0].plus(first, -1) if more else first

    def step(self, rows: int) -> StepBytes:
        """Of all blocks and so many rows."""
        one, two = (self._to_all(steps) for steps in self.steps)
        return one.plus(two.plus(one, -1), rows - 1)

    def _to_all(self, few: tuple[Any, ...]) -> Any:
        first, *more = few
        return first.plus(more[0].plus(first, -1), self.blocks - 1) if more else first


@dataclass(frozen=True)
class _Setting:
    """Where a recipe runs."""

    recipe: Recipe
    device: str
    processes: int
    strategy: str

    def parts(self, growth: Growth, rows: int, lengths: Lengths | SampledRows) -> tuple[MemoryPart, ...]:
        """All that one process holds when it holds most."""
        whole, step = growth.whole, growth.step(rows)
        sharded = self.processes if self.strategy in _SHARDED else 1
        over = f" / {sharded} processes" if sharded > 1 else ""
        offload = sharded > 1 and self.recipe.distributed.cpu_offload
        away = ", in the CPU's memory" if offload else ""
        dense, per_weight = whole.frozen - whole.quantized, growth.itemsize
        packed = whole.frozen_bytes - dense * per_weight
        told = f"{dense:,} x {per_weight} bytes"
        told += f" + {whole.quantized:,} quantized x {packed * 8 / whole.quantized:.2f} bits" if whole.quantized else ""
        states = whole.trained_bytes * self._state_factor()
        shared = self.processes if sharded > 1 or self.strategy == "zero2" else 1
        among = f" / {shared} processes" if shared > 1 else ""
        gradients = whole.trained_bytes
        parts = [
            self._process(),
            MemoryPart("weights", 0 if offload else -(-whole.frozen_bytes // sharded), f"frozen: {told}{over}{away}"),
            MemoryPart(
                "adapter",
                0 if offload else -(-whole.trained_bytes // sharded),
                f"trained: {whole.trained:,} in {in_gib(whole.trained_bytes)}{over}",
            ),
            MemoryPart(
                "optimizer", 0 if offload else round(states / shared), f"{self._optim()}: {in_gib(states)}{among}{away}"
            ),
        ]
        if sharded > 1:
            outside = growth.weights[0].plus(growth.block, -1) if len(growth.weights) > 1 else growth.block
            gathered = outside.frozen_bytes + outside.trained_bytes
            gathered += 2 * (growth.block.frozen_bytes + growth.block.trained_bytes)
            parts.append(MemoryPart("gathered", gathered, "two blocks at a time, the embedding and the head whole"))
        if self.strategy == "ddp":
            parts.append(MemoryPart("buckets", gradients, "a copy of the gradients, for the other processes"))
        moving = self._step_parts(step, gradients, shared, among, rows, lengths, growth)
        if growth.beside is not None:
            parts.append(self._beside(growth.beside, round(states / shared) + sum(part.bytes for part in moving)))
        return (*parts, *moving)

    def _beside(self, beside: Beside, moving: int) -> MemoryPart:
        if self.device == "cpu":
            return MemoryPart("pipeline", beside.weights, "its parts that are not trained")
        more = max(0, beside.most - moving)
        how = f"parts that are not trained take {in_gib(beside.most)} before training, and are then in the CPU's memory"
        return MemoryPart("pipeline", more, how + (f": {in_gib(more)} more than a step" if more else ""))

    def _step_parts(
        self,
        step: StepBytes,
        gradients: int,
        shared: int,
        among: str,
        rows: int,
        lengths: Lengths | SampledRows,
        growth: Growth,
    ) -> list[MemoryPart]:
        steps = int(self.recipe.training.get("gradient_accumulation_steps", 1))
        # without accumulation the first gradients come when the last activations go
        apart = steps > 1 or shared > 1
        most = step.peak_without_gradients if apart else step.peak
        working = max(0, most - step.kept - step.logits)
        held = -(-gradients // shared) if apart else min(gradients, working)
        checkpointed = self.recipe.training.get("gradient_checkpointing")
        how = "of each block its input" if checkpointed else "of each block all that its backward pass reads"
        blocks = f"{growth.blocks} blocks" if growth.beside is None and growth.blocks > 1 else "the whole model"
        dense = f"; a weight of {growth.widest:,} made dense" if growth.widest else ""
        parts = [
            MemoryPart("gradients", held, f"{in_gib(gradients)}{among}"),
            MemoryPart("activations", step.kept, f"{lengths.describe(rows)}, {blocks}: {how}"),
            MemoryPart("logits", step.logits, lengths.describe_logits(rows)),
            MemoryPart("working", working - (0 if apart else held), f"the backward pass, where it holds most{dense}"),
        ]
        if self.device == "cpu":
            moving = sum(part.bytes for part in parts)
            parts.append(
                MemoryPart("allocator", moving // 10, "what it keeps of freed memory: a tenth of what comes and goes")
            )
        return parts

    def _process(self) -> MemoryPart:
        if self.device == "cuda":
            return MemoryPart("process", _CUDA_BYTES, "CUDA's context and libraries")
        resident = read_resident_memory() or 0
        return MemoryPart("process", resident, "Python and the libraries, as this process holds them now")

    def _optim(self) -> str:
        return str(self.recipe.training.get("optim", "adamw_torch"))

    def _state_factor(self) -> float:
        name = self._optim()
        factor = next((each for key, each in _STATE.items() if key in name), 2.0)
        # of float32: a byte for each number of the state
        return factor / 4 if "8bit" in name else factor

    def find_largest(self, growth: Growth, limit: int, lengths: Lengths | SampledRows) -> int:
        """Rows of the largest batch within a limit."""

        def peak(rows: int) -> int:
            return sum(part.bytes for part in self.parts(growth, rows, lengths))

        low, high = 0, _MOST_ROWS
        while low < high:
            middle = -(-(low + high) // 2)
            low, high = (middle, high) if peak(middle) <= limit else (low, middle - 1)
        return low

    def advise(self, estimate: Estimate, growth: Growth) -> tuple[str, ...]:
        """What to change for less memory, that which costs least first."""
        recipe, said = self.recipe, []
        training = recipe.training
        assert estimate.limit_bytes is not None
        if estimate.largest_rows:
            times = -(-estimate.rows // estimate.largest_rows) * int(training.get("gradient_accumulation_steps", 1))
            said.append(
                f"training.per_device_train_batch_size={estimate.largest_rows} is the largest that fits "
                f"(with training.gradient_accumulation_steps={times} it learns about the same)"
            )
        if not training.get("gradient_checkpointing"):
            said.append("training.gradient_checkpointing=true keeps a block's input alone, for a third more time")
        by_name = {part.name: part.bytes for part in estimate.parts}
        if growth.itemsize == 4 and by_name["weights"] > 0.2 * estimate.limit_bytes:
            said.append("model.dtype=bfloat16 halves the weights and the activations")
        if recipe.model.quantization is None and recipe.adapter.method != "full" and not growth.whole.quantized:
            saved = round(growth.whole.frozen * growth.itemsize * 0.7)
            if by_name["weights"] > 0.2 * estimate.limit_bytes:
                said.append(f"model.quantization=nf4 takes about {in_gib(saved)} off the weights")
        if by_name["activations"] + by_name["logits"] > 0.2 * estimate.limit_bytes:
            said.append("a smaller " + ("diffusion.resolution" if growth.beside is not None else "data.max_length"))
        if self.strategy not in _SHARDED and by_name["weights"] > 0.3 * estimate.limit_bytes:
            said.append("several GPUs with distributed.strategy=fsdp2, which shares the weights out")
        if self.strategy in _SHARDED and not recipe.distributed.cpu_offload:
            said.append("distributed.cpu_offload=true, which keeps the shards in the CPU's memory")
        if recipe.adapter.method == "full":
            said.append("adapter.method=dora, which has no gradient or state for the weights")
        return tuple(said)


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
