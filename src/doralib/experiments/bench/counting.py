"""What a call costs besides time: its matrix products, the memory it keeps for its backward pass, what it allocates."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# operator: where its two factors stand among the arguments
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "linear": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1}


class ProductCounter(TorchDispatchMode):
    """Counts matrix products and their floating point operations, backward passes too, inside a with block."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operator."""
        at = _PRODUCTS.get(func._schema.name.removeprefix("aten::").rstrip("_"))
        if at is not None:
            left, right = args[at], args[at + 1]
            columns = right.shape[0] if "linear" in func._schema.name else right.shape[-1] if right.dim() > 1 else 1
            self.flops.append(2 * left.numel() * columns)
        return func(*args, **(kwargs or {}))

    @property
    def calls(self) -> int:
        """How many products."""
        return len(self.flops)


@dataclass
class Saved:
    """Bytes kept for a backward pass, each memory once."""

    input: int
    output: int
    """The layer's own output, which its consumer often keeps anyway."""
    weights: int
    """Parameters, which exist anyway."""
    rest: int

    @property
    def with_output(self) -> int:
        """All but the parameters."""
        return self.input + self.output + self.rest

    @property
    def without_output(self) -> int:
        """The same where the output is kept by its consumer."""
        return self.input + self.rest

    def to_json(self) -> dict[str, int]:
        """The parts and their sums."""
        return {**asdict(self), "with_output": self.with_output, "without_output": self.without_output}


def saved_bytes(run: Callable[[Tensor], Tensor], x: Tensor, weights: Iterable[Tensor]) -> Saved:
    """What `run(x)` keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x)
    weights_kept = sum(kept.pop(where, 0) for where in {w.untyped_storage().data_ptr() for w in weights})
    input_kept, output_kept = (kept.pop(tensor.untyped_storage().data_ptr(), 0) for tensor in (x, y))
    return Saved(input_kept, output_kept, weights_kept, rest=sum(kept.values()))


def allocations(run: Callable[[], object]) -> list[int]:
    """Every allocation (positive) and release (negative) in bytes that torch's CPU allocator made during a call.

    Its own scratch memory inside operators is in it, that of BLAS libraries is not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(sizes: Iterable[int]) -> int:
    """The most that was held at once over what was held before."""
    return max(0, *accumulate(sizes, initial=0))
