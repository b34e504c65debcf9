"""Peak memory of one training step; each subject in a process of its own.

Two numbers: what torch's CPU allocator held at most over what it held before the step (exact, from the profiler's
allocation events), and the peak of the process's resident memory, as the kernel counts it (Linux only). Run as
``python -m doralib.experiments.bench.memory REQUEST.json ANSWER.json`` this module measures one subject.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from ...errors import DoraError
from ...files import format_bytes, read_json, write_json
from .counting import allocations, peak
from .measure import log, order_of, spread
from .options import MemoryOptions, batch_of, switch_values
from .step import case_name
from .subjects import REFERENCE, AdapterSettings, build, check_subjects, default_subjects, pairs
from .tables import Bars, Goal, Report, Table, ratio_bars
from .workload import TrainingStep, base_model, token_batch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc otherwise keeps freed blocks of up to 32 MB, and how many depends on the order of calls
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
_MEASURES = ("total_bytes", "step_bytes", "resident_bytes")


def bench_memory(options: MemoryOptions) -> Report:
    """Peak bytes of a training step: dtype x tokens x dropout x checkpointing, a process for each subject."""
    check_subjects(options.subjects or [])
    cases: list[dict[str, Any]] = []
    bars = Bars("Peak memory of a training step over PEFT LoRA", "total bytes / total bytes of PEFT LoRA")
    for dtype, tokens, dropout, checkpointing in product(
        options.dtype, options.tokens, options.dropout, switch_values(options.checkpointing)
    ):
        settings = {"dtype": dtype, "tokens": tokens, "dropout": dropout, "checkpointing": checkpointing}
        name = case_name(settings)
        log.info(f"memory: {name}")
        case = {"name": name, "settings": settings, **_case(settings, options)}
        cases.append(case)
        bars.groups[name] = ratio_bars({"ratios": case["ratios"]["total_bytes"]})
    return Report(
        "memory",
        "Peak memory of a training step",
        options.model_dump(mode="json"),
        cases,
        [_table(case) for case in cases],
        bars,
        [goal for case in cases for goal in _goals(case)],
        [
            "each subject in a fresh process; the second and third step are measured: the optimiser has its state",
            "step: most that torch's CPU allocator held over what it held before the step (exact; without BLAS's own "
            "scratch memory); total: that, the model's tensors and the optimiser's state, as a GPU would count",
            "resident: peak resident memory of the process in the step (VmHWM, cleared before it), Python and all",
        ],
    )


def measure_subject(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one subject, in this process."""
    base, described = base_model(request["model"], request["layers"], request["dtype"])
    batch = token_batch(described["vocab_size"], *batch_of(request["tokens"]))
    model = build(request["subject"], base, AdapterSettings(request["r"], request["dropout"]))
    step = TrainingStep(model, batch, checkpointing=request["checkpointing"])
    step()
    cleared = _clear_peak()
    step()
    resident = _peak_resident() if cleared else None
    step_bytes = peak(allocations(step))
    # tied weights are there once
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    model_bytes, state_bytes = sum(tensors.values()), step.state_bytes()
    return {
        "model": described,
        "step_bytes": step_bytes,
        "model_bytes": model_bytes,
        "optimizer_bytes": state_bytes,
        "total_bytes": model_bytes + state_bytes + step_bytes,
        "resident_bytes": resident,
    }


def _tensors(model: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


def _case(settings: dict[str, Any], options: MemoryOptions) -> dict[str, Any]:
    names = list(options.subjects or default_subjects(settings["dtype"], settings["dropout"]))
    shared = {"model": options.model, "layers": options.layers, "r": options.r, **settings}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    orders = [order_of(names, number) for number in range(options.rounds)]
    for order in orders:
        for name in order:
            runs[name].append(_in_a_process({"subject": name, **shared}))
    found = {
        measure: {name: [run[measure] for run in each] for name, each in runs.items()}
        for measure in _MEASURES
        if all(run[measure] is not None for each in runs.values() for run in each)
    }
    return {
        "runs": runs,
        "orders": orders,
        "bytes": {measure: {name: spread(all_) for name, all_ in each.items()} for measure, each in found.items()},
        "ratios": {measure: _ratios(each) for measure, each in found.items()},
    }


def _ratios(values: dict[str, list[float]]) -> dict[str, Any]:
    return {
        f"{over} / {under}": spread([a / b for a, b in zip(values[over], values[under], strict=True)])
        for over, under in pairs(values)
    }


def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(asked, request)
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | _ALLOCATOR)
        if done.returncode:
            raise DoraError(f"measuring {json.dumps(request)} failed:\n{done.stderr[-2000:]}")
        return dict(read_json(answered))


def _clear_peak() -> bool:
    """Set the kernel's mark of the most resident memory to what is resident now; false where there is none."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _peak_resident() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _table(case: dict[str, Any]) -> Table:
    columns = ["subject", "step", "total", "resident", f"step / {REFERENCE}", f"total / {REFERENCE}", "resident /"]
    table = Table(case["name"], columns)
    for name in case["runs"]:
        sizes = {m: case["bytes"].get(m, {}).get(name) for m in ("step_bytes", "total_bytes", "resident_bytes")}
        ratios = [case["ratios"].get(m, {}).get(f"{name} / {REFERENCE}") for m in sizes]
        table.rows.append(
            [
                name,
                *(format_bytes(round(size["median"])) if size else "" for size in sizes.values()),
                *(f"{ratio['median']:.3f}" if ratio else "" for ratio in ratios),
            ]
        )
    return table


def _goals(case: dict[str, Any]) -> list[Goal]:
    limit = 1.02 if case["settings"]["checkpointing"] else 1.1
    return [
        Goal(f"{case['name']}, {measure.replace('_', ' ')}: {pair}", ratio["median"], limit)
        for measure in ("total_bytes", "resident_bytes")
        for pair, ratio in case["ratios"].get(measure, {}).items()
        if pair.startswith("ours-dora") and pair.endswith(REFERENCE) and "exact" not in pair
    ]


if __name__ == "__main__":
    write_json(sys.argv[2], measure_subject(read_json(sys.argv[1])))
