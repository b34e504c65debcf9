"""What one process holds when it holds most, in parts; the largest batch that fits; what to change for less."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...process import read_resident_memory
from ...recipe import Recipe
from .batch import Lengths
from .growth import Growth
from .sampled import Beside, SampledRows
from .trace import StepBytes

GIB = 2**30
_CUDA_BYTES = round(0.6 * GIB)
"""The context, the kernels and cuBLAS's own memory, on a GPU of this decade."""
# bytes of state for each byte of trained parameters in float32, by the optimizer's name
_STATE = {"sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0, "adafactor": 0.1, "apollo": 1.0, "galore": 1.0}
_SHARDED = ("fsdp2", "zero3")
_MOST_ROWS = 4096


@dataclass(frozen=True)
class MemoryPart:
    """A part of the memory, and the arithmetic behind it."""

    name: str
    bytes: int
    how: str


def in_gib(count: float) -> str:
    """Bytes for a person, in the unit that devices are sold by."""
    return f"{count / GIB:.2f} GiB"


def find_strategy(recipe: Recipe, processes: int) -> str:
    """How several processes share the work."""
    if processes == 1:
        return "one process"
    said = recipe.distributed.strategy
    return "ddp" if said == "launcher" else said


@dataclass(frozen=True)
class Setting:
    """Where a recipe runs, and so what a process holds."""

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

    def advise(
        self, growth: Growth, parts: Sequence[MemoryPart], limit: int, rows: int, largest: int | None
    ) -> tuple[str, ...]:
        """What to change for less memory, that which costs least first.

        Args:
            parts: For this many rows.
            limit: Bytes of the device.
            largest: Batch that fits, in rows; 0 or None: none does.
        """
        recipe, said = self.recipe, []
        training = recipe.training
        if largest:
            times = -(-rows // largest) * int(training.get("gradient_accumulation_steps", 1))
            said.append(
                f"training.per_device_train_batch_size={largest} is the largest that fits "
                f"(with training.gradient_accumulation_steps={times} it learns about the same)"
            )
        if not training.get("gradient_checkpointing"):
            said.append("training.gradient_checkpointing=true keeps a block's input alone, for a third more time")
        by_name = {part.name: part.bytes for part in parts}
        if growth.itemsize == 4 and by_name["weights"] > 0.2 * limit:
            said.append("model.dtype=bfloat16 halves the weights and the activations")
        if recipe.model.quantization is None and recipe.adapter.method != "full" and not growth.whole.quantized:
            saved = round(growth.whole.frozen * growth.itemsize * 0.7)
            if by_name["weights"] > 0.2 * limit:
                said.append(f"model.quantization=nf4 takes about {in_gib(saved)} off the weights")
        if by_name["activations"] + by_name["logits"] > 0.2 * limit:
            said.append("a smaller " + ("diffusion.resolution" if growth.beside is not None else "data.max_length"))
        if self.strategy not in _SHARDED and by_name["weights"] > 0.3 * limit:
            said.append("several GPUs with distributed.strategy=fsdp2, which shares the weights out")
        if self.strategy in _SHARDED and not recipe.distributed.cpu_offload:
            said.append("distributed.cpu_offload=true, which keeps the shards in the CPU's memory")
        if recipe.adapter.method == "full":
            said.append("adapter.method=dora, which has no gradient or state for the weights")
        return tuple(said)
