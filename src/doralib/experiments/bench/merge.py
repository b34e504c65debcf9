"""Merging a checkpoint in the shape of LLaMA-3-8B: time beside plain copying, memory beside PEFT's route."""

import shutil
import statistics
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from ...disk import format_bytes, free_bytes
from ...errors import DoraError
from .llama_files import LAYERS, RANK, count_numbers, write_model
from .measure import log, run_python, spread_ratios, take_turns
from .options import MergeOptions
from .subjects import TARGETS
from .tables import Bar, Bars, Case, Goal, Report, Table, make_bars, ratios_to

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
import json, os, time
from doralib.process import read_peak_memory
start = time.perf_counter()
{work}
written = time.perf_counter()
getattr(os, "sync", lambda: None)()
seconds, cpu = time.perf_counter() - start, time.process_time()
peak = read_peak_memory() or 0
print(json.dumps({{"seconds": seconds, "unsynced": written - start, "cpu_seconds": cpu, "peak": peak}}))
"""


def bench_merge(options: MergeOptions) -> Report:
    """Time and peak memory of copying, of our merge and of PEFT's, in fresh processes in turn."""
    log.info(f"merge: {options.scale_gb:g} GB, PEFT at {options.peft_gb:g} GB")
    settings = {"shape": "LLaMA-3-8B, bfloat16, random weights", "adapter": f"DoRA r {RANK} on {', '.join(TARGETS)}"}
    report = Report(
        "merge",
        "Merging into a checkpoint",
        {**options.model_dump(mode="json"), **settings},
        Bars("Merging, time over copying the same files", "time / time of copying"),
        ["fresh processes in turn; time until the bytes are on the disk (sync); peak: resident memory"],
    )
    routes = {_COPY: _COPYING, _OURS: _MERGING}
    layers = _count_layers(options.scale_gb)
    with tempfile.TemporaryDirectory() if options.work is None else nullcontext(options.work) as folder:
        work = Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        whole = _case("whole", routes, layers, work, options.rounds)
        name, ours = whole["name"], whole["medians"][_OURS]
        goals = [
            Goal(f"{name}: time of doralib / copying", whole["time_over_copy"][_OURS], 1.5),
            Goal(f"{name}: peak bytes of doralib", ours["peak"], _PEAK_BYTES),
        ]
        report.add(whole, _table(whole), bars=_bars(whole), goals=goals)
        if options.peft_gb:
            routes["PEFT"] = _PEFT_MERGING
            small = min(layers, _count_layers(options.peft_gb))
            beside = _case("beside PEFT", routes, small, work, options.rounds)
            report.add(beside, _table(beside), bars=_bars(beside))
    return report


def _count_layers(gigabytes: float) -> int:
    """How many layers a checkpoint of that size has."""
    outside = count_numbers(0)
    return max(1, min(LAYERS, round(gigabytes * 1e9 / 2 - outside) // (count_numbers(1) - outside)))


def _case(part: str, routes: dict[str, str], layers: int, work: Path, rounds: int) -> Case:
    base, adapter = write_model(work / f"llama-{layers}-layers", layers)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if free_bytes(work) < 1.1 * size:
        need, free = format_bytes(size), format_bytes(free_bytes(work))
        raise DoraError(f"merging needs {need} more in {work}, {free} are free; ask for less GB")
    # each goes first in turn: the first to read finds less in the page cache
    turns = {name: partial(_run, route, adapter, base, work / "merged") for name, route in routes.items()}
    runs, _ = take_turns(turns, rounds)
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
    }
    over = {
        key: {name: value[key] / medians[_COPY][key] for name, value in medians.items()}
        for key in ("seconds", "unsynced")
    }
    return {
        "name": f"{part}: {layers} of {LAYERS} layers, {format_bytes(size)}",
        "settings": {"part": part},
        "layers": layers,
        "of": LAYERS,
        "bytes": size,
        "medians": medians,
        "time_over_copy": over["seconds"],
        "unsynced_time_over_copy": over["unsynced"],
        "runs": runs,
    }


def _run(work: str, adapter: Path, base: Path, target: Path) -> dict[str, float]:
    """One route in a process of its own; its output is removed."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        code = _TIMED.format(work=work.strip())
        return run_python("a measured run", "-c", code, str(adapter), str(base), str(target))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _bars(case: Case) -> list[Bar]:
    seconds = {name: [run["seconds"] for run in runs] for name, runs in case["runs"].items()}
    return make_bars(ratios_to(_COPY, spread_ratios(seconds, [(name, _COPY) for name in seconds])))


def _table(case: Case) -> Table:
    table = Table(case["name"], ["route", "median s", "peak memory", "time / copying", "before sync / copying"])
    for name, medians in case["medians"].items():
        over = [f"{case[key][name]:.2f}" for key in ("time_over_copy", "unsynced_time_over_copy")]
        table.rows.append([name, f"{medians['seconds']:.1f}", format_bytes(round(medians["peak"])), *over])
    return table
