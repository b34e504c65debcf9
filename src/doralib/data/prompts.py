"""Prompt styles: how a row of data becomes text, piece by piece, with the pieces to learn marked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError, did_you_mean
from ..recipe import DataSettings
from .prepare import BadRow, Row
from .templates import columns_in, fill_template


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text; each is tokenized by itself, so that a prompt has the tokens it has in use."""

    text: str
    learned: bool
    """Its tokens are labels also when only the completion counts."""


@dataclass(frozen=True)
class Style:
    """How a row becomes text."""

    needs: Callable[[DataSettings, Sequence[str]], dict[str, list[str]]]
    """(settings, columns of the data) to the columns that must be there, by the setting that names them."""
    pieces: Callable[[Row, DataSettings, Tokenizer], list[Piece]]
    settings: tuple[str, ...] = ()
    """The fields of `DataSettings` that it alone reads."""
    closed: bool = False
    """The text spells its own start and end tokens."""


def check_columns(settings: DataSettings, columns: Sequence[str], source: str) -> None:
    """Check that the style is known and its columns are all there.

    Raises:
        UsageError: with every column that is missing, the nearest names and those that there are.
    """
    if settings.style not in STYLES:
        hint = did_you_mean(settings.style, STYLES)
        raise UsageError(f"data.style: there is no style {settings.style!r}{hint}; known: {', '.join(STYLES)}")
    style = STYLES[settings.style]
    problems = [
        f"data.{name}: style {settings.style} does not read it"
        for name in ("prompt", "target", "messages")
        if name not in style.settings and getattr(settings, name) != DataSettings.model_fields[name].default
    ]
    for setting, needed in style.needs(settings, columns).items():
        problems += [
            f"{setting}: {source} has no column {name!r}{did_you_mean(name, columns)}"
            for name in needed
            if name not in columns
        ]
    if problems:
        raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(columns)}"]))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, (str, int, float)):
        raise BadRow("malformed", f"column {column!r} holds a {type(value).__name__}, not text")
    return str(value)


def _fill(template: str, row: Row, setting: str) -> str:
    """The template with the row's values; a row that has none of them is empty."""
    columns = columns_in(template, setting)
    values = {column: _text(row, column) for column in columns}
    if not any(value.strip() for value in values.values()):
        raise BadRow("empty", f"nothing in {', '.join(columns)}")
    return fill_template(template, values)


def _completion_needs(settings: DataSettings, _: Sequence[str]) -> dict[str, list[str]]:
    if settings.target is None:
        raise UsageError("data.target: style completion needs it, a column's name or a template like ' {label}'")
    named = {"data.prompt": settings.prompt, "data.target": settings.target}
    return {key: columns_in(text, key) for key, text in named.items() if text is not None}


def _completion(row: Row, settings: DataSettings, _: Tokenizer) -> list[Piece]:
    """Prompt and target from columns or templates; without a prompt it is plain language modeling."""
    assert settings.target is not None, "checked by check_columns"
    prompt = [] if settings.prompt is None else [Piece(_fill(settings.prompt, row, "data.prompt"), learned=False)]
    return [*prompt, Piece(_fill(settings.target, row, "data.target"), learned=True)]


_ALPACA = (
    "Below is an instruction that describes a task{also}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def _alpaca(row: Row, _: DataSettings, __: Tokenizer) -> list[Piece]:
    """Stanford Alpaca's prompt; the column input may be missing or empty."""
    instruction, output = _fill("instruction", row, "instruction"), _fill("output", row, "output")
    given = _text(row, "input") if "input" in row else ""
    also = ", paired with an input that provides further context" if given.strip() else ""
    shown = f"### Input:\n{given}\n\n" if given.strip() else ""
    return [Piece(_ALPACA.format(also=also, instruction=instruction, input=shown), False), Piece(output, True)]


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    messages = row[column]
    if not messages:
        raise BadRow("empty", f"no messages in {column!r}")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("malformed", f"column {column!r} is not a list of {{role, content}}")
    # a column's rows share their keys in Arrow, so one row's key is None in all others
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if not all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
        raise BadRow("malformed", f"a message in {column!r} lacks the text of its role or content")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise BadRow("empty", "the assistant says nothing")
    return messages


def _chat(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> list[Piece]:
    """The conversation in the tokenizer's own template, the assistant's turns learned."""
    if not tokenizer.chat_template:
        raise UsageError(
            "data.style: chat needs a chat template, and this model's tokenizer has none; use style completion or "
            "alpaca, or a model tuned for chat"
        )
    messages = _messages(row, settings.messages)
    try:
        text = _render(tokenizer, messages)
        if settings.loss_on == "all":
            return [Piece(text, learned=True)]
        spans = [
            _span(tokenizer, messages, turn, text)
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    except TemplateError as error:
        raise BadRow("malformed", f"the chat template refuses it: {error}") from None
    pieces, place = [], 0
    for start, end in spans:
        pieces += [Piece(text[place:start], learned=False), Piece(text[start:end], learned=True)]
        place = end
    return [piece for piece in [*pieces, Piece(text[place:], learned=False)] if piece.text]


def _render(tokenizer: Tokenizer, messages: Sequence[Row], open_turn: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn))


def _span(tokenizer: Tokenizer, messages: Sequence[Row], turn: int, text: str) -> tuple[int, int]:
    """Start and end of an assistant's turn in the whole text, found by rendering what comes before and with it."""
    if turn == 0:
        raise BadRow("malformed", "the conversation begins with the assistant")
    upto = _render(tokenizer, messages[: turn + 1])
    # a template may open the answer with words that a past answer does not have, such as <think>
    befores = (_render(tokenizer, messages[:turn], open_turn=True), _render(tokenizer, messages[:turn]))
    before = next((before for before in befores if upto.startswith(before)), None)
    if before is None or not text.startswith(upto):
        raise UsageError(
            f"this tokenizer's chat template rewrites earlier turns (the text up to turn {turn + 1} is not how the "
            "whole conversation begins), so the assistant's words cannot be told from the rest; "
            "use data.loss_on: all, conversations of one answer, or another style"
        )
    return len(before), len(upto)


STYLES: dict[str, Style] = {
    "completion": Style(_completion_needs, _completion, settings=("prompt", "target")),
    "alpaca": Style(lambda *_: {"style alpaca": ["instruction", "output"]}, _alpaca),
    "chat": Style(lambda s, _: {"data.messages": [s.messages]}, _chat, settings=("messages",), closed=True),
}
"""How rows become text, by the name that recipes use."""
