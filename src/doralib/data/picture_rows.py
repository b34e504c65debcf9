"""Rows with pictures, in the layouts that people bring: each is a conversation with its pictures in their places."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from ..errors import UsageError, did_you_mean
from ..recipe import DataSettings
from .conversations import Conversation, Message, find_column, parse_messages, read_conversation
from .detect import guess_pair
from .pictures import ENDINGS, Picture, find_picture, is_picture_name
from .prepare import BadRow, Row
from .prompts import fill_prompt
from .templates import columns_in, value_text

ASK_FOR_CAPTION = "Describe this picture in one sentence."
"""What is asked of a picture with a caption, where data.prompt says nothing else."""

_COLUMNS = ("images", "image", "pictures", "picture", "file_name", "image_path", "img", "photo", "filename", "path")
_CAPTIONS = ("caption", "captions", "text", "description", "sentence", "sentences")
_PLACE = "<image>"
_MARK = "\ue0f1"
"""Stands for a picture while a conversation is read as text; no text holds this character."""


@dataclass(frozen=True)
class PictureRow:
    """A conversation whose contents are texts, or lists of parts where pictures stand in them."""

    talk: Conversation
    pictures: tuple[Picture, ...]
    """In the order of their places."""


def find_layout(settings: DataSettings, columns: Sequence[str], first: Row, source: str) -> DataSettings:
    """The settings with the layout that rows of these columns have, and the columns of its parts.

    Raises:
        UsageError: if the columns fit no layout, or lack what was named.
    """
    images = settings.images or _find_pictures(columns, first)
    talk = find_column(settings.messages, columns)
    layout = {"auto": None, "llava": "messages"}.get(settings.layout, settings.layout)
    pair = guess_pair([name for name in columns if name != images])
    captions = next((name for name in _CAPTIONS if name in columns and name != images), None)
    if layout is None and talk is not None and settings.prompt is None and settings.target is None:
        layout = "messages"
    asks = settings.target is not None or (pair is not None and pair[0] != captions and pair[1] != captions)
    layout = layout or ("vqa" if asks else "caption" if captions else None)
    if layout is None:
        raise UsageError(
            f"data.layout: auto cannot tell from the columns what a row is; name the columns by data.images, "
            f"data.prompt and data.target\n  columns of {source}: {', '.join(columns)}"
        )
    made: dict[str, Any] = {"layout": layout, "images": images, "style": "chat"}
    if layout == "messages":
        made["messages"] = talk or settings.messages
    elif layout == "caption":
        made |= {"prompt": settings.prompt or ASK_FOR_CAPTION, "target": settings.target or captions or "caption"}
    else:
        asked, answered = pair or ("question", "answer")
        made |= {"prompt": settings.prompt or asked, "target": settings.target or answered}
    found = settings.model_copy(update=made)
    _check_columns(found, columns, source)
    return found


def describe_layout(settings: DataSettings) -> str:
    """What a row is, for a person."""
    words = {
        "messages": f"conversations in {settings.messages!r}",
        "caption": f"captions in {settings.target!r}, asked for by {settings.prompt!r}",
        "vqa": f"questions in {settings.prompt!r}, answers in {settings.target!r}",
    }
    pictures = f"pictures in {settings.images!r}" if settings.images else "pictures in the messages"
    return f"{words[settings.layout]}, {pictures}"


def _find_pictures(columns: Sequence[str], first: Row) -> str | None:
    """The column of pictures: by its usual names, or by what it holds."""
    named = [name for name in _COLUMNS if name in columns]
    holding = [name for name in (*named, *columns) if is_picture_name(first.get(name))]
    return next(iter([*holding, *(name for name in named if name in _COLUMNS[:4])]), None)


def _check_columns(settings: DataSettings, columns: Sequence[str], source: str) -> None:
    needed: dict[str, list[str]] = {"data.images": [settings.images] if settings.images else []}
    if settings.layout == "messages":
        needed["data.messages"] = [settings.messages]
    else:
        if not settings.images:
            raise UsageError(
                f"data.images: no column of {source} holds names of pictures; name the one that does\n"
                f"  columns of {source}: {', '.join(columns)}"
            )
        needed["data.target"] = columns_in(settings.target or "", "data.target")
        needed["data.prompt"] = _list_asked(settings, columns)
    problems = [
        f"{setting}: {source} has no column {name!r}{did_you_mean(name, columns)}"
        for setting, names in needed.items()
        for name in names
        if name not in columns
    ]
    if problems:
        raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(columns)}"]))


def _list_asked(settings: DataSettings, columns: Sequence[str]) -> list[str]:
    """The columns of a question; of a caption the question may be a plain text, which names none."""
    asked = settings.prompt or ""
    plain = settings.layout == "caption" and not {"{", "}"} & set(asked) and asked not in columns
    return [] if plain else columns_in(asked, "data.prompt")


def read_picture_row(row: Row, settings: DataSettings, root: Path) -> PictureRow:
    """The conversation in a row, and its pictures, which are not opened.

    Args:
        settings: With the layout found.
        root: Where relative paths of pictures begin.

    Raises:
        BadRow: if it has no answer to learn, or not as many pictures as places for them.
    """
    given = _read_column(row, settings, root)
    if settings.layout == "messages":
        return _read_talk(row, settings, given, root)
    if not given:
        raise BadRow("without its picture", f"nothing in {settings.images!r}")
    asked = settings.prompt or ""
    if _list_asked(settings, list(row)):
        asked = fill_prompt(asked, row, "data.prompt")
    answer = _read_answer(row, settings.target or "")
    if not answer.strip():
        raise BadRow("empty", f"nothing in {settings.target!r}")
    parts = [*({"type": "image"} for _ in given), {"type": "text", "text": asked.replace(_PLACE, "").strip()}]
    messages: list[Message] = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return PictureRow(Conversation(messages, [False, True]), tuple(given))


def ask_with_pictures(text: str, pictures: Sequence[Picture], system: str = "") -> PictureRow:
    """A question, with the pictures where it has places for them, else before it."""
    marked = text.replace(_PLACE, _MARK) if _PLACE in text else _MARK * len(pictures) + text
    told = [{"role": "system", "content": system}] if system else []
    messages: list[Message] = [*told, {"role": "user", "content": _split(marked)}]
    if marked.count(_MARK) != len(pictures):
        raise _tell_uneven(marked.count(_MARK), len(pictures))
    return PictureRow(Conversation(messages, [False] * len(messages)), tuple(pictures))


def _tell_uneven(places: int, pictures: int) -> BadRow:
    told = f"pictures: {pictures}, places for them ({_PLACE}): {places}"
    return BadRow("with another number of pictures than of places for them", told)


def _read_column(row: Row, settings: DataSettings, root: Path) -> list[Picture]:
    """The pictures in a row's own column."""
    value = row.get(settings.images) if settings.images else None
    if value is None or value == "" or value == []:
        return []
    return [find_picture(each, root) for each in (value if isinstance(value, list | tuple) else [value])]


def _read_talk(row: Row, settings: DataSettings, given: list[Picture], root: Path) -> PictureRow:
    waiting = list(given)
    messages: list[Message] = []
    pictures: list[Picture | None] = []
    for message in parse_messages(row[settings.messages], settings.messages):
        marked, found = _mark_pictures(message, waiting, root)
        messages.append(marked)
        pictures += found
    if not pictures and given:
        first = next((message for message in messages if _name_role(message) in ("user", "human")), None)
        if first is not None:
            key = next(key for key in ("content", "value", "text") if key in first)
            first[key], pictures, waiting = f"{_MARK * len(given)}{_as_text(first[key])}", [*given], []
    if waiting or None in pictures:
        raise _tell_uneven(len(pictures), len(given))
    talk = read_conversation({**row, settings.messages: messages}, settings.messages)
    split = [{**message, "content": _split(message["content"])} for message in talk.messages]
    return PictureRow(replace(talk, messages=split), tuple(picture for picture in pictures if picture is not None))


def _mark_pictures(message: Message, waiting: list[Picture], root: Path) -> tuple[Message, list[Picture | None]]:
    """The message with a mark in the place of each picture, and the pictures; None: there is none left for it."""
    key = next((key for key in ("content", "value", "text") if message.get(key) is not None), None)
    if key is None or _name_role(message) in ("assistant", "gpt", "model"):
        return message, []
    take = lambda: waiting.pop(0) if waiting else None
    content = message[key]
    if isinstance(content, str):
        found: list[Picture | None] = [take() for _ in range(content.count(_PLACE))]
        return {**message, key: content.replace(_PLACE, _MARK)}, found
    parts, found = [], []
    for given in content if isinstance(content, list) else [content]:
        part = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given
        if isinstance(part, dict) and part.get("type") in ("video", "audio", "video_url", "input_audio"):
            raise BadRow(f"with {part['type']}", "pictures and texts alone are read")
        if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
            parts.append(part)
            continue
        own = {name: value for name, value in part.items() if name != "type"}
        found.append(find_picture(own, root) if own else take())
        parts.append({"type": "text", "text": _MARK})
    return {**message, key: parts}, found


def _name_role(message: Message) -> str:
    return str(message.get("role", message.get("from"))).lower()


def _as_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content)


def _split(content: Any) -> Any:
    """A content with marks as parts: texts, without the line ends around a picture, and pictures."""
    if not isinstance(content, str) or _MARK not in content:
        return content
    parts: list[dict[str, Any]] = []
    for piece in re.split(f"({_MARK})", content):
        if piece == _MARK:
            parts.append({"type": "image"})
        elif text := piece.strip("\n"):
            parts.append({"type": "text", "text": text})
    return parts


def _read_answer(row: Row, target: str) -> str:
    """The answer in a column or a template; of several answers the one that most give."""
    value = row[target] if target in row else fill_prompt(target, row, "data.target")
    if isinstance(value, list | tuple):
        said = [value_text(each.get("answer") if isinstance(each, Mapping) else each) for each in value]
        value = Counter(said).most_common(1)[0][0] if said else ""
    return value_text(value)


def list_captioned(source: str) -> datasets.Dataset | None:
    """A folder's pictures that have a text of the same name beside them; None where there are none.

    Columns image, the path within the folder, and caption.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    pairs = [
        (file, text)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in ENDINGS and (text := file.with_suffix(".txt")).is_file()
    ]
    if not pairs:
        return None
    captions = [text.read_text(encoding="utf-8", errors="replace").strip() for _, text in pairs]
    names = [file.relative_to(folder).as_posix() for file, _ in pairs]
    return datasets.Dataset.from_dict({"image": names, "caption": captions})
