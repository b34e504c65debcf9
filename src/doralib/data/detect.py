"""Style auto: what the columns and the first row say of the rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..recipe import DataSettings
from .conversations import COLUMNS, find_column
from .prepare import Row

LOOKED_AT = 20
"""So many rows of a data set are looked at."""
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_ASKED = ("prompt", "question", "query", "input", "instruction", "source", "problem")
_TEXTS = ("text", "sentence", "review", "content", "document", "body", "message", "title")
_LABELS = ("label", "labels", "sentiment", "class", "category")
_ANSWERED = ("completion", "answer", "response", "output", "target", "solution", "label", "summary")


def look_at(rows: Any) -> Row:
    """A row with the first value that each column has, if it has one soon; of a data set."""
    return find_first(rows[:LOOKED_AT])


def find_first(there: Mapping[str, Sequence[Any]]) -> Row:
    """The same of the first values of the columns."""
    return {name: next((value for value in column if value is not None), None) for name, column in there.items()}


def find_style(settings: DataSettings, columns: Sequence[str], first: Row, source: str) -> DataSettings:
    """The settings with the style that rows of these columns have, or as they are if they name one.

    `first` is one of the rows, and may lack columns that nobody has looked at.

    Raises:
        UsageError: if the columns fit no style or more than one, with the settings that decide it.
    """
    if settings.style != "auto":
        return settings
    if settings.target is not None or settings.prompt is not None:
        return settings.model_copy(update={"style": "completion"})
    if settings.messages != COLUMNS[0]:
        return settings.model_copy(update={"style": "chat"})
    if {"chosen", "rejected"} <= set(columns):
        raise _refuse(
            "rows with a chosen and a rejected answer are for training on preferences (objective.kind: dpo)",
            columns,
            first,
            source,
        )
    talk = find_column(settings.messages, columns)
    if talk is not None:
        if media := [name for name in _MEDIA if name in columns]:
            raise UsageError(
                f"data.style: {source} has the column {media[0]}, and doralib trains on text here; to learn from the "
                f"words alone set data.style: chat\n{_list(columns, source)}"
            )
        return settings.model_copy(update={"style": "chat", "messages": talk})
    if {"prompt", "completion"} <= set(columns):
        return _read_sides(settings, columns, first, source)
    if {"instruction", "output"} <= set(columns):
        return settings.model_copy(update={"style": "alpaca"})
    if "text" in columns or len(columns) == 1:
        return settings.model_copy(update={"style": "text", "target": "text" if "text" in columns else columns[0]})
    raise _refuse("auto cannot tell from the columns what a row is", columns, first, source)


def guess_pair(columns: Sequence[str]) -> tuple[str, str] | None:
    """The columns of a question, or a text, and of what is to be said to it, by their usual names."""
    named = {name.lower(): name for name in reversed(columns)}
    answered = next((named[name] for name in (*_LABELS, *_ANSWERED) if name in named), None)
    asked = next((named[name] for name in (*_ASKED, *_TEXTS) if name in named and named[name] != answered), None)
    if asked is None or answered is None or {"instruction", "output"} <= named.keys():
        return None
    return asked, answered


def describe_style(settings: DataSettings) -> str:
    """What was found, for a person."""
    named = {
        "completion": f"prompts in {settings.prompt!r}, targets in {settings.target!r}",
        "alpaca": "instructions and outputs",
        "chat": f"conversations in {settings.messages!r}",
        "text": f"plain text in {settings.target!r}",
    }
    return f"data.style: auto found {named[settings.style]} (style {settings.style})"


def _read_sides(settings: DataSettings, columns: Sequence[str], first: Row, source: str) -> DataSettings:
    """Prompt and completion are texts or messages."""
    if isinstance(first.get("label"), bool):
        why = "completions with a label that is true or false are for training on preferences (objective.kind: kto)"
        raise _refuse(why, columns, first, source)
    sides = [first.get(name) for name in ("prompt", "completion")]
    if any(isinstance(side, list) or (isinstance(side, str) and side.lstrip().startswith("[{")) for side in sides):
        return settings.model_copy(update={"style": "chat"})
    return settings.model_copy(update={"style": "completion", "prompt": "prompt", "target": "completion"})


def _refuse(why: str, columns: Sequence[str], first: Row, source: str) -> UsageError:
    """What to set, with the columns that are there."""
    asked = next((name for name in _ASKED if name in columns), "")
    if "chosen" in columns:
        chosen = first.get("chosen")
        if isinstance(chosen, list):
            remedy = "to learn the chosen answers set data.messages: chosen"
        elif isinstance(chosen, dict):
            remedy = "to learn the chosen answers write each as the last message of its conversation"
        else:
            prompt = f"data.prompt: '{{{asked}}}' and " if asked else ""
            remedy = f"to learn the chosen answers set {prompt}data.target: '{{chosen}}'"
    else:
        asked = asked or columns[0]
        answered = next((name for name in _ANSWERED if name in columns and name != asked), columns[-1])
        remedy = (
            f"name what is learned, for example data.prompt: '{{{asked}}}\\n' and data.target: '{{{answered}}}', or "
            "the column of conversations by data.messages"
        )
    return UsageError(f"data.style: {why}; {remedy}\n{_list(columns, source)}")


def _list(columns: Sequence[str], source: str) -> str:
    return f"columns of {source}: {', '.join(columns)}"
