"""One page for one run: what was trained, how it went, its worth, how to use it. Opens anywhere, needs nothing."""

from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import plots
from .charts import Series, line_chart, number_text, time_text
from .divergence import find_divergence
from .markup import Child, Markup, el, html_table
from .page import write_page
from .record import METHODS, OBJECTIVE_CURVES, RunRecord, is_series, numbers, read_run
from .report_data import data_section
from .report_pictures import is_picture, picture_table
from .report_results import confusion_section, results_section, wrong_section
from .report_series import series_section
from .use import list_commands

_STATUS = {
    "finished": ("finished", "good"),
    "interrupted": ("interrupted: this is not the end of the run", "bad"),
    "nan": ("stopped: the loss was NaN", "bad"),
}


def write_report(run: Path, *, figures: bool = True) -> Path:
    """Write report.html, and where matplotlib is installed figures/*.png, into a run folder; returns the page's path.

    A file of the run that is missing or damaged is named on the page.

    Raises:
        DoraError: if there is no such folder.
    """
    record = read_run(Path(run))
    notes = list(record.notes)
    if (divergence := find_divergence(record)) is not None:
        notes.append(str(divergence))
    if figures:
        try:
            plots.write_figures(record)
        except UsageError as error:
            notes.append(f"No figures/*.png: {error}.")
    return write_page(
        record.path / "report.html",
        _title(record),
        _header(record),
        _tiles(record),
        _notes(notes),
        results_section(record),
        _curves(record),
        confusion_section(record),
        series_section(record),
        _samples(record),
        wrong_section(record),
        _use_section(record),
        data_section(record.survey) if record.survey else _rows_section(record),
        _configuration(record),
        _environment(record),
        source=f"doralib from the files in {record.path.resolve()}",
    )


def _title(record: RunRecord) -> str:
    model = record.summary.get("base_model") or _find_setting(record.config, "model", "path")
    method = record.summary.get("method") or _find_setting(record.config, "adapter", "method")
    name = Path(str(model)).name if model else "A model"
    return f"{name}, tuned by {METHODS.get(str(method), method) if method else 'doralib'}"


def _header(record: RunRecord) -> Markup:
    status = record.summary.get("status")
    text, color = _STATUS.get(str(status), (str(status), "bad"))
    train = str(_find_setting(record.config, "data", "train") or "")
    r = _find_setting(record.config, "adapter", "r")
    rows, steps = record.summary.get("train_rows"), record.summary.get("steps")
    parts = [
        f"on {Path(train).name if Path(train).suffix else train}" if train else "",
        f"{rows:,} rows" if isinstance(rows, int) else "",
        f"{steps:,} steps" if isinstance(steps, int) else "",
        f"rank {r}" if r and record.summary.get("method") != "full" else "",
    ]
    return el(
        "header",
        el("div", text, class_=f"badge {color}") if status else None,
        el("h1", _title(record)),
        el("p", ", ".join(part for part in parts if part), class_="lead"),
    )


def _tiles(record: RunRecord) -> Markup | None:
    s = record.summary
    trained, total = s.get("trainable_parameters", 0), s.get("total_parameters", 0)
    share = (
        f"\n({100 * trained / total:.2g} %)" if trained and total and _is_number(trained) and _is_number(total) else ""
    )
    losses = numbers(record.evals, "eval_loss") or numbers(record.train, "loss")
    shown = {
        "time": time_text(s["seconds"]) if _is_number(s.get("seconds")) else None,
        f"{record.unit} per second": _speed_text(s["tokens_per_second"])
        if _is_number(s.get("tokens_per_second"))
        else None,
        "parameters trained": _count_text(trained) + share if trained and _is_number(trained) else None,
        "evaluation loss" if record.evals else "last loss": number_text(losses[-1][1]) if losses else None,
        "best step": f"{s['best_step']:,}" if isinstance(s.get("best_step"), int) else None,
    }
    tiles = [el("div", el("span", name), el("b", value), class_="tile") for name, value in shown.items() if value]
    return el("div", *tiles, class_="tiles") if tiles else None


def _notes(notes: list[str]) -> Markup | None:
    return el("div", el("ul", *(el("li", note) for note in notes)), class_="note") if notes else None


def _curves(record: RunRecord) -> Markup | None:
    train = [Series("training", numbers(record.train, "loss"), smooth=True)]
    charts = [
        line_chart("Loss", [*train, Series("evaluation", numbers(record.evals, "eval_loss"), "b", dots=True)]),
        *_objective_curves(record),
        line_chart("Learning rate", [Series("learning rate", numbers(record.train, "learning_rate"))]),
        line_chart("Gradient norm", [Series("gradient norm", numbers(record.train, "grad_norm"), smooth=True)]),
        line_chart(
            f"{record.unit.capitalize()} per second",
            [Series(f"{record.unit} per second", numbers(record.train, "tokens_per_second"))],
        ),
    ]
    if not any(charts):
        return None
    intro = "Where a line is faint, the thick one over it is its running mean."
    return _section("Curves", intro, el("div", *charts, class_="charts"))


def _objective_curves(record: RunRecord) -> list[Markup | None]:
    return [
        line_chart(
            title, [Series("training", numbers(record.train, key), smooth=True), Series("evaluation", held, "b")]
        )
        for key, title in OBJECTIVE_CURVES.items()
        for held in [numbers(record.evals, f"eval_{key}")]
    ]


def _samples(record: RunRecord) -> Markup | None:
    samples = [sample for sample in record.samples if not is_series(sample)]
    if not samples:
        return None
    if any(is_picture(sample.get("after")) or is_picture(sample.get("before")) for sample in samples):
        return _section("What it draws", "Each prompt from the same seed.", picture_table(samples))
    return _section("What it says", "Generated before and after training.", *map(_sample, samples))


def _sample(sample: dict[str, Any]) -> Markup:
    said = [
        el("div", el("span", when), el("p", sample[when], class_="text"))
        for when in ("expected", "before", "after")
        if sample.get(when) is not None
    ]
    sound = str(sample.get("sound") or "")
    # nothing but a sound in the page itself is played
    player = el("audio", src=sound, controls="", preload="metadata") if sound.startswith("data:audio/") else None
    asked = el("p", sample.get("prompt"), class_="text")
    return el("div", _pictures(sample), asked, player, el("div", *said, class_="said"), class_="sample")


def _pictures(sample: dict[str, Any]) -> Markup | None:
    """What a sample is about: small pictures that stand in the page itself."""
    given = sample.get("pictures")
    uris = [uri for uri in given if str(uri).startswith("data:image/")] if isinstance(given, list) else []
    return el("div", *(el("img", src=uri, alt="") for uri in uris), class_="pictures") if uris else None


def _use_section(record: RunRecord) -> Markup | None:
    """Commands and code with this run's own paths in them."""
    if not record.summary.get("base_model"):
        return None
    content = [each for title, code in list_commands(record).items() for each in (el("h3", title), el("pre", code))]
    return _section("Use it", "", *content)


def _rows_section(record: RunRecord) -> Markup | None:
    dropped = record.summary.get("dropped_rows")
    if not isinstance(dropped, dict) or not any(dropped.values()):
        return None
    rows: list[list[Child]] = [[reason, count] for reason, count in dropped.items()]
    return _section("Rows left out", "", html_table(["reason", "rows"], rows, numbers=frozenset({1})))


def _configuration(record: RunRecord) -> Markup | None:
    if not record.config:
        return None
    groups = {key: value for key, value in record.config.items() if isinstance(value, dict)}
    rest = {key: value for key, value in record.config.items() if key not in groups}
    parts: list[Child] = []
    for name, values in [*groups.items(), ("run", rest)]:
        if values:
            parts += [el("h3", name), _key_table(values)]
    shown = el("details", el("summary", "show"), *parts)
    return _section("Configuration", "All of config.yaml, with every default.", shown)


def _environment(record: RunRecord) -> Markup | None:
    if not record.environment:
        return None
    return _section("Environment", "", el("details", el("summary", "show"), _key_table(_flatten(record.environment))))


def _section(title: str, intro: str, *content: Child) -> Markup:
    return el("section", el("h2", title), el("p", intro) if intro else None, *content)


def _key_table(values: dict[str, Any]) -> Markup:
    lines = [el("tr", el("th", key, scope="row"), el("td", _value_text(value))) for key, value in values.items()]
    return el("div", el("table", el("tbody", *lines), class_="plain"), class_="scroll")


def _flatten(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested keys joined by points."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value_text(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_value_text(item) for item in value) or "-"
    # 0 and 1 are numbers here, though they equal false and true
    return "-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _find_setting(values: dict[str, Any], group: str, key: str) -> Any:
    inner = values.get(group)
    return inner.get(key) if isinstance(inner, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _speed_text(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _count_text(count: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
