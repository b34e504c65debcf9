"""Where a training step's time goes, operator by operator: why a method costs more than another."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile

from .measure import log, spread
from .options import ProfileOptions, batch_of
from .step import case_name
from .subjects import AdapterSettings, build, check_subjects
from .tables import Bar, Bars, Report, Table
from .workload import TrainingStep, base_model, token_batch

SUBJECTS = ("frozen", "peft-lora", "peft-dora", "ours-lora", "ours-dora")
# so many operators by name; the rest is one row
_SHOWN = 14


def bench_profile(options: ProfileOptions) -> Report:
    """Milliseconds and calls of each operator in a training step, without those it calls: dtype x tokens x dropout."""
    names = check_subjects(options.subjects or SUBJECTS)
    cases: list[dict[str, Any]] = []
    bars = Bars("A training step by operators", "milliseconds a step, under the profiler", line=None)
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        for tokens, dropout in product(options.tokens, options.dropout):
            settings = {"dtype": dtype, "tokens": tokens, "dropout": dropout, "checkpointing": False}
            name = case_name(settings)
            log.info(f"profile: {name}")
            case = _case(base, settings, names, options)
            cases.append({"name": name, "settings": {**settings, **described}, "subjects": case})
            bars.groups[name] = [
                Bar(n, *(1e3 * found["seconds"][k] for k in ("median", "low", "high"))) for n, found in case.items()
            ]
    return Report(
        "profile",
        "A training step by operators",
        options.model_dump(mode="json"),
        cases,
        [_table(case["name"], case["subjects"]) for case in cases],
        bars,
        notes=[
            "an operator's time is its own, without the operators that it calls; Python is in the rest of the step",
            "torch's profiler makes small operators look larger: `bench step` says what a step takes",
            "ordered by what the last subject spends more than the one before it",
        ],
    )


def _case(base: nn.Module, settings: dict[str, Any], names: Sequence[str], options: ProfileOptions) -> dict[str, Any]:
    batch = token_batch(base.config.vocab_size, *batch_of(settings["tokens"]))  # type: ignore[union-attr, arg-type]
    steps = {
        name: TrainingStep(build(name, base, AdapterSettings(options.r, settings["dropout"])), batch) for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    operators: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for step in steps.values():
        for _ in range(options.warmup):
            step()
    # in turn, so that a slow moment of the machine falls on all
    for _ in range(options.rounds):
        for name, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as found:
                step()
            own = {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in found.key_averages()}
            seconds[name].append(sum(time for time, _ in own.values()))
            for key, (time, count) in own.items():
                total = operators[name].setdefault(key, [0.0, 0.0])
                total[0] += time / options.rounds
                total[1] += count / options.rounds
    return {
        name: {
            "seconds": spread(seconds[name]),
            "operators": {key: {"seconds": t, "calls": n} for key, (t, n) in operators[name].items()},
        }
        for name in names
    }


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
