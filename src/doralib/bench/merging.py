"""`bench merge` as a report: see `merge.py` for what is measured."""

import tempfile
from pathlib import Path
from typing import Any

from ..console import console
from ..files import human
from .measure import spread
from .merge import bench_merge
from .options import MergeOptions
from .tables import Bar, Bars, Goal, Report, Table

_COPY, _OURS = "copy", "doralib"
_PEAK_BYTES = 2e9


def report_merge(options: MergeOptions) -> Report:
    """Merging a checkpoint of LLaMA-3-8B's shapes beside copying it and beside PEFT."""
    console.print(f"merge: {options.scale_gb:g} GB, PEFT at {options.peft_gb:g} GB")
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
    return f"{part}: {case['layers']} of {case['of']} layers, {human(case['bytes'])}"


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
                human(round(medians["peak"])),
                f"{case['time_over_copy'][name]:.2f}",
                f"{case['unsynced_time_over_copy'][name]:.2f}",
            ]
        )
    return table
