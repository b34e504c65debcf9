"""The measured figures in README and docs/bench.md, from the goals in the benchmarks' JSON files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...disk import format_bytes, replacing
from ...errors import UsageError
from ...files import read_json
from .adapt import PASS
from .runner import BENCHES

_START, _END = "<!-- measured -->", "<!-- /measured -->"
_LINES = ("| case | ours | compared with | ratio | goal | met |", "|---|---:|---:|---:|---:|---|")
_WORDS = (
    "A ratio is ours over the other: below 1 is faster, or smaller. Subjects take turns; the ratio is the median of "
    "the rounds' ratios, not the quotient of the two times, each of which is a median of its own. `ours-lora` and "
    "`ours-dora` are doralib (`-exact` and `-adapter` are its dropout modes), `peft-lora` and `peft-dora` are PEFT's "
    "own, `base` is the model without an adapter; `4x256` means sequences x tokens."
)
_SUMMARY = ("| what | result | goals met | reproduce with |", "|---|---|---:|---|")
_NAMES = {
    "ours-dora": "DoRA",
    "ours-lora": "LoRA",
    "peft-dora": "PEFT DoRA",
    "peft-lora": "PEFT LoRA",
    "peft-dora-accelerated": "accelerated PEFT DoRA",
    "base": "the base model",
    "time of doralib": "time",
}


def update_pages(readme: Path, page: Path, results: Path) -> None:
    """Replace what stands between the marks of two pages by the figures of the JSON files in a folder.

    Args:
        readme: Gets one row for each benchmark.
        page: Gets a table for each benchmark, with a row for each goal.
        results: Where `doralib bench` wrote.

    Raises:
        UsageError: if a page has no marks, or the folder no figures; nothing is written then.
    """
    found = [read_json(path) for path in results.glob("*.json")]
    reports = [report for report in found if isinstance(report, dict) and report.get("goals")]
    reports.sort(key=lambda report: list(BENCHES).index(report["bench"]))
    texts = {path: path.read_text(encoding="utf-8") for path in (readme, page)}
    for path, text in texts.items():
        if _START not in text or _END not in text:
            raise UsageError(f"{path} has no lines {_START} and {_END} to write between")
    if not reports:
        raise UsageError(f"there are no figures in {results}; make them with: doralib bench all")
    rows = "\n".join([*_SUMMARY, *map(_summary, reports)])
    tables = "\n\n".join("\n".join(_table(report)) for report in reports)
    words = {
        readme: f"{rows}\n\n{_machine(reports)}.",
        page: f"{_WORDS}\n\n{tables}\n\n{_machine(reports)}. Settings, spread and figures without a goal are in the "
        "files that `doralib bench` writes.",
    }
    for path, text in texts.items():
        head, rest = text.split(_START, 1)
        with replacing(path) as part:
            part.write_text(f"{head}{_START}\n{words[path]}\n{_END}{rest.split(_END, 1)[1]}", encoding="utf-8")


def _summary(report: dict[str, Any]) -> str:
    """One row: the first goal's comparison in all the cases that make it, or its amount; and how many goals are met."""
    goals = report["goals"]
    first, case = _compared(goals[0]["what"]), goals[0]["what"].rpartition(": ")[0]
    same = [goal["measured"] for goal in goals if _compared(goal["what"]) == first]
    result = f"{first}: {_span(same)}" if " / " in first else f"{first}: {_amount(goals[0]['what'], same[0])} ({case})"
    met = sum(goal["met"] for goal in goals)
    title = f"[{report['title']}](docs/bench.md#{_anchor(report['title'])})"
    return f"| {title} | {result} | {met} of {len(goals)} | `{_command(report)}` |"


def _compared(what: str) -> str:
    """What a goal compares or measures, in a reader's words: without the case, the rank and the unit."""
    quantity = re.sub(r" r\d+\b|\b(bytes|seconds) of ", "", what.rpartition(": ")[2])
    return " / ".join(_NAMES.get(side, side) for side in quantity.split(" / "))


def _anchor(title: str) -> str:
    """Of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


def _span(values: Sequence[float]) -> str:
    low, high = _figure(min(values)), _figure(max(values))
    return low if low == high else f"{low} to {high}"


def _table(report: dict[str, Any]) -> list[str]:
    """What was measured, the command that does it again, and a row for each goal."""
    rows = [_row(report, goal) for goal in report["goals"]]
    return [f"### {report['title']}", "", f"`{_command(report)}`", "", *_LINES, *rows]


def _row(report: dict[str, Any], goal: dict[str, Any]) -> str:
    case, _, quantity = goal["what"].rpartition(": ")
    ours, slash, other = quantity.partition(" / ")
    if slash:
        values = _values(report["cases"], case)
        sides = (f"{ours} {values.get(ours, '')}".strip(), f"{other} {values.get(other, '')}".strip())
        cells = (case, *sides, _figure(goal["measured"]), _figure(goal["goal"]))
    else:
        cells = (goal["what"], _amount(quantity, goal["measured"]), "", "", _amount(quantity, goal["goal"]))
    return f"| {' | '.join(cells)} | {'yes' if goal['met'] else 'no'} |"


def _values(cases: list[dict[str, Any]], name: str) -> dict[str, str]:
    """Each subject's own seconds or bytes in the case of a goal, whose name may end with the measure."""
    named = [case for case in cases if name == case["name"] or name.startswith(f"{case['name']}, ")]
    if not named:
        return {}
    case = max(named, key=lambda each: len(each["name"]))
    if "medians" in case:  # a merge: files copied, and files merged
        copied, merged = (case["medians"][key]["seconds"] for key in ("copy", "doralib"))
        return {"time of doralib": _seconds(merged), "copying": _seconds(copied)}
    if "seconds" in case:
        values = {subject: _seconds(found["median"]) for subject, found in case["seconds"].items()}
        return values | {f"{PASS} over the weights": values[PASS]} if PASS in values else values
    measure = name.removeprefix(f"{case['name']}, ").replace(" ", "_")
    return {subject: format_bytes(found["median"]) for subject, found in case["bytes"].get(measure, {}).items()}


def _command(report: dict[str, Any]) -> str:
    """What measures it again, with the settings that were not the usual ones."""
    usual = BENCHES[report["bench"]].options().model_dump(mode="json")
    given = {key: value for key, value in report["settings"].items() if key in usual and value != usual[key]}
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in given.items()}
    return " ".join(["doralib bench", report["bench"], *(f"{key}={value}" for key, value in texts.items())])


def _machine(reports: Sequence[dict[str, Any]]) -> str:
    """Where and when, and how busy other processes kept the machine."""
    machine = reports[0]["machine"]
    busy = max(float(report["machine"].get("cores_busy_elsewhere", 0.0)) for report in reports)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores, {versions}, {machine['date'][:10]}; other processes "
        f"kept at most {busy:.2f} cores busy"
    )


def _amount(what: str, value: float) -> str:
    """Bytes or seconds."""
    return format_bytes(round(value)) if "bytes" in what else _seconds(value)


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"
