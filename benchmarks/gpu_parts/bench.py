"""Clocks, memory and the growing JSON file."""

import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


class Bench:
    """One run of the benchmark: where it runs, how long it may, what it has measured."""

    def __init__(self, out: Path, dry: bool, seconds: float) -> None:
        self.out, self.dry = out, dry
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cpu" if dry else "cuda")
        self._start, self._seconds = time.perf_counter(), seconds
        self.data: dict[str, Any] = {"machine": self._machine()}
        self._flushed = 0.0

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def late(self, part: str) -> bool:
        """Whether the time is up; what is left out is recorded."""
        if self.elapsed() < self._seconds:
            return False
        self.record("skipped", part=part, at_seconds=round(self.elapsed()))
        return True

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f}] {text}", flush=True)

    def record(self, table: str, **row: Any) -> None:
        """Add a row; the file is rewritten at most every second."""
        self.data.setdefault(table, []).append(row)
        if time.perf_counter() - self._flushed > 1:
            self.flush()

    def flush(self) -> None:
        part = self.out / ".gpu.json.part"
        part.write_text(json.dumps(self.data, indent=1))
        part.replace(self.out / "gpu.json")
        self._flushed = time.perf_counter()

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def seconds_of(self, run: Run, times: int = 1) -> float:
        """Seconds of one of `times` runs on end, by the device's events: what the host keeps it waiting counts."""
        if self.dry:
            start = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - start) / times
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for _ in range(times):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / times

    def interleaved(self, runs: Mapping[str, Run], repeats: int = 15, least_ms: float = 3.0) -> dict[str, Any]:
        """Milliseconds of each run, {median, low, high} over rounds in which each has its turn."""
        repeats = 2 if self.dry else repeats
        times: dict[str, int] = {}
        for name, run in runs.items():
            run()
            run()
            once = self.seconds_of(run) * 1e3
            times[name] = 1 if self.dry else max(1, min(50, round(least_ms / once)))
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                found[name].append(self.seconds_of(run, times[name]) * 1e3)
        return {name: spread(values) for name, values in found.items()}

    def device_us(self, calls: list[Run], replays: int = 15) -> float:
        """Microseconds of one call on the device alone: the calls (over different buffers) as one replayed graph."""
        for call in calls:
            call()
        if self.dry:
            return self.seconds_of(lambda: [call() for call in calls]) * 1e6 / len(calls)
        graph = self.graph(lambda: [call() for call in calls])
        graph.replay()
        found = [self.seconds_of(graph.replay) * 1e6 / len(calls) for _ in range(replays)]
        return statistics.median(found)

    def graph(self, run: Run) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def peak_bytes(self, run: Run) -> int:
        """The most that a run holds above what was held before it."""
        if self.dry:
            run()
            return 0
        self.free()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype)

    def _machine(self) -> dict[str, Any]:
        names = ("torch", "triton", "peft", "transformers", "accelerate", "pydantic", "bitsandbytes")
        machine = {
            "python": platform.python_version(),
            "dry_run": self.dry,
            "utc": time.strftime("%F %T", time.gmtime()),
        }
        machine |= {name: _version(name) for name in names}
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            machine |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
            machine |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
            machine["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        return machine


def spread(values: list[float]) -> dict[str, float]:
    """The median and the extremes."""
    values = sorted(values)
    return {"median": statistics.median(values), "low": values[0], "high": values[-1]}


def saved_bytes(run: Callable[[], Tensor], not_counted: list[Tensor]) -> tuple[int, int]:
    """Bytes kept for the backward pass, each storage once, and how many of them are the output's own.

    Args:
        not_counted: Parameters, which are there anyway.
    """
    known = {t.untyped_storage().data_ptr() for t in not_counted}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return sum(found.values()), found.get(y.untyped_storage().data_ptr(), 0)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
