"""What a measurement hands back, and its tables in Markdown and on the terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .subjects import REFERENCE

QUIET = 0.15
"""Cores that other processes may keep busy, on average, before a report says so."""


@dataclass
class Table:
    """Rows of text under columns."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass
class Goal:
    """A number that was promised to be at most so large."""

    what: str
    measured: float
    goal: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.measured <= self.goal


@dataclass
class Bar:
    """A value with its quartiles."""

    label: str
    value: float
    low: float
    high: float


@dataclass
class Bars:
    """One figure: groups of bars."""

    title: str
    axis: str
    groups: dict[str, list[Bar]] = field(default_factory=dict)
    line: float | None = 1.0
    """Where the reference stands."""


@dataclass
class Report:
    """One measurement, complete."""

    name: str
    title: str
    settings: dict[str, Any]
    cases: list[dict[str, Any]]
    tables: list[Table]
    bars: Bars
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Everything but the drawing; the tables are made of the cases."""
        return {
            "bench": self.name,
            "title": self.title,
            "machine": machine,
            "settings": self.settings,
            "notes": self.notes,
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals],
            "cases": self.cases,
        }


def timing_table(title: str, summary: dict[str, Any]) -> Table:
    """One case: milliseconds and ratios, a subject a row."""
    over = [name for name in (REFERENCE, "peft-dora") if any(key.endswith(f" / {name}") for key in summary["ratios"])]
    table = Table(
        title, ["subject", "median ms", "quartiles", "min", *(f"/ {name} (quartiles; of minima)" for name in over)]
    )
    for name, seconds in summary["seconds"].items():
        ratios = [summary["ratios"].get(f"{name} / {other}") for other in over]
        shown = [ratio_text(ratio) for ratio in ratios]
        quartiles = f"{ms(seconds['low'])} to {ms(seconds['high'])}"
        table.rows.append([name, ms(seconds["median"]), quartiles, ms(seconds["min"]), *shown])
    return table


def ratio_text(ratio: dict[str, Any] | None) -> str:
    """Median, quartiles and the ratio of the fastest rounds, or nothing."""
    if ratio is None:
        return ""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}; {ratio['of_minima']:.3f})"


def ratio_bars(summary: dict[str, Any]) -> list[Bar]:
    """A case's ratios to the reference as bars."""
    ending = f" / {REFERENCE}"
    found = {key.removesuffix(ending): r for key, r in summary["ratios"].items() if key.endswith(ending)}
    return [Bar(name, r["median"], r["low"], r["high"]) for name, r in found.items()]


def ratio_goal(what: str, summary: dict[str, Any], pair: str, goal: float) -> list[Goal]:
    """The goal for a ratio of a case, if it was measured: `pair` is ``"over / under"``."""
    ratio = summary["ratios"].get(pair)
    return [] if ratio is None else [Goal(f"{what}: {pair}", ratio["median"], goal)]


def goal_table(goals: Sequence[Goal]) -> Table:
    """Promised and measured."""
    rows = [[g.what, f"{g.measured:.4g}", f"{g.goal:.4g}", "yes" if g.met else "no"] for g in goals]
    return Table("Goals", ["what", "measured", "at most", "met"], rows)


def markdown(report: Report, machine: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"])
    head = [
        f"# {report.title}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {versions}; "
        f"{machine['date']}; load average at the start {load}.",
        *(["", *(f"- {note}" for note in report.notes)] if report.notes else []),
    ]
    if (others := machine["cores_busy_elsewhere"]) and others > QUIET:
        head += ["", f"**Other processes kept {others:g} cores busy meanwhile: these times are not to be quoted.**"]
    tables = [*([goal_table(report.goals)] if report.goals else []), *report.tables]
    return "\n".join([*head, *(line for table in tables for line in ["", *_lines(table)])]) + "\n"


def ms(seconds: float) -> str:
    """Milliseconds with three digits that count."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _lines(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [table.columns, rule, *table.rows]
    return [
        f"## {table.title}",
        "",
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows),
    ]
