"""Peak memory of one training step; each subject in a process of its own.

Two numbers: what torch's CPU allocator held at most over what it held before the step (exact, from the profiler's
allocation events), and the peak of the process's resident memory, as the kernel counts it (Linux only). Run as
``python -m doralib.experiments.bench.memory REQUEST`` (JSON) this module measures one subject and prints its figures.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...disk import format_bytes
from .counting import allocations, peak
from .measure import read_kernel_bytes, run_python, spread, spread_ratios, take_turns
from .options import MemoryOptions, StepOptions, batch_of
from .step import training_cases
from .subjects import REFERENCE, AdapterSettings, build, check_subjects, default_subjects, pairs
from .tables import Bar, Bars, Case, Goal, Report, Table, make_bars, ratios_to
from .workload import TrainingStep, base_model, token_batch

# glibc otherwise keeps freed blocks of up to 32 MB, and how many depends on the order of calls
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
_MEASURES = ("total_bytes", "step_bytes", "resident_bytes")


def bench_memory(options: MemoryOptions) -> Report:
    """Peak bytes of a training step: dtype x tokens x dropout x checkpointing, a process for each subject."""
    check_subjects(options.subjects or [])
    report = Report(
        "memory",
        "Peak memory of a training step",
        options.model_dump(mode="json"),
        Bars("Peak memory of a training step over PEFT LoRA", "total bytes / total bytes of PEFT LoRA"),
        [
            "each subject in a fresh process; the second and third step are measured: the optimizer has its state",
            "step: most that torch's CPU allocator held over what it held before the step (exact; without BLAS's own "
            "scratch memory); total: that, the model's tensors and the optimizer's state, as a GPU would count",
            "resident: peak resident memory of the process in the step (VmHWM, cleared before it), Python and all",
        ],
    )
    for dtype in options.dtype:
        for name, settings in training_cases("memory", dtype, options):
            subjects = list(options.subjects or default_subjects(dtype, settings["dropout"]))
            case = {"name": name, "settings": settings, **memory_case(settings, options, subjects, options.rounds)}
            report.add(case, memory_table(case), bars=memory_bars(case), goals=_goals(case))
    return report


def measure_subject(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one subject, in this process."""
    base, described = base_model(request["model"], request["layers"], request["dtype"], request.get("quantization"))
    batch = token_batch(described["vocab_size"], *batch_of(request["tokens"]))
    model = build(request["subject"], base, AdapterSettings(request["r"], request["dropout"]))
    step = TrainingStep(model, batch, checkpointing=request["checkpointing"])
    step()
    resident = _peak_resident(step)
    step_bytes = peak(allocations(step))
    # tied weights are there once
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    model_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    state_bytes = step.state_bytes()
    return {
        "model": described,
        "step_bytes": step_bytes,
        "model_bytes": model_bytes,
        "optimizer_bytes": state_bytes,
        "total_bytes": model_bytes + state_bytes + step_bytes,
        "resident_bytes": resident,
    }


def memory_case(settings: dict[str, Any], options: StepOptions, names: list[str], rounds: int) -> dict[str, Any]:
    """The bytes of each subject in each round, and their ratios by what is measured."""
    shared = {"model": options.model, "layers": options.layers, "r": options.r, **settings}
    turns = {name: partial(_in_a_process, {"subject": name, **shared}) for name in names}
    runs, orders = take_turns(turns, rounds)
    found = {
        measure: {name: [run[measure] for run in each] for name, each in runs.items()}
        for measure in _MEASURES
        if all(run[measure] is not None for each in runs.values() for run in each)
    }
    return {
        "runs": runs,
        "orders": orders,
        "bytes": {measure: {name: spread(all_) for name, all_ in each.items()} for measure, each in found.items()},
        "ratios": {measure: spread_ratios(each, pairs(each)) for measure, each in found.items()},
    }


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(request)
    return run_python(f"measuring {text}", "-m", __name__, text, **_ALLOCATOR)


def _peak_resident(run: Callable[[], object]) -> int | None:
    """The most resident memory during a call; None where the kernel does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets its mark to what is resident now
    except OSError:
        return None
    run()
    return read_kernel_bytes("/proc/self/status", "VmHWM")


def memory_table(case: Case) -> Table:
    """Bytes and ratios, a subject a row."""
    columns = ["subject", "step", "total", "resident", f"step / {REFERENCE}", f"total / {REFERENCE}", "resident /"]
    table = Table(case["name"], columns)
    measures = ("step_bytes", "total_bytes", "resident_bytes")
    for name in case["runs"]:
        sizes = [case["bytes"].get(measure, {}).get(name) for measure in measures]
        ratios = [case["ratios"].get(measure, {}).get(f"{name} / {REFERENCE}") for measure in measures]
        shown = [format_bytes(round(size["median"])) if size else "" for size in sizes]
        table.rows.append([name, *shown, *(f"{ratio['median']:.3f}" if ratio else "" for ratio in ratios)])
    return table


def memory_bars(case: Case) -> list[Bar]:
    """Total bytes over those of the reference."""
    return make_bars(ratios_to(REFERENCE, case["ratios"]["total_bytes"]))


def _goals(case: Case) -> list[Goal]:
    return memory_goals(case, 1.02 if case["settings"]["checkpointing"] else 1.1)


def memory_goals(case: Case, limit: float) -> list[Goal]:
    """At most so many times the reference's bytes."""
    return [
        Goal(f"{case['name']}, {measure.replace('_', ' ')}: {pair}", ratio["median"], limit)
        for measure in ("total_bytes", "resident_bytes")
        for pair, ratio in case["ratios"].get(measure, {}).items()
        if pair.startswith("ours-dora") and pair.endswith(REFERENCE) and "exact" not in pair
    ]


if __name__ == "__main__":
    print(json.dumps(measure_subject(json.loads(sys.argv[1]))))  # noqa: T201  the process that asked reads it
