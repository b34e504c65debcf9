"""The report's results: before against after, with intervals, confusion matrices and mistakes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .charts import number_text
from .markup import Child, Markup, el, html_table, join
from .record import MetricValue, RunRecord, Values, read_metric

SHARES = (
    *("accuracy", "macro_f1", "weighted_f1", "token_f1", "vqa_accuracy", "precision", "recall", "f1", "yes_rate"),
    *("wer", "cer", "rouge1", "rouge2", "rougeL"),
    *("image_accuracy", "binary_accuracy", "open_accuracy", "random_f1", "popular_f1", "adversarial_f1"),
)
"""Metrics that are shown in per cent."""
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "loss", "eval_loss", "wer", "cer", "mase", "smape", "pinball")
_NEITHER_IS_BETTER = ("yes_rate",)


@dataclass(frozen=True)
class _Change:
    """One metric of one task, before and after; one of them may be missing."""

    task: str
    n: int | None
    metric: str
    before: MetricValue | None
    after: MetricValue | None
    paired: MetricValue | None = None
    """The mean change of the rows, with its interval."""

    @property
    def difference(self) -> float | None:
        return self.after.value - self.before.value if self.before and self.after else None

    @property
    def is_share(self) -> bool:
        """Whether it can be drawn on an axis of percentages; a damaged file has any number."""
        values = [value for value in (self.before, self.after) if value]
        numbers = [number for each in values for number in (each.value, each.low, each.high)]
        return self.metric in SHARES and all(abs(number) < 1 + 1e-6 for number in numbers)

    @property
    def color(self) -> str | None:
        """Green where it got better, red where worse; neither where no value is better or rows may be the cause."""
        if (
            not self.difference
            or self.metric in _NEITHER_IS_BETTER
            or (self.paired and self.paired.low <= 0 <= self.paired.high)
        ):
            return None
        better = (self.difference < 0) if self.metric in _LOWER_IS_BETTER else (self.difference > 0)
        return "good" if better else "bad"


def results_section(record: RunRecord) -> Markup | None:
    """The change of each task as a picture, then every metric as a table."""
    changes = _changes(record)
    if not changes:
        return None
    first = {change.task: change for change in reversed(changes)}
    drawn = [first[task] for task in dict.fromkeys(change.task for change in changes)]
    shares = [change for change in drawn if change.is_share]
    intro = "Lines, and the small figures, are 95 % bootstrap intervals; that of a change is paired, row by row."
    if not record.results["before"]:
        intro = f"The model was not scored before training. {intro}"
    return el("section", el("h2", "Results"), el("p", intro), _picture(shares), _table(changes))


def confusion_section(record: RunRecord) -> Markup | None:
    """The matrices of every task that has them, before and after side by side."""
    tasks = dict.fromkeys([*record.results["after"], *record.results["before"]])
    blocks = []
    for task in tasks:
        pairs = [(when, _matrix(record.results[when].get(task))) for when in ("before", "after")]
        shown = [el("div", el("h3", f"{task}, {when}"), matrix) for when, matrix in pairs if matrix]
        if shown:
            blocks.append(el("div", *shown, class_="pair"))
    if not blocks:
        return None
    intro = "A line for each true label, a column for each answer; the percentages are of the line."
    return el("section", el("h2", "Which labels are mixed up"), el("p", intro), el("div", *blocks, class_="pairs"))


def wrong_section(record: RunRecord) -> Markup | None:
    """Some mistakes that are left after training."""
    blocks = []
    for task, result in record.results["after"].items():
        wrong = result.get("wrong") or []
        if wrong:
            rows: list[list[Child]] = [
                [el("span", item.get("prompt"), class_="text"), item.get("expected"), item.get("predicted")]
                for item in wrong
            ]
            title = el("summary", f"{task}: {len(wrong)} shown")
            blocks.append(el("details", title, html_table(["prompt", "expected", "answered"], rows, "wrong")))
    if not blocks:
        return None
    return el("section", el("h2", "Wrong answers"), el("p", "After training, at most 20 of each task."), *blocks)


def _changes(record: RunRecord) -> list[_Change]:
    before, after = record.results["before"], record.results["after"]
    found = []
    for task in dict.fromkeys([*after, *before]):
        old, new = before.get(task, {}), after.get(task, {})
        metrics = [each for each in (new.get("metrics"), old.get("metrics")) if isinstance(each, dict)]
        n = new.get("n", old.get("n"))
        values = [(name, read_metric(old, name), read_metric(new, name)) for name in dict.fromkeys(chain(*metrics))]
        paired = {"metrics": record.changes.get(task, {})}
        found += [
            _Change(task, n, name, was, now, read_metric(paired, name)) for name, was, now in values if was or now
        ]
    return found


def _picture(changes: Sequence[_Change]) -> Markup | None:
    """For each task a dot before and a dot after, on one axis of percentages."""
    values = [value for change in changes for value in (change.before, change.after) if value]
    if not values:
        return None
    low = math.floor(min(value.low for value in values) * 20) / 20
    high = math.ceil(max(value.high for value in values) * 20) / 20
    high = high if high > low else low + 0.05
    step = 0.05 if high - low <= 0.31 else 0.1 if high - low <= 0.61 else 0.2
    ticks = [step * i for i in range(math.ceil(low / step - 0.001), math.floor(high / step + 0.001) + 1)]
    place = lambda value: f"{100 * (value - low) / (high - low):.2f}%"
    lines = [_change_line(change, place) for change in changes]
    axis = el("div", *(el("span", f"{100 * t:.0f} %", style=f"left:{place(t)}") for t in ticks), class_="axis")
    whens = [when for when in ("before", "after") if any(getattr(change, when) for change in changes)]
    keys = [el("span", el("i", class_=when), when) for when in whens]
    empty = el("span", class_="empty")
    return join(el("p", *keys, class_="keys"), *lines, el("div", empty, axis, empty, class_="change"))


def _change_line(change: _Change, place: Any) -> Markup:
    marks = []
    for when in ("before", "after"):
        value: MetricValue | None = getattr(change, when)
        if value:
            width = f"calc({place(value.high)} - {place(value.low)})"
            marks.append(el("i", class_=f"ci {when}", style=f"left:{place(value.low)};width:{width}"))
            at, title = place(value.value), _text(change.metric, value.value)
            marks.append(el("i", class_=f"dot {when}", style=f"left:{at}", title=title))
    rows = f"{change.n:,} rows" if isinstance(change.n, int) else ""
    name = el("b", change.task, el("small", f"{change.metric.replace('_', ' ')}, {rows}"))
    shown = [_text(change.metric, value.value) for value in (change.before, change.after) if value]
    arrow = " \N{RIGHTWARDS ARROW} "
    verdict = el("div", el("b", arrow.join(shown)), _difference(change, "small"), class_="verdict")
    return el("div", name, el("div", *marks, class_="track"), verdict, class_="change")


def _table(changes: Sequence[_Change]) -> Markup:
    rows: list[list[Child]] = []
    previous = None
    for change in changes:
        task = [change.task, change.n] if change.task != previous else ["", ""]
        values = [_cell(change.metric, change.before), _cell(change.metric, change.after)]
        rows.append(
            [
                *task,
                change.metric.replace("_", " "),
                *values,
                join(_difference(change, "span") or "-", _interval(change)),
            ]
        )
        previous = change.task
    head: list[Child] = ["task", "rows", "metric", "before", "after", "change"]
    return html_table(head, rows, "results", numbers=frozenset({1, 3, 4, 5}))


def _cell(metric: str, value: MetricValue | None) -> Child:
    if value is None:
        return "-"
    low, high = (_text(metric, end).removesuffix(" %") for end in (value.low, value.high))
    return join(_text(metric, value.value), el("small", f"{low} to {high}"))


def _difference(change: _Change, tag: str) -> Markup | None:
    """How much was gained or lost, in the color that says which; of shares in points."""
    if change.difference is None:
        return None
    share = change.metric in SHARES
    text = f"{100 * change.difference:+.1f}" if share else f"{change.difference:+.3f}"
    unit = el("span", " points", class_="unit") if share else None
    return el(tag, text.replace("-", "\N{MINUS SIGN}"), unit, class_=change.color)


def _interval(change: _Change) -> Markup | None:
    """The interval of a change, of shares in points."""
    if change.paired is None:
        return None
    low, high = (f"{100 * end:+.1f}".replace("-", "\N{MINUS SIGN}") for end in (change.paired.low, change.paired.high))
    return el("small", f"{low} to {high}")


def _text(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric in SHARES else number_text(value)


def _matrix(result: Values | None) -> Markup | None:
    confusion = (result or {}).get("confusion")
    if not confusion:
        return None
    labels, counts_LL = confusion["labels"], confusion["counts"]
    head = el("tr", el("td"), *(el("th", label, scope="col") for label in labels))
    lines = [
        el("tr", el("th", label, scope="row"), *(_heat(count, sum(counts_L)) for count in counts_L))
        for label, counts_L in zip(labels, counts_LL, strict=True)
    ]
    return el("div", el("table", el("thead", head), el("tbody", *lines), class_="matrix"), class_="scroll")


def _heat(count: int, total: int) -> Markup:
    share = count / total if total else 0.0
    style = f"background:rgba(var(--heat),{share * 0.55:.3f})"
    return el("td", el("div", count, el("small", f"{100 * share:.0f} %"), style=style))
