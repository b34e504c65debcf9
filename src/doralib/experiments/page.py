"""One page of an experiment that opens anywhere: text, tables, and figures that are also files of their own."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk import replacing
from ..runs.markup import Child, Markup, el, html_table
from ..runs.page import write_page

COLORS = {
    "dora": "#2563c9",
    "lora": "#c2560c",
    "full": "#17753a",
    "dvora": "#7b4fc9",
    "vera": "#b8860b",
    "base": "#6b7480",
}
"""Of methods, in every figure."""
_FIGURE_STYLE = "\nsection img { max-width: 100%; background: #fff; border-radius: 8px; }\n"


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    text: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Child]] = ()
    figures: Sequence[str] = ()
    """Names of files in the page's folder `figures`."""


def save_figures(folder: Path, figures: Mapping[str, Any]) -> list[str]:
    """Write matplotlib figures as NAME.png; returns the names."""
    for name, figure in figures.items():
        with replacing(folder / f"{name}.png") as part:
            figure.savefig(part, format="png")
    return list(figures)


def style_axes(axes: Any, x: str, y: str, title: str = "") -> Any:
    """Axes without a frame, with faint lines and their labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        # above the factor of ten that an axis may write there
        axes.set_title(title, loc="left", fontsize=11, pad=16)
    return axes


def write_sections(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page of these sections; its figures are in it, so that it can be sent alone."""
    parts = [_section(path.parent / "figures", section) for section in sections]
    header = el("header", el("h1", title), el("p", lead, class_="lead"))
    return write_page(path, title, header, *parts, style=_FIGURE_STYLE)


def _section(folder: Path, section: Section) -> Markup:
    numbers = frozenset(range(1, len(section.head)))
    table = html_table([*section.head], [[*row] for row in section.rows], numbers=numbers) if section.rows else None
    pictures = [_picture(folder / f"{name}.png") for name in section.figures]
    return el("section", el("h2", section.title), el("p", section.text), table, *pictures)


def _picture(file: Path) -> Markup:
    data = base64.b64encode(file.read_bytes()).decode()
    return Markup(f'<p><img alt="{file.stem}" src="data:image/png;base64,{data}"></p>')
