"""The report's pictures: a line for each prompt, a column for each moment of the training, all from the same seed."""

from collections.abc import Sequence

from .markup import Child, Markup, el, html_table
from .record import Values

_MOST_CHECKPOINTS = 4
_TITLES = {"expected": "of the data"}


def is_picture(value: object) -> bool:
    """Whether a text is a picture that a page can show."""
    return isinstance(value, str) and value.startswith("data:image/webp;base64,")


def show_picture(value: object, title: str = "") -> Markup | None:
    """A picture as an element; nothing of any other value."""
    return el("img", src=str(value), alt=title, title=title, loading="lazy") if is_picture(value) else None


def picture_table(samples: Sequence[Values]) -> Markup:
    """The pictures of a run's samples."""
    columns = _choose_columns(samples)
    head: list[Child] = ["", *(_TITLES.get(name, name) for name in columns)]
    rows: list[list[Child]] = [
        [str(sample.get("prompt", "")), *(show_picture(sample.get(name), name) for name in columns)]
        for sample in samples
    ]
    return html_table(head, rows, class_="pictures")


def _choose_columns(samples: Sequence[Values]) -> list[str]:
    """The data, before, a few checkpoints evenly, after; those that have a picture."""
    there = {name for sample in samples for name, value in sample.items() if is_picture(value)}
    steps = sorted((name for name in there if _read_step(name) is not None), key=lambda name: _read_step(name) or 0)
    if len(steps) > _MOST_CHECKPOINTS:
        steps = [steps[round(i * (len(steps) - 1) / (_MOST_CHECKPOINTS - 1))] for i in range(_MOST_CHECKPOINTS)]
    return [name for name in ("expected", "before", *steps, "after") if name in there]


def _read_step(name: str) -> int | None:
    word, _, number = name.partition(" ")
    return int(number) if word == "step" and number.isdigit() else None
