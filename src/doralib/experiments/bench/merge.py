"""Merging a checkpoint in the shape of LLaMA-3-8B: time beside plain copying, memory beside PEFT's route."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...errors import DoraError
from ...files import format_bytes, free_bytes
from .llama_files import HIDDEN, LAYERS, RANK, VOCAB, layer_numbers, write_model
from .measure import log, spread
from .options import MergeOptions
from .subjects import TARGETS
from .tables import Bar, Bars, Goal, Report, Table

_PEAK_BYTES = 2e9
_COPY, _OURS = "copy", "doralib"
_MERGING = """
import sys
from pathlib import Path
from doralib import merge_checkpoint
merge_checkpoint(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""
_PEFT_MERGING = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="5GB")
"""
_COPYING = """
import shutil, sys
shutil.copytree(sys.argv[2], sys.argv[3])
"""
# a merge waits until its bytes are on the disk, so a copy has to as well; ru_maxrss would count the parent's memory too
_TIMED = """
import json, os, re, time
from pathlib import Path
start = time.perf_counter()
{work}
written = time.perf_counter()
os.sync()
seconds, cpu = time.perf_counter() - start, time.process_time()
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({{"seconds": seconds, "unsynced": written - start, "cpu_seconds": cpu, "peak": peak}}))
"""


def bench_merge(scale_gb: float, out: Path, *, rounds: int = 3, peft_gb: float = 4.0) -> dict[str, Any]:
    """Time and peak memory of copying, of our merge and of PEFT's, in fresh processes, interleaved.

    Args:
        scale_gb: size of the checkpoint; 16 is the whole model, less means fewer layers.
        out: folder for the checkpoint, written once and kept; what is merged there is removed at once.
        peft_gb: size of the checkpoint for PEFT's route, which holds the model in memory; 0 leaves it out.

    Returns:
        Medians, each run, ratios to copying, and what was measured on how many layers.
    """
    layers = max(1, min(LAYERS, round(scale_gb * 1e9 / 2 - 2 * VOCAB * HIDDEN) // layer_numbers()))
    small = max(1, min(layers, round(peft_gb * 1e9 / 2 - 2 * VOCAB * HIDDEN) // layer_numbers()))
    report: dict[str, Any] = {
        "shape": "LLaMA-3-8B, bfloat16, random weights",
        "adapter": f"DoRA r {RANK} on {', '.join(TARGETS)}",
        "whole": _measured({_COPY: _COPYING, _OURS: _MERGING}, layers, out, rounds),
        "threads": torch.get_num_threads(),
    }
    if peft_gb:
        report["beside PEFT"] = _measured({_COPY: _COPYING, _OURS: _MERGING, "PEFT": _PEFT_MERGING}, small, out, rounds)
    return report


def _measured(routes: dict[str, str], layers: int, out: Path, rounds: int) -> dict[str, Any]:
    base, adapter = write_model(out / f"llama-{layers}-layers", layers)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if free_bytes(out) < 1.1 * size:
        need, free = format_bytes(size), format_bytes(free_bytes(out))
        raise DoraError(f"merging needs {need} more in {out}, {free} are free; ask for less GB")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in routes}
    for turn in range(rounds):
        # each goes first in turn: the first to read finds less in the page cache
        order = list(routes)[turn % len(routes) :] + list(routes)[: turn % len(routes)]
        for name in order:
            runs[name].append(_run(routes[name], adapter, base, out / "merged"))
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
    }
    return {
        "layers": layers,
        "of": LAYERS,
        "bytes": size,
        "medians": medians,
        "time_over_copy": {name: value["seconds"] / medians["copy"]["seconds"] for name, value in medians.items()},
        "unsynced_time_over_copy": {
            name: value["unsynced"] / medians["copy"]["unsynced"] for name, value in medians.items()
        },
        "runs": runs,
    }


def _run(work: str, adapter: Path, base: Path, target: Path) -> dict[str, float]:
    """One route in a process of its own; its output is removed."""
    shutil.rmtree(target, ignore_errors=True)
    code = _TIMED.format(work=work.strip())
    command = [sys.executable, "-W", "ignore", "-c", code, str(adapter), str(base), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(target, ignore_errors=True)
    if result.returncode:
        raise DoraError(f"a measured run failed:\n{result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def report_merge(options: MergeOptions) -> Report:
    """Merging a checkpoint of LLaMA-3-8B's shapes beside copying it and beside PEFT."""
    log.info(f"merge: {options.scale_gb:g} GB, PEFT at {options.peft_gb:g} GB")
    if options.work is not None:
        folder = Path(options.work)
        folder.mkdir(parents=True, exist_ok=True)
        found = bench_merge(options.scale_gb, folder, rounds=options.rounds, peft_gb=options.peft_gb)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            found = bench_merge(options.scale_gb, Path(temporary), rounds=options.rounds, peft_gb=options.peft_gb)
    cases = [
        {"name": _name(key, found[key]), "settings": {"part": key}, **found[key]}
        for key in found
        if _is_case(found[key])
    ]
    whole = cases[0]["medians"][_OURS]
    bars = Bars("Merging, time over copying the same files", "time / time of copying")
    bars.groups = {case["name"]: _bars(case) for case in cases}
    return Report(
        "merge",
        "Merging into a checkpoint",
        {**options.model_dump(mode="json"), "shape": found["shape"], "adapter": found["adapter"]},
        cases,
        [_table(case) for case in cases],
        bars,
        [
            Goal(f"{cases[0]['name']}: time of doralib / copying", cases[0]["time_over_copy"][_OURS], 1.5),
            Goal(f"{cases[0]['name']}: peak bytes of doralib", whole["peak"], _PEAK_BYTES),
        ],
        ["fresh processes in turn; time until the bytes are on the disk (sync); peak: resident memory"],
    )


def _is_case(value: Any) -> bool:
    return isinstance(value, dict) and "medians" in value


def _name(part: str, case: dict[str, Any]) -> str:
    return f"{part}: {case['layers']} of {case['of']} layers, {format_bytes(case['bytes'])}"


def _bars(case: dict[str, Any]) -> list[Bar]:
    copies = [run["seconds"] for run in case["runs"][_COPY]]
    bars = []
    for name, runs in case["runs"].items():
        over = spread([run["seconds"] / copy for run, copy in zip(runs, copies, strict=True)])
        bars.append(Bar(name, over["median"], over["low"], over["high"]))
    return bars


def _table(case: dict[str, Any]) -> Table:
    table = Table(case["name"], ["route", "median s", "peak memory", "time / copying", "before sync / copying"])
    for name, medians in case["medians"].items():
        table.rows.append(
            [
                name,
                f"{medians['seconds']:.1f}",
                format_bytes(round(medians["peak"])),
                f"{case['time_over_copy'][name]:.2f}",
                f"{case['unsynced_time_over_copy'][name]:.2f}",
            ]
        )
    return table
