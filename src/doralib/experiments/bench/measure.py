"""Interleaved timing: subjects take turns in one process, and ratios are taken within a round.

A neighbor on the machine slows whole rounds, so the median over rounds of a ratio within one round is steadier than
the ratio of two medians.
"""

import gc
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...runs.machine import cpu_name, package_versions

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

    seconds: dict[str, list[float]] = field(default_factory=dict)
    orders: list[list[str]] = field(default_factory=list)

    def ratios(self, over: str, under: str) -> list[float]:
        """``over / under`` in each round."""
        return [a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)]

    def _ratio(self, over: str, under: str) -> dict[str, Any]:
        """The spread; and as a neighbor on the machine only ever adds time, the ratio of the fastest rounds."""
        of_minima = min(self.seconds[over]) / min(self.seconds[under])
        return {**spread(self.ratios(over, under)), "of_minima": of_minima}

    def summary(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Everything for JSON: raw seconds with their spread, and the ratios of the pairs that took part."""
        there = [pair for pair in pairs if set(pair) <= self.seconds.keys()]
        return {
            "seconds": {name: spread(values) for name, values in self.seconds.items()},
            "ratios": {f"{over} / {under}": self._ratio(over, under) for over, under in there},
            "orders": self.orders,
        }


def interleave(turns: Mapping[str, Turn], rounds: int, warmup: int = 1) -> Rounds:
    """Run every subject once a round; who begins changes from round to round."""
    measured = Rounds({name: [] for name in turns})
    for number in range(-warmup, rounds):
        order = order_of(list(turns), max(number, 0))
        if number >= 0:
            measured.orders.append(order)
        gc.collect()
        for name in order:
            seconds = _timed(turns[name])
            if number >= 0:
                measured.seconds[name].append(seconds)
    return measured


def order_of(names: list[str], number: int) -> list[str]:
    """The order of one round: rotated by one each round and reversed every other cycle, so that neighbors change."""
    start = number % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number // len(names) % 2 else order


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum beside all values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": low, "high": high, "min": min(values), "all": list(values)}


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(PACKAGES),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()),
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


def _timed(turn: Turn) -> float:
    turn.prepare()
    gc.disable()
    try:
        start = time.perf_counter()
        turn.run()
        return time.perf_counter() - start
    finally:
        gc.enable()
