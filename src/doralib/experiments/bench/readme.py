"""The README's tables of measured figures, from the goals in the benchmarks' JSON files."""

from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files import human, read_json, replacing
from .adapt import PASS
from .runner import BENCHES

_START, _END = "<!-- measured -->", "<!-- /measured -->"
_LINES = ("| case | ours | compared with | ratio | goal | met |", "|---|---:|---:|---:|---:|---|")
_WORDS = (
    "A ratio is ours over the other: below 1 is faster, or smaller. Subjects take turns; the ratio is the median of "
    "the rounds' ratios, not the quotient of the two times, each a median of its own. `ours-lora` and `ours-dora` are "
    "doralib (`-exact` and `-adapter`: its dropout modes), `peft-lora` and `peft-dora` PEFT's own, `base` is the model "
    "without an adapter; `4x256` is sequences x tokens."
)


def update_readme(readme: Path, results: Path) -> None:
    """Replace what stands between the marks in a README by a table for each JSON file in the folder.

    Raises:
        UsageError: if the README has no marks, or the folder no figures.
    """
    text = readme.read_text()
    found = [read_json(path) for path in results.glob("*.json")]
    reports = [report for report in found if isinstance(report, dict) and report.get("goals")]
    reports.sort(key=lambda report: list(BENCHES).index(report["bench"]))
    if _START not in text or _END not in text:
        raise UsageError(f"{readme} has no lines {_START} and {_END} to write between")
    if not reports:
        raise UsageError(f"there are no figures in {results}; make them with: doralib bench all")
    head, rest = text.split(_START, 1)
    tables = "\n\n".join("\n".join(_table(report)) for report in reports)
    with replacing(readme) as part:
        words = f"{_WORDS}\n\n{tables}\n\n{_machines(reports)}"
        part.write_text(f"{head}{_START}\n{words}\n{_END}{rest.split(_END, 1)[1]}")


def _table(report: dict[str, Any]) -> list[str]:
    """What was measured, the command that does it again, and a row for each goal."""
    return [f"**{report['title']}**: `{_command(report)}`", "", *_LINES, *(_row(report, g) for g in report["goals"])]


def _row(report: dict[str, Any], goal: dict[str, Any]) -> str:
    case, _, quantity = goal["what"].rpartition(": ")
    ours, slash, other = quantity.partition(" / ")
    if slash:
        values = _values(report["cases"], case)
        sides = (f"{ours} {values.get(ours, '')}".strip(), f"{other} {values.get(other, '')}".strip())
        cells = (case, *sides, _figure(goal["measured"]), _figure(goal["goal"]))
    else:
        show = human if "bytes" in quantity else _seconds
        cells = (goal["what"], show(goal["measured"]), "", "", show(goal["goal"]))
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
    return {subject: human(found["median"]) for subject, found in case["bytes"].get(measure, {}).items()}


def _command(report: dict[str, Any]) -> str:
    """What measures it again, with the settings that were not the usual ones."""
    usual = BENCHES[report["bench"]].options().model_dump(mode="json")
    given = {key: value for key, value in report["settings"].items() if key in usual and value != usual[key]}
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in given.items()}
    return " ".join(["doralib bench", report["bench"], *(f"{key}={value}" for key, value in texts.items())])


def _machines(reports: list[dict[str, Any]]) -> str:
    """Where and when, and how busy other processes kept the machine."""
    machine = reports[0]["machine"]
    busy = max(float(report["machine"].get("cores_busy_elsewhere", 0.0)) for report in reports)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {versions}, {machine['date'][:10]}; other processes "
        f"kept at most {busy:.2f} cores busy. Settings, spread, and what has no goal, are in `benchmarks/results/`."
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"
