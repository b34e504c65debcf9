"""Where a training step's time goes, operator by operator: why a method costs more than another."""

from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .measure import spread, take_turns
from .options import ProfileOptions
from .step import build_steps, training_cases
from .subjects import AdapterSettings, check_subjects
from .tables import Bar, Bars, Report, Table
from .workload import TrainingStep, base_model

SUBJECTS = ("frozen", "peft-lora", "peft-dora", "ours-lora", "ours-dora")
# so many operators by name; the rest is one row
_SHOWN = 14


def bench_profile(options: ProfileOptions) -> Report:
    """Milliseconds and calls of each operator in a training step, without those it calls: dtype x tokens x dropout."""
    names = check_subjects(options.subjects or SUBJECTS)
    report = Report(
        "profile",
        "A training step by operators",
        options.model_dump(mode="json"),
        Bars("A training step by operators", "milliseconds a step, under the profiler", line=None),
        [
            "an operator's time is its own, without the operators that it calls; Python is in the rest of the step",
            "torch's profiler makes small operators look larger: `bench step` says what a step takes",
            "ordered by what the last subject spends more than the one before it",
        ],
    )
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        for name, settings in training_cases("profile", dtype, options):
            steps = build_steps(base, names, AdapterSettings(options.r, settings["dropout"]), settings["tokens"])
            subjects = _profile(steps, options)
            bars = [
                Bar(n, *(1e3 * found["seconds"][k] for k in ("median", "low", "high"))) for n, found in subjects.items()
            ]
            case = {"name": name, "settings": {**settings, **described}, "subjects": subjects}
            report.add(case, _table(name, subjects), bars=bars)
    return report


def _profile(steps: dict[str, TrainingStep], options: ProfileOptions) -> dict[str, Any]:
    """By subject: seconds of a step, and the mean seconds and calls of each operator in it."""
    for step in steps.values():
        for _ in range(options.warmup):
            step()
    # in turn, so that a slow moment of the machine falls on all
    profiles, _ = take_turns({name: partial(_operators, step) for name, step in steps.items()}, options.rounds)
    found = {}
    for name, rounds in profiles.items():
        operators: dict[str, dict[str, float]] = {}
        for key, (seconds, calls) in (item for each in rounds for item in each.items()):
            total = operators.setdefault(key, {"seconds": 0.0, "calls": 0.0})
            total["seconds"] += seconds / options.rounds
            total["calls"] += calls / options.rounds
        own = [sum(seconds for seconds, _ in each.values()) for each in rounds]
        found[name] = {"seconds": spread(own), "operators": operators}
    return found


def _operators(step: TrainingStep) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each operator, without those it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in profiler.key_averages()}


def _table(title: str, subjects: dict[str, Any]) -> Table:
    """Milliseconds and calls; the operators first whose time the last two subjects differ in most."""
    names = list(subjects)
    more, less = names[-1], names[max(0, len(names) - 2)]
    keys = {key for found in subjects.values() for key in found["operators"]}
    ordered = sorted(keys, key=lambda key: (_of(subjects, less, key)[0] - _of(subjects, more, key)[0], key))
    table = Table(title, ["operator", *(f"{name}, ms (calls)" for name in names)])
    for key in ordered[:_SHOWN]:
        table.rows.append([key, *(_text(*_of(subjects, name, key)) for name in names)])
    for label, chosen in (("all others", ordered[_SHOWN:]), ("together", ordered)):
        found = {name: [_of(subjects, name, key) for key in chosen] for name in names}
        table.rows.append([label, *(_text(sum(t for t, _ in own), sum(n for _, n in own)) for own in found.values())])
    return table


def _of(subjects: dict[str, Any], name: str, key: str) -> tuple[float, float]:
    found = subjects[name]["operators"].get(key, {"seconds": 0.0, "calls": 0.0})
    return found["seconds"], found["calls"]


def _text(seconds: float, calls: float) -> str:
    return f"{1e3 * seconds:.1f} ({calls:.0f})"
