"""Which columns a style of rows reads, and whether the data has them."""

from collections.abc import Callable, Sequence

from ..errors import UsageError, did_you_mean
from ..recipe import DataSettings
from .conversations import COLUMNS, find_column
from .detect import find_style
from .templates import columns_in

Needs = Callable[[DataSettings, Sequence[str]], dict[str, list[str]]]
"""(settings, columns of the data) to the columns that must be there, by the setting that names them."""


def check_columns(settings: DataSettings, columns: Sequence[str], source: str) -> None:
    """Check that the style is known and its columns are all there.

    Raises:
        UsageError: with every column that is missing, the nearest names and those that there are; if the style is auto
            and the columns fit none.
    """
    settings = find_style(settings, columns, {}, source)
    if settings.style not in _STYLES:
        hint = did_you_mean(settings.style, ["auto", *_STYLES])
        raise UsageError(f"data.style: there is no style {settings.style!r}{hint}; known: auto, {', '.join(_STYLES)}")
    reads, find_needed = _STYLES[settings.style]
    problems = [
        f"data.{name}: style {settings.style} does not read it"
        for name in ("prompt", "target", "messages")
        if name not in reads and getattr(settings, name) != DataSettings.model_fields[name].default
    ]
    for setting, needed in find_needed(settings, columns).items():
        problems += [
            f"{setting}: {source} has no column {name!r}{did_you_mean(name, columns)}"
            for name in needed
            if name not in columns
        ]
    if problems:
        raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(columns)}"]))


def check_label_columns(settings: DataSettings, columns: Sequence[str], source: str) -> None:
    """Check that the columns of texts and labels are named and there.

    Raises:
        UsageError: with everything that is missing.
    """
    problems = [
        f"data.{name}: a classifier needs it, the column of {what}"
        for name, what in (("prompt", "texts, or a template"), ("target", "labels"))
        if not getattr(settings, name)
    ]
    for name in ("prompt", "target"):
        problems += [
            f"data.{name}: {source} has no column {column!r}{did_you_mean(column, columns)}"
            for column in columns_in(getattr(settings, name) or "", f"data.{name}")
            if column not in columns
        ]
    if problems:
        raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(columns)}"]))


def _completion_needs(settings: DataSettings, _: Sequence[str]) -> dict[str, list[str]]:
    if settings.target is None:
        raise UsageError("data.target: style completion needs it, a column's name or a template like ' {label}'")
    named = {"data.prompt": settings.prompt, "data.target": settings.target}
    return {key: columns_in(text, key) for key, text in named.items() if text is not None}


def _text_needs(settings: DataSettings, _: Sequence[str]) -> dict[str, list[str]]:
    return {"style text" if settings.target is None else "data.target": columns_in(settings.target or "text")}


def _chat_needs(settings: DataSettings, columns: Sequence[str]) -> dict[str, list[str]]:
    if talk := find_column(settings.messages, columns):
        return {"data.messages": [talk]}
    others = (["prompt", "completion"], ["instruction", "output"])
    if settings.messages == COLUMNS[0] and (pair := next((one for one in others if set(one) <= set(columns)), None)):
        return {"style chat": pair}
    return {"data.messages": [settings.messages]}


_STYLES: dict[str, tuple[tuple[str, ...], Needs]] = {
    "completion": (("prompt", "target"), _completion_needs),
    "alpaca": ((), lambda *_: {"style alpaca": ["instruction", "output"]}),
    "chat": (("messages",), _chat_needs),
    "text": (("target",), _text_needs),
}
"""The fields of `DataSettings` that a style alone reads, and the columns that it needs."""
