"""analysis.csv, the spectra, the figures, and one page that shows them together."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...disk import replacing
from ...errors import UsageError
from ..page import Section, save_figures, write_sections
from ..statistics import Interval
from .correlate import Correlation, correlate
from .figures import NAMES, draw_movements
from .measure import WeightMovement

COLUMNS = ("tuned", "method", "step", "layer", "module", "delta_m", "delta_d")
SPECTRUM_COLUMNS = ("tuned", "method", "step", "layer", "module", "intruders", "index", "singular_value")


def write_analysis(out: Path, movements: Sequence[WeightMovement], base: str) -> list[Path]:
    """Write everything into a folder; returns the paths, the page last."""
    written = [_write_csv(out / "analysis.csv", COLUMNS, map(_line, movements))]
    if any(each.spectrum for each in movements):
        written.append(_write_csv(out / "spectra.csv", SPECTRUM_COLUMNS, _spectrum_lines(movements)))
    found, note = correlate(movements), ""
    try:
        drawn = save_figures(out / "figures", draw_movements(movements))
    except UsageError as error:
        drawn, note = [], f" No figures: {error}."
    written += [out / "figures" / f"{name}.png" for name in drawn]
    tuned = ", ".join(dict.fromkeys(each.tuned for each in movements))
    lead = f"{tuned}, against {base}.{note}"
    written.append(write_sections(out / "analysis.html", "How far the weights moved", lead, _sections(found, drawn)))
    return written


def correlation_rows(found: Sequence[Correlation]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of texts for each correlation."""
    rows = [
        [
            f"{NAMES.get(each.method, each.method)}, {each.module}",
            str(each.points),
            _interval_text(each.pearson),
            _interval_text(each.spearman),
            "" if each.published is None else f"{each.published:+.2f}",
        ]
        for each in found
    ]
    return ["method, module", "points", "Pearson", "Spearman", "the paper's"], rows


def _interval_text(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


def _sections(found: Sequence[Correlation], drawn: Sequence[str]) -> list[Section]:
    head, rows = correlation_rows(found)
    text = (
        "Of ΔD and ΔM over layers and steps together, with 95 % bootstrap intervals over the points. Points of one run "
        "depend on each other, so the intervals are too narrow. The paper's numbers are of VL-BART."
    )
    sections = [Section("Correlations", text, head, rows)]
    for kind, title, said in (
        ("scatter", "Lengths against directions", "As the paper's Figure 2: a point is one layer at one step."),
        ("layers", "By layer", "As the paper's Figure 3: each model at its last step."),
        (
            "spectra",
            "Spectra",
            "Intruders: directions that are like none of the untouched weight (arXiv 2410.21228).",
        ),
    ):
        if names := [name for name in drawn if name.startswith(kind)]:
            sections.append(Section(title, said, figures=names))
    return sections


def _line(each: WeightMovement) -> dict[str, Any]:
    return {name: "" if (value := getattr(each, name)) is None else value for name in COLUMNS}


def _spectrum_lines(movements: Sequence[WeightMovement]) -> Iterator[dict[str, Any]]:
    for each in movements:
        if each.spectrum:
            known = {name: value for name, value in _line(each).items() if name in SPECTRUM_COLUMNS}
            for index, value in enumerate(each.spectrum.values, 1):
                yield {**known, "intruders": each.spectrum.intruders, "index": index, "singular_value": value}


def _write_csv(path: Path, columns: Sequence[str], lines: Any) -> Path:
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    return path
