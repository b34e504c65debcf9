"""Prompt styles: how a row of data becomes one text, with what is learned of it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal

from transformers import PreTrainedTokenizerBase as Tokenizer

from ..recipe import DataSettings
from .chat import render_conversation
from .conversations import read_conversation, read_history
from .prepare import BadRow, RenderedRow, Row, Sample
from .templates import columns_in, fill_template, value_text

# a word that goes on, or one behind a mark; scripts without blanks between words do as they are
_GLUED = re.compile(r"[A-Za-z0-9\u00c0-\u024f\u0370-\u04ff:.,;!?)][A-Za-z0-9\u00c0-\u024f\u0370-\u04ff]")
_SCALARS = (str, int, float, Decimal, date, time, type(None))


@dataclass(frozen=True)
class Style:
    """How a row becomes text."""

    render: Callable[[Row, DataSettings, Tokenizer], RenderedRow]
    closed: bool = False
    """The text spells its own start and end tokens."""


def render_row(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> RenderedRow:
    """A row as the text that the model gets, and which stretches of it are learned; the style is not auto.

    Raises:
        BadRow: if the row is empty or malformed.
        UsageError: if the tokenizer cannot do the style.
    """
    made = STYLES[settings.style].render(row, settings, tokenizer)
    try:
        made.text.encode()
    except UnicodeEncodeError as error:
        code = ord(made.text[error.start])
        raise BadRow(
            "malformed",
            f"the character {code:#x} near {made.text[max(0, error.start - 20) : error.start]!r} is half "
            "of a pair, and no text",
        ) from None
    return made


def explain_glue(samples: Sequence[Sample], settings: DataSettings, place: int | None = None) -> str:
    """A warning where a target begins in the middle of the prompt's last word, with the example; else nothing.

    Args:
        place: Of the set among several in `data.train`.
    """
    if settings.style != "completion" or not settings.prompt:
        return ""
    for sample in samples:
        if _GLUED.search(f"{sample.prompt[-1:]}{sample.expected[:1]}"):
            seam = f"{sample.prompt[-20:]}{sample.expected[:20]}"
            where = "data.target" if place is None else f"data.train[{place}].target"
            target = str(settings.target)
            better = f" {target if '{' in target else f'{{{target}}}'}"
            return (
                f"the target follows its prompt without a blank, as in {seam!r}, where models expect one; "
                f"write {where}: {better!r}"
            )
    return ""


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, _SCALARS):
        raise BadRow("malformed", f"column {column!r} holds a {type(value).__name__}, not text")
    return value_text(value)


def fill_prompt(template: str, row: Row, setting: str) -> str:
    """The template with the row's values; `setting` says where it stands.

    Raises:
        BadRow: if the row has none of the values.
    """
    columns = columns_in(template, setting)
    values = {column: _text(row, column) for column in columns}
    if not any(value.strip() for value in values.values()):
        raise BadRow("empty", f"nothing in {', '.join(columns)}")
    return fill_template(template, values)


def _join(pieces: Sequence[tuple[str, bool]], settings: DataSettings) -> RenderedRow:
    """Texts one after the other, each with whether it is learned."""
    spans, place = [], 0
    for text, learned in pieces:
        if learned or settings.loss_on == "all":
            spans.append((place, place + len(text)))
        place += len(text)
    return RenderedRow("".join(text for text, _ in pieces), tuple(spans))


def _completion(row: Row, settings: DataSettings, _: Tokenizer) -> RenderedRow:
    """Prompt and target from columns or templates; without a prompt it is plain language modeling."""
    assert settings.target is not None, "checked by check_columns"
    prompt = [] if settings.prompt is None else [(fill_prompt(settings.prompt, row, "data.prompt"), False)]
    return _join([*prompt, (fill_prompt(settings.target, row, "data.target"), True)], settings)


def _plain(row: Row, settings: DataSettings, _: Tokenizer) -> RenderedRow:
    """A text that is learned from its first word on."""
    return _join([(fill_prompt(settings.target or "text", row, "data.target"), True)], settings)


_ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
)


def _alpaca(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> RenderedRow:
    """Stanford Alpaca's prompt; input may be missing or empty, history and system too.

    Earlier answers are learned too, each with the end-of-text token; a system text stands in the place of the first
    paragraph.
    """
    instruction, output = fill_prompt("instruction", row, "instruction"), fill_prompt("output", row, "output")
    given = _text(row, "input") if "input" in row else ""
    system = _text(row, "system").strip() if "system" in row else ""
    also = ", paired with an input that provides further context" if given.strip() else ""
    shown = f"### Input:\n{given}\n\n" if given.strip() else ""
    pieces = [(f"{system or _ALPACA.format(also=also)}\n\n", False)]
    for question, answer in read_history(row):
        pieces += [
            (f"### Instruction:\n{question}\n\n### Response:\n", False),
            (f"{answer}{tokenizer.eos_token or ''}", True),
            ("\n\n", False),
        ]
    asked = f"### Instruction:\n{instruction}\n\n{shown}### Response:\n"
    return _join([*pieces, (asked, False), (output, True)], settings)


def _chat(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> RenderedRow:
    """The conversation in the tokenizer's own template, the assistant's turns learned."""
    learn_all = settings.loss_on == "all"
    talk = read_conversation(row, settings.messages, learn_all=learn_all)
    return render_conversation(talk, tokenizer, learn_all=learn_all)


STYLES: dict[str, Style] = {
    "completion": Style(_completion),
    "alpaca": Style(_alpaca),
    "chat": Style(_chat, closed=True),
    "text": Style(_plain),
}
"""How rows become text, by the name that recipes use; what columns each reads is in `columns.py`."""
