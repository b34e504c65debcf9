"""Rows with pictures and videos, in the layouts that people bring: conversations with these in their places."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from .videos import Video, find_video, is_video_name

ASK_FOR_CAPTION = "Describe this picture in one sentence."
"""What is asked of a picture with a caption, where data.prompt says nothing else."""

_COLUMNS = ("images", "image", "pictures", "picture", "file_name", "image_path", "img", "photo", "filename", "path")
_CAPTIONS = ("caption", "captions", "text", "description", "sentence", "sentences")
_VIDEO_COLUMNS = ("videos", "video", "video_path")
_PLACES = {"<image>": "\ue0f1", "<video>": "\ue0f2"}
"""What stands in a text for a picture or a video, and for it while a conversation is read; no text holds the latter."""
_TYPES = {"\ue0f1": "image", "\ue0f2": "video"}
_MARKS = "".join(_TYPES)

Seen = Picture | Video
"""What a row shows."""


@dataclass(frozen=True)
class PictureRow:
    """A conversation whose contents are texts, or lists of parts where pictures stand in them."""

    talk: Conversation
    pictures: tuple[Seen, ...]
    """Videos too, in the order of their places."""


def find_layout(settings: DataSettings, columns: Sequence[str], first: Row, source: str) -> DataSettings:
    """The settings with the layout that rows of these columns have, and the columns of its parts.

    Raises:
        UsageError: if the columns fit no layout, or lack what was named.
    """
    videos = settings.videos or _find_videos(columns, first)
    images = settings.images or _find_pictures([name for name in columns if name != videos], first)
    talk = find_column(settings.messages, columns)
    layout = {"auto": None, "llava": "messages"}.get(settings.layout, settings.layout)
    pair = guess_pair([name for name in columns if name not in (images, videos)])
    captions = next((name for name in _CAPTIONS if name in columns and name not in (images, videos)), None)
    if layout is None and talk is not None and settings.prompt is None and settings.target is None:
        layout = "messages"
    asks = settings.target is not None or (pair is not None and pair[0] != captions and pair[1] != captions)
    layout = layout or ("vqa" if asks else "caption" if captions else None)
    if layout is None:
        raise UsageError(
            f"data.layout: auto cannot tell from the columns what a row is; name the columns by data.images, "
            f"data.prompt and data.target\n  columns of {source}: {', '.join(columns)}"
        )
    made: dict[str, Any] = {"layout": layout, "images": images, "videos": videos, "style": "chat"}
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
    named = {"pictures": settings.images, "videos": settings.videos}
    seen = " and ".join(f"{what} in {column!r}" for what, column in named.items() if column)
    return f"{words[settings.layout]}, {seen or 'pictures in the messages'}"


def _find_pictures(columns: Sequence[str], first: Row) -> str | None:
    """The column of pictures: by its usual names, or by what it holds."""
    named = [name for name in _COLUMNS if name in columns]
    holding = [name for name in (*named, *columns) if is_picture_name(first.get(name))]
    return next(iter([*holding, *(name for name in named if name in _COLUMNS[:4])]), None)


def _find_videos(columns: Sequence[str], first: Row) -> str | None:
    """The column of videos: by its usual names, or by what it holds."""
    holding = [name for name in (*_VIDEO_COLUMNS, *columns) if is_video_name(first.get(name))]
    return next(iter([*holding, *(name for name in _VIDEO_COLUMNS if name in columns)]), None)


def _check_columns(settings: DataSettings, columns: Sequence[str], source: str) -> None:
    named = {"data.images": settings.images, "data.videos": settings.videos}
    needed: dict[str, list[str]] = {setting: [name] if name else [] for setting, name in named.items()}
    if settings.layout == "messages":
        needed["data.messages"] = [settings.messages]
    else:
        if not (settings.images or settings.videos):
            raise UsageError(
                f"data.images: no column of {source} holds names of pictures or videos; name the one that does\n"
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
    """The conversation in a row, and its pictures and videos, which are not opened.

    Args:
        settings: With the layout found.
        root: Where relative paths of pictures begin.

    Raises:
        BadRow: if it has no answer to learn, or not as many pictures as places for them.
    """
    given = _read_columns(row, settings, root)
    if settings.layout == "messages":
        return _read_talk(row, settings, given, root)
    if not given:
        what, column = ("picture", settings.images) if settings.images else ("video", settings.videos)
        raise BadRow(f"without its {what}", f"nothing in {column!r}")
    asked = settings.prompt or ""
    if _list_asked(settings, list(row)):
        asked = fill_prompt(asked, row, "data.prompt")
    answer = _read_answer(row, settings.target or "")
    if not answer.strip():
        raise BadRow("empty", f"nothing in {settings.target!r}")
    for place in _PLACES:
        asked = asked.replace(place, "")
    parts = [*({"type": _TYPES[_mark(each)]} for each in given), {"type": "text", "text": asked.strip()}]
    messages: list[Message] = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return PictureRow(Conversation(messages, [False, True]), tuple(given))


def ask_with_pictures(text: str, pictures: Sequence[Seen], system: str = "") -> PictureRow:
    """A question, with pictures and videos where it has places for them, else before it."""
    marked = _mark_places(text)
    if marked == text:
        marked = "".join(map(_mark, pictures)) + text
    told = [{"role": "system", "content": system}] if system else []
    messages: list[Message] = [*told, {"role": "user", "content": _split(marked)}]
    waiting = list(pictures)
    found = [_take(mark, waiting) for mark in marked if mark in _TYPES]
    return PictureRow(Conversation(messages, [False] * len(messages)), _check_places(found, waiting))


def _mark_places(text: str) -> str:
    for place, mark in _PLACES.items():
        text = text.replace(place, mark)
    return text


def _mark(seen: Seen) -> str:
    return _PLACES["<video>" if isinstance(seen, Video) else "<image>"]


def _take(mark: str, waiting: list[Seen]) -> Seen | None:
    """The next picture, or video, that waits for its place; None: there is none left."""
    at = next((i for i, each in enumerate(waiting) if _mark(each) == mark), None)
    return None if at is None else waiting.pop(at)


def _check_places(found: Sequence[Seen | None], waiting: Sequence[Seen]) -> tuple[Seen, ...]:
    """What stands in the places, each of which has something.

    Raises:
        BadRow: if there are more places, or fewer.
    """
    if not waiting and None not in found:
        return tuple(each for each in found if each is not None)
    given = [each for each in (*found, *waiting) if each is not None]
    what = "videos" if given and all(isinstance(each, Video) for each in given) else "pictures"
    place = "<video>" if what == "videos" else "<image>"
    told = f"{what}: {len(given)}, places for them ({place}): {len(found)}"
    raise BadRow(f"with another number of {what} than of places for them", told)


def _read_columns(row: Row, settings: DataSettings, root: Path) -> list[Seen]:
    """The pictures and videos in a row's own columns."""
    found: list[Seen] = []
    for column, find in ((settings.images, find_picture), (settings.videos, find_video)):
        value = row.get(column) if column else None
        if value is not None and value not in ("", []):
            found += [find(each, root) for each in (value if isinstance(value, list | tuple) else [value])]
    return found


def _read_talk(row: Row, settings: DataSettings, given: list[Seen], root: Path) -> PictureRow:
    waiting = list(given)
    messages: list[Message] = []
    found: list[Seen | None] = []
    for message in parse_messages(row[settings.messages], settings.messages):
        marked, here = _mark_message(message, waiting, root)
        messages.append(marked)
        found += here
    if not found and given:
        first = next((message for message in messages if _name_role(message) in ("user", "human")), None)
        if first is not None:
            key = next(key for key in ("content", "value", "text") if key in first)
            first[key] = f"{''.join(map(_mark, given))}{_as_text(first[key])}"
            found, waiting = [*given], []
    pictures = _check_places(found, waiting)
    talk = read_conversation({**row, settings.messages: messages}, settings.messages)
    split = [{**message, "content": _split(message["content"])} for message in talk.messages]
    return PictureRow(replace(talk, messages=split), pictures)


def _mark_message(message: Message, waiting: list[Seen], root: Path) -> tuple[Message, list[Seen | None]]:
    """The message with a mark in the place of each picture and video, and these; None: there is none left for it."""
    key = next((key for key in ("content", "value", "text") if message.get(key) is not None), None)
    if key is None or _name_role(message) in ("assistant", "gpt", "model"):
        return message, []
    content = message[key]
    if isinstance(content, str):
        marked = _mark_places(content)
        return {**message, key: marked}, [_take(mark, waiting) for mark in marked if mark in _TYPES]
    parts: list[Any] = []
    found: list[Seen | None] = []
    for given in content if isinstance(content, list) else [content]:
        part = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given
        if isinstance(part, dict) and part.get("type") in ("audio", "input_audio"):
            raise BadRow(f"with {part['type']}", "pictures, videos and texts alone are read")
        kind = _PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
        if kind is None:
            parts.append(part)
            continue
        mark, find = kind
        own = {name: value for name, value in part.items() if name != "type"}
        found.append(find(own, root) if own else _take(mark, waiting))
        parts.append({"type": "text", "text": mark})
    return {**message, key: parts}, found


_PARTS: Mapping[str, tuple[str, Callable[[Any, Path], Seen]]] = {
    **dict.fromkeys(("image", "image_url"), (_PLACES["<image>"], find_picture)),
    **dict.fromkeys(("video", "video_url"), (_PLACES["<video>"], find_video)),
}
"""The types of parts that show something: the mark of its place, and what finds it."""


def _name_role(message: Message) -> str:
    return str(message.get("role", message.get("from"))).lower()


def _as_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content)


def _split(content: Any) -> Any:
    """A content with marks as parts: texts, without the line ends around a picture, pictures and videos."""
    if not isinstance(content, str) or not set(_MARKS) & set(content):
        return content
    parts: list[dict[str, Any]] = []
    for piece in re.split(f"([{_MARKS}])", content):
        if piece in _TYPES:
            parts.append({"type": _TYPES[piece]})
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
