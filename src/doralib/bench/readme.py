"""The README's table of measured figures, from the goals in the benchmarks' JSON files."""

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_json, replacing
from .runner import BENCHES

_START, _END = "<!-- measured -->", "<!-- /measured -->"
_LINES = ("| what | measured | goal | met | command |", "|---|---:|---:|---|---|")


def update_readme(readme: Path, results: Path) -> None:
    """Replace what stands between the marks in a README by the figures of every JSON file in the folder.

    Raises:
        UsageError: if the README has no marks, or the folder no figures.
    """
    text = readme.read_text()
    reports = [read_json(path) for path in sorted(results.glob("*.json"))]
    reports = [report for report in reports if isinstance(report, dict) and report.get("goals")]
    if _START not in text or _END not in text:
        raise UsageError(f"{readme} has no lines {_START} and {_END} to write between")
    if not reports:
        raise UsageError(f"there are no figures in {results}; make them with: doralib bench all")
    head, rest = text.split(_START, 1)
    table = "\n".join([*_LINES, *(row for report in reports for row in _rows(report))])
    with replacing(readme) as part:
        part.write_text(f"{head}{_START}\n{table}\n\n{_machines(reports)}\n{_END}{rest.split(_END, 1)[1]}")


def _rows(report: dict[str, Any]) -> list[str]:
    return [
        f"| {goal['what']} | {_figure(goal['measured'])} | {_figure(goal['goal'])} | {'yes' if goal['met'] else 'no'} "
        f"| `{_command(report)}` |"
        for goal in report["goals"]
    ]


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
        f"{machine['cpu']}, {machine['cores']} cores, {versions}, {machine['date'][:10]}. Ratios are medians of rounds "
        f"in which the subjects take turns; other processes kept at most {busy:.2f} cores busy. Settings, spread, "
        "and the rows without a goal, are in `benchmarks/results/`."
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
