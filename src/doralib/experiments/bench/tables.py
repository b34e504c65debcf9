"""What a measurement hands back, and its tables in Markdown and on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .subjects import REFERENCE

QUIET = 0.15
"""Cores that other processes may keep busy, on average, before a report says so."""
TIME_RATIO = "time / time of PEFT LoRA in the same round"

Case = dict[str, Any]
"""A name, settings, and what was measured."""


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
    bars: Bars
    notes: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def add(
        self,
        case: Case,
        *tables: Table,
        bars: Mapping[str, list[Bar]] | list[Bar] | None = None,
        goals: Iterable[Goal] = (),
    ) -> None:
        """A case and what is shown of it: its ratios to the reference as bars, other bars, or groups of them."""
        bars = make_bars(ratios_to(REFERENCE, case["ratios"])) if bars is None else bars
        self.cases.append(case)
        self.tables += tables
        self.bars.groups |= {case["name"]: bars} if isinstance(bars, list) else bars
        self.goals += goals

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


def timing_table(case: Case) -> Table:
    """Milliseconds and ratios, a subject a row."""
    over = [name for name in (REFERENCE, "peft-dora") if ratios_to(name, case["ratios"])]
    columns = ["subject", "median ms", "quartiles", "min", *(f"/ {name} (quartiles; of minima)" for name in over)]
    table = Table(case["name"], columns)
    for name, seconds in case["seconds"].items():
        shown = [ratio_text(case, name, other) for other in over]
        table.rows.append([name, ms(seconds["median"]), quartiles(seconds), ms(seconds["min"]), *shown])
    return table


def ratio_text(case: Case, over: str, under: str) -> str:
    """Median, quartiles and the ratio of the fastest rounds, or nothing."""
    if (ratio := case["ratios"].get(f"{over} / {under}")) is None:
        return ""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}; {ratio['of_minima']:.3f})"


def ratios_to(under: str, ratios: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The ratios of all others to one subject, by their names."""
    ending = f" / {under}"
    return {key.removesuffix(ending): ratio for key, ratio in ratios.items() if key.endswith(ending)}


def ratio_goals(case: Case, limits: Mapping[str, float]) -> list[Goal]:
    """A goal for each ratio (``"over / under"``) that was measured."""
    found = {pair: case["ratios"][pair]["median"] for pair in limits if pair in case["ratios"]}
    return [Goal(f"{case['name']}: {pair}", median, limits[pair]) for pair, median in found.items()]


def make_bars(spreads: Mapping[str, dict[str, Any]]) -> list[Bar]:
    """A bar for each subject."""
    return [Bar(name, each["median"], each["low"], each["high"]) for name, each in spreads.items()]


def goal_table(goals: Sequence[Goal]) -> Table:
    """Promised and measured."""
    rows = [[g.what, f"{g.measured:.4g}", f"{g.goal:.4g}", "yes" if g.met else "no"] for g in goals]
    return Table("Goals", ["what", "measured", "at most", "met"], rows)


def markdown(report: Report, machine: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"]) or "unknown"
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


def quartiles(seconds: dict[str, Any]) -> str:
    """In milliseconds."""
    return f"{ms(seconds['low'])} to {ms(seconds['high'])}"


def _lines(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [table.columns, rule, *table.rows]
    return [
        f"## {table.title}",
        "",
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows),
    ]
