"""Conversations by their form: rows as OpenAI, ShareGPT, Alpaca and others write them, as messages of one form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .json_rows import parse_json
from .prepare import BadRow, Row
from .templates import value_text

Message = dict[str, Any]

COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Names of columns that hold a conversation."""

_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call", "tool_calls")
_SWITCHES = ("weight", "train", "training", "loss")
"""Keys of a message that say whether it is learned."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("reasoning", "thinking")
_MEDIA_PARTS = ("image", "audio", "video", "file")


class WrittenArguments(dict[str, Any]):
    """A tool call's arguments that were given as a text."""

    written: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content, as chat templates take them, and what belongs to them."""

    messages: list[Message]
    """A tool call's arguments are an object where they can be."""
    learned: list[bool]
    """For each message: is it an answer to learn?"""
    tools: list[Any] | None = None
    options: Mapping[str, Any] | None = None
    """Further variables of the chat template, by row: the column `chat_template_kwargs`."""


def find_column(column: str, columns: Sequence[str]) -> str | None:
    """The column of the conversation: the one asked for, or where none was the first of the usual names."""
    return next((name for name in (COLUMNS if column == COLUMNS[0] else (column,)) if name in columns), None)


def read_conversation(row: Row, column: str, *, learn_all: bool = False) -> Conversation:
    """The conversation in a row: in a column of that or a usual name, or in prompt and completion, or as Alpaca has it.

    Answers within a prompt are learned with `learn_all` only.

    Raises:
        BadRow: if it has no answer to learn, or a form that is not known.
    """
    name = find_column(column, list(row))
    if name is not None:
        messages = read_messages(row[name], name)
        learned = [_is_learned(message) for message in messages]
    elif "completion" in row:
        prompt, answer = (_read_side(row.get(key), key) for key in ("prompt", "completion"))
        messages = prompt + answer
        learned = [_is_learned(m) and (learn_all or i >= len(prompt)) for i, m in enumerate(messages)]
    else:
        messages = _read_alpaca(row)
        learned = [message["role"] == "assistant" for message in messages]
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant" and _says_something(message)]
    if not said:
        raise BadRow("empty", "the assistant says nothing")
    if not any(learned[i] for i in said):
        raise BadRow("empty", "none of the assistant's turns is to be learned")
    system = next((text for key in ("system", "system_prompt") if (text := row.get(key)) and isinstance(text, str)), "")
    if system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages, learned = [{"role": "system", "content": system}, *messages], [False, *learned]
    options = row.get("chat_template_kwargs")
    return Conversation(
        [{key: value for key, value in message.items() if key not in _SWITCHES} for message in messages],
        learned,
        _read_tools(row),
        _read_json(options, "chat_template_kwargs") if options else None,
    )


def _read_side(value: Any, column: str) -> list[Message]:
    """A prompt or a completion: messages, or the text of one."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": "user" if column == "prompt" else "assistant", "content": value}]
    return read_messages(value, column)


def _read_alpaca(row: Row) -> list[Message]:
    """History, an instruction with its input, and the output, as Alpaca names them."""
    asked = "\n".join(text for key in ("instruction", "input") if (text := value_text(row.get(key))).strip())
    turns = [*read_history(row), (asked, value_text(row.get("output")))]
    if not asked or not turns[-1][1].strip():
        raise BadRow("empty", "nothing in instruction or output")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def read_history(row: Row) -> list[tuple[str, str]]:
    """The earlier questions and answers in Alpaca's column `history`.

    Raises:
        BadRow: if it is not a list of pairs of texts.
    """
    history = _read_json(row.get("history") or [], "history")
    pairs = isinstance(history, list) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise BadRow("malformed", "column 'history' is not a list of [question, answer]")
    return [(question, answer) for question, answer in history]


def read_messages(value: Any, column: str) -> list[Message]:
    """The messages in a column, as chat templates take them.

    Raises:
        BadRow: if they have a form that is not known.
    """
    return [made for message in parse_messages(value, column) for made in _read_message(message, column)]


def parse_messages(value: Any, column: str) -> list[Message]:
    """The messages in a column as they are written, each without the keys that it does not have.

    Raises:
        BadRow: if they are no list of objects.
    """
    if isinstance(value, str) and value.strip():
        value = _read_json(value, column)
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        # `datasets` turns a list of objects into an object of lists
        value = [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=False)]
    if not value:
        raise BadRow("empty", f"no messages in {column!r}")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow("malformed", f"column {column!r} is not a list of {{role, content}} or {{from, value}}")
    # a column's rows share their keys in Arrow, so one row's key is None in all others
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _read_message(given: Message, column: str) -> list[Message]:
    """One message; tool results within a user's words are messages of their own."""
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or not role.strip():
        raise BadRow("malformed", f"a message in {column!r} lacks the text of its role (`role` or `from`)")
    kind = role.strip().lower()
    said = next((given[key] for key in ("content", "value", "text") if key in given), None)
    rest = {key: value for key, value in given.items() if key not in ("role", "from", "content", "value", "text")}
    if kind in _CALLS:
        return [{"role": "assistant", "content": None, "tool_calls": _read_calls(said), **rest}]
    known = (*_ROLES.values(), "system", "developer")
    message = {"role": _ROLES.get(kind, kind if kind in known else role), "content": said, **rest}
    results: list[Message] = []
    if isinstance(said, list):
        results = _read_parts(message, said, column)
    given_calls = [message.pop(key) for key in ("tool_calls", "function_call") if message.get(key)]
    calls = [call for one in given_calls for call in _as_list(_read_json(one, "a tool call"))]
    if calls:
        message["tool_calls"] = _read_calls(calls)
    elif not message.get("tool_calls"):
        message.pop("tool_calls", None)
    if message["content"] is None and not _says_something(message) and not results:
        raise BadRow("malformed", f"a message in {column!r} lacks the text of its content (`content` or `value`)")
    if message["role"] == "tool" and isinstance(message["content"], dict):
        message["content"] = json.dumps(message["content"], ensure_ascii=False)
    if message["content"] is not None and not isinstance(message["content"], str):
        raise BadRow(
            "malformed", f"a message in {column!r} has a {type(message['content']).__name__} as content, not text"
        )
    return results if results and not message["content"] else [*results, message]


def _read_parts(message: Message, parts: list[Any], column: str) -> list[Message]:
    """Put the parts of a content where they belong in the message; returns the tool results among them."""
    texts, thoughts, calls, results = [], [], [], []
    for given in parts:
        part = _read_part(given, column)
        if part["type"] in _TEXT_PARTS:
            texts.append(part["value"])
        elif part["type"] in _THOUGHT_PARTS:
            thoughts.append(part["value"])
        elif part["type"] == "tool_result":
            answer = {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": part["value"]}
            results += _read_message({key: one for key, one in answer.items() if one is not None}, column)
        elif part["type"] == "tool_use":
            calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
        else:
            calls.append(part["value"])
    message["content"] = "".join(texts) if texts or not calls else None
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return results


def list_texts(content: Any) -> list[str]:
    """The texts of a content: itself, or those among its parts."""
    if isinstance(content, list):
        return [part["text"] for part in content if part["type"] == "text"]
    return [] if content is None else [content]


def _read_part(part: Any, column: str) -> Message:
    """A part of a content with its type, and what it says under `value`."""
    given = {"type": "text", "text": part} if isinstance(part, str) else part
    given = {key: one for key, one in given.items() if one is not None} if isinstance(given, dict) else {}
    kind = str(given.get("type", "text"))
    value = next((given[key] for key in (kind, "text", "value", "content") if key in given), None)
    if any(medium in kind for medium in _MEDIA_PARTS):
        raise BadRow("malformed", f"a message in {column!r} has a part of type {kind!r}, and text alone is read")
    text = kind in (*_TEXT_PARTS, *_THOUGHT_PARTS)
    if not (text and isinstance(value, str)) and kind not in ("tool_call", "tool_use", "tool_result"):
        raise BadRow("malformed", f"a message in {column!r} has a part of type {kind!r} that cannot be read")
    return {**given, "type": kind, "value": value}


def _read_calls(value: Any) -> list[Message]:
    """Tool calls as templates take them: `{"type": "function", "function": {"name", "arguments"}}`."""
    made = []
    for call in _as_list(_read_json(value, "a tool call")):
        call = _read_json(call, "a tool call")
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("malformed", "a tool call has no name of a function")
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str) and arguments.strip():
            arguments = _read_arguments(arguments)
        outer = {key: one for key, one in call.items() if key in ("id", "index") and one is not None}
        made.append({**outer, "type": "function", "function": {"name": inner["name"], "arguments": arguments or {}}})
    return made


def _read_tools(row: Row) -> list[Any] | None:
    """The tools that a conversation may use, each as `{"type": "function", "function": {...}}`."""
    value = next((row[key] for key in ("tools", "functions") if row.get(key)), None)
    if value is None:
        return None
    tools = [_read_json(tool, "tools") for tool in _as_list(_read_json(value, "tools"))]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("malformed", "column 'tools' is not a list of objects")
    wrap = lambda tool: {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
    return [wrap(tool) for tool in tools] or None


def _is_learned(message: Message) -> bool:
    """Is a message learned: an assistant's turn, unless a key of it says otherwise?"""
    answer = message["role"] == "assistant"
    said = {key: message[key] for key in _SWITCHES if key in message}
    if "train_detail" in message:
        raise BadRow("malformed", "train_detail marks parts of a message, which is not read; split the message instead")
    if unknown := [f"{key}: {value}" for key, value in said.items() if value not in (0, 1)]:
        raise BadRow("malformed", f"a message has {', '.join(unknown)}; it is learned or not, 1 or 0")
    if said and len(set(map(bool, said.values()))) > 1:
        raise BadRow("malformed", f"a message has {' and '.join(said)}, which say different things")
    if said and not answer and any(said.values()) and not said.get("weight"):
        raise BadRow("malformed", f"a message of {message['role']!r} is to be learned, and only the assistant's are")
    return answer and all(said.values())


def _says_something(message: Message) -> bool:
    return bool((message["content"] or "").strip() or message.get("tool_calls"))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_json(value: Any, what: str) -> Any:
    """The value of a JSON text; what is no text is a value already."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else []
    except ValueError as error:
        raise BadRow("malformed", f"{what} is not JSON: {error}") from None


def _read_arguments(text: str) -> Any:
    """The object in a text, which it remembers; a text that holds none stays one."""
    try:
        value = parse_json(text)
    except ValueError:
        return text
    if not isinstance(value, dict):
        return text
    made = WrittenArguments(value)
    made.written = text
    return made
