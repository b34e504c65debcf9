"""What a run's rows are like, for the report and as a page of its own: see `data.survey` for the values."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .markup import NO_SCRIPT, Child, Markup, el, html_table, join

_BAR_PERCENT = 100


def write_data_page(path: Path, survey: Mapping[str, Any], title: str) -> None:
    """Write the survey of some rows as one page that opens anywhere and needs nothing."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    now = datetime.datetime.now().astimezone()
    head = el(
        "head",
        el("meta", charset="utf-8"),
        NO_SCRIPT,
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} - doralib"),
        el("style", Markup(style)),
    )
    foot = el("footer", f"Written by doralib data {now:on %Y-%m-%d at %H:%M}")
    body = el("main", el("header", el("h1", title)), data_section(survey), foot)
    with replacing(path) as part:
        part.write_text(
            "<!DOCTYPE html>\n" + el("html", head, el("body", body), lang="en") + "\n",
            encoding="utf-8",
            # a text may hold half a surrogate pair, which no file can
            errors="replace",
        )


def data_section(survey: Mapping[str, Any]) -> Markup | None:
    """Counts, lengths, rows left out or there twice, and the first rows with what is learned of them colored."""
    try:
        return el(
            "section",
            el("h2", "Data"),
            el("p", _intro(survey["settings"])),
            _counts(survey["splits"]),
            *(part for name, split in survey["splits"].items() for part in _split_details(name, split)),
            _shared([*tell_shared(survey["duplicates"]), *tell_asked(survey["tasks"])]),
            el("h3", "The first rows, with what is learned of them colored"),
            *map(_row, survey["shown"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        # the file is of another version, or damaged
        return None


def tell_twice(name: str, split: Mapping[str, Any]) -> list[str]:
    """What is odd among the rows of one split, a sentence each."""
    lines = []
    if split["num_twice"]:
        pairs = ", ".join(f"row {number} is row {other}" for number, other in split["twice"])
        lines.append(f"{name}: {split['num_twice']:,} rows are there already: {pairs}")
    if split["num_nothing_learned"]:
        numbers = ", ".join(map(str, split["nothing_learned"]))
        lines.append(f"{name}: nothing is learned of {split['num_nothing_learned']:,} rows: {numbers}")
    return lines


def tell_shared(shared: Mapping[str, Any] | None) -> list[str]:
    """Which rows of validation stand in train too, a sentence each."""
    if shared is None:
        return []
    lines = []
    for key, what in (("same", "are rows of train"), ("same_prompt", "begin as rows of train and answer otherwise")):
        if shared[f"num_{key}"]:
            pairs = ", ".join(f"row {number} as row {other}" for number, other in shared[key])
            lines.append(f"{shared[f'num_{key}']:,} rows of validation {what}: {pairs}")
    return lines


def tell_asked(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which prompts of tasks stand in train, a sentence for each task that has some."""
    return [
        f"{task['num_same']:,} of {task['num_asked']:,} prompts of task {name} stand in train: "
        + ", ".join(f"prompt {number} in row {other}" for number, other in task["same"])
        for name, task in tasks.items()
        if task["num_same"]
    ]


def _intro(settings: Mapping[str, Any]) -> str:
    packed = ", packed" if settings["packing"] else ""
    return f"Style {settings['style']}, loss on {settings['loss_on']}, at most {settings['max_length']} tokens{packed}."


def _counts(splits: Mapping[str, Mapping[str, Any]]) -> Markup:
    head: list[Child] = ["", "rows", "used", "left out", "cut", "tokens", "learned", "shortest", "median", "longest"]
    rows: list[list[Child]] = [
        [
            name,
            *(f"{split[key]:,}" for key in ("rows", "kept")),
            f"{sum(split['dropped'].values()):,}",
            *(f"{split[key]:,}" for key in ("cut", "tokens", "learned")),
            *(f"{split['lengths'][key]:,}" for key in ("shortest", "median", "longest")),
        ]
        for name, split in splits.items()
    ]
    return html_table(head, rows, numbers=frozenset(range(1, len(head))))


def _split_details(name: str, split: Mapping[str, Any]) -> Sequence[Markup | None]:
    dropped: list[list[Child]] = [[reason, f"{count:,}"] for reason, count in split["dropped"].items()]
    return [
        el("h3", f"Tokens of a row, {name}"),
        _histogram(split["histogram"]),
        el("h3", f"Rows left out, {name}") if dropped else None,
        html_table(["reason", "rows"], dropped, numbers=frozenset({1})) if dropped else None,
        el("ul", *(el("li", line) for line in split["examples"])) if split["examples"] else None,
        *(el("p", line) for line in tell_twice(name, split)),
    ]


def _histogram(bars: Sequence[Sequence[int]]) -> Markup:
    most = max(count for _, _, count in bars) or 1
    lines = [
        el(
            "tr",
            el("th", name_bar(low, high), scope="row"),
            el("td", el("i", class_="bar a", style=f"width:{_BAR_PERCENT * count / most:.1f}%")),
            el("td", f"{count:,}", class_="n"),
        )
        for low, high, count in bars
    ]
    return el("div", el("table", el("tbody", *lines), class_="bars"), class_="scroll")


def name_bar(low: int, high: int) -> str:
    """The lengths that a bar counts: ``12 to 20``."""
    return str(low) if low == high else f"{low} to {high}"


def _shared(lines: Sequence[str]) -> Markup | None:
    return join(el("h3", "What is tested and stands in train"), *(el("p", line) for line in lines)) if lines else None


def _row(row: Mapping[str, Any]) -> Markup:
    said = f"row {row['number']}: {row['tokens']:,} tokens, {row['learned']:,} learned"
    pieces = (el("mark", text) if learned else el("span", text) for text, learned in row["pieces"])
    return el("div", el("p", said, class_="soft"), el("p", *pieces, class_="text"), class_="sample")
