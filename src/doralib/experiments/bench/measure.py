"""Interleaved timing: subjects take turns in one process, and ratios are taken within a round.

A neighbor on the machine slows whole rounds, so the median over rounds of a ratio within one round is steadier than
the ratio of two medians.
"""

import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...errors import DoraError
from ...process import read_load, read_machine_memory
from ...runs.machine import cpu_name, package_versions

Result = TypeVar("Result")
log = logging.getLogger(__name__)
PACKAGES = ("doralib", "torch", "transformers", "peft")


@dataclass
class Turn:
    """What one subject does in a round."""

    run: Callable[[], object]
    """Timed."""
    prepare: Callable[[], object] = lambda: None
    """Before it, not timed."""


@dataclass
class Rounds:
    """Raw seconds of every subject, a number a round, warm-up rounds left out."""

    seconds: dict[str, list[float]]
    orders: list[list[str]]

    def summary(self, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """Everything for JSON: raw seconds with their spread, and the ratios of the pairs that took part."""
        there = [pair for pair in pairs if set(pair) <= self.seconds.keys()]
        ratios = spread_ratios(self.seconds, there)
        for (over, under), ratio in zip(there, ratios.values(), strict=True):
            # a neighbor on the machine only ever adds time: the fastest rounds saw the least of it
            ratio["of_minima"] = min(self.seconds[over]) / min(self.seconds[under])
        seconds = {name: spread(values) for name, values in self.seconds.items()}
        return {"seconds": seconds, "ratios": ratios, "orders": self.orders}


def interleave(turns: Mapping[str, Turn], rounds: int, warmup: int = 1) -> Rounds:
    """Time every subject once a round."""
    return Rounds(*take_turns({name: partial(_time, turn) for name, turn in turns.items()}, rounds, warmup))


def take_turns(
    runs: Mapping[str, Callable[[], Result]], rounds: int, warmup: int = 0
) -> tuple[dict[str, list[Result]], list[list[str]]]:
    """What each run returned in each round, and the orders; who begins changes from round to round."""
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        gc.collect()
        for name in order_of(list(runs), max(number, 0)):
            result = runs[name]()
            if number >= 0:
                results[name].append(result)
    return results, [order_of(list(runs), number) for number in range(rounds)]


def order_of(names: list[str], number: int) -> list[str]:
    """The order of one round: rotated by one each round and reversed every other cycle, so that neighbors change."""
    start = number % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number // len(names) % 2 else order


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum beside all values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": low, "high": high, "min": min(values), "all": list(values)}


def spread_ratios(values: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The spread of ``over / under`` within each round."""
    return {
        f"{over} / {under}": spread([a / b for a, b in zip(values[over], values[under], strict=True)])
        for over, under in pairs
    }


def run_python(what: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON in the last line that a fresh process of this Python prints.

    Raises:
        DoraError: with the end of what it complained of, if it failed.
    """
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise DoraError(f"{what} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def read_kernel_bytes(path: str, key: str) -> int | None:
    """The amount in a line such as ``MemAvailable: 12 kB``; None where the kernel has no such file."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round((read_machine_memory() or 0) / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(PACKAGES),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": read_load(),
    }


class Neighbors:
    """How much of the machine other processes take while this one measures."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Cores kept busy by others since this was made, on average; None where the system does not tell."""
        busy, own, (busy_before, own_before) = _busy_seconds(), _own_seconds(), self._before
        if busy is None or busy_before is None:
            return None
        others = (busy - busy_before) - (own - own_before)
        return round(max(0.0, others / (time.perf_counter() - self._start)), 2)


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked, for anybody, since the machine started."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """What this process and its ended children have used."""
    return sum(os.times()[:4])


def _time(turn: Turn) -> float:
    turn.prepare()
    gc.disable()
    try:
        start = time.perf_counter()
        turn.run()
        return time.perf_counter() - start
    finally:
        gc.enable()
