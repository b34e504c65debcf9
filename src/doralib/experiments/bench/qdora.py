"""A training step on a quantized base, in time and in memory: ours beside PEFT's QLoRA and QDoRA."""

from .memory import memory_bars, memory_case, memory_goals, memory_table
from .options import QDoraOptions
from .step import time_steps, training_cases
from .subjects import REFERENCE, check_subjects
from .tables import Bars, Report, ratio_goals, timing_table
from .workload import base_model

_SUBJECTS = ("frozen", REFERENCE, "peft-dora", "ours-lora", "ours-dora")
_LIMIT = 1.05


def bench_qdora(options: QDoraOptions) -> Report:
    """Seconds in one process, in turns, then peak bytes in a process each: quantization x dtype x tokens x dropout."""
    check_subjects(options.subjects or [])
    report = Report(
        "qdora",
        "A training step on a quantized base",
        options.model_dump(mode="json"),
        Bars("Training step on a quantized base, time and memory over PEFT QLoRA", "ratio to PEFT QLoRA"),
        [
            "the weights are bitsandbytes', double quantization; the head stays as it is; adapters are float32 masters",
            "peft-lora is QLoRA and peft-dora QDoRA, both as PEFT has them by default",
            "time: as `bench step`; bytes: as `bench memory`, where the model's own do not count the scales",
        ],
    )
    subjects = list(options.subjects or _SUBJECTS)
    for quantization in options.quantization:
        for dtype in options.dtype:
            base, described = base_model(options.model, options.layers, dtype, quantization)
            for name, settings in training_cases(f"qdora, {quantization}", dtype, options):
                settings["quantization"] = quantization
                timed = {"name": f"{quantization}, {name}", "settings": settings | described}
                timed |= time_steps(base, settings, options, subjects)
                report.add(timed, timing_table(timed), goals=ratio_goals(timed, {f"ours-dora / {REFERENCE}": _LIMIT}))
                held = {"name": f"memory, {quantization}, {name}", "settings": settings}
                held |= memory_case(settings, options, subjects, options.processes)
                report.add(held, memory_table(held), bars=memory_bars(held), goals=memory_goals(held, _LIMIT))
    return report
