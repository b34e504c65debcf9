"""A conversation in a tokenizer's chat template: the form that the template takes, and what is learned of the text."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError
from .answers import REFUSALS, THOUGHTS, ChatTemplate, Span, invert_spans, merge_spans
from .conversations import Conversation, Message, WrittenArguments, list_texts
from .prepare import BadRow, RenderedRow

_Faults = tuple[int, int, int]


def render_conversation(talk: Conversation, tokenizer: Tokenizer, *, learn_all: bool) -> RenderedRow:
    """The whole conversation as the template writes it; learned are the answers, each with what ends its turn.

    Raises:
        UsageError: if the tokenizer has no chat template.
        BadRow: if the template refuses the conversation, or no answer can be found in what it writes.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "data.style: chat needs a chat template, and this model's tokenizer has none; use style completion or "
            "alpaca, or a model tuned for chat"
        )
    template, text = _choose_form(talk, tokenizer)
    answers = [i for i, message in enumerate(template.messages) if message["role"] == "assistant"]
    wanted = [i for i in answers if talk.learned[i] != learn_all]
    found = [span for turn in wanted if (span := template.find_answer(turn, text)) is not None]
    notes = list(_find_omissions(template, text))
    if learn_all:
        if len(found) < len(wanted):
            raise BadRow("malformed", "an answer that is not to be learned cannot be found in what the template writes")
        return RenderedRow(text, invert_spans(found, len(text)), closed=True, notes=tuple(notes))
    if not found:
        raise BadRow("malformed", "the answers cannot be told from the rest of what the chat template writes")
    if len(found) < len(wanted):
        notes.append("answers that the chat template leaves out or rewrites, which are not learned")
    learned = _prefer_marks(template, text, found, whole=len(found) == len(answers))
    return RenderedRow(text, merge_spans(learned), closed=True, notes=tuple(notes))


def _prefer_marks(template: ChatTemplate, text: str, found: list[Span], *, whole: bool) -> list[Span]:
    """The template's own marks of what is learned, where it has some; of those, the ones in what is to be learned."""
    inside = lambda mark: whole or any(mark[0] < end and start < mark[1] for start, end in found)
    return [mark for mark in template.find_marks(text) if inside(mark)] or found


def _choose_form(talk: Conversation, tokenizer: Tokenizer) -> tuple[ChatTemplate, str]:
    """The conversation in the first form that the template takes and writes whole, not as Python prints it; its text.

    Arguments of tool calls are objects, or texts where the template joins them to others. A message without content
    has none, or an empty text. Contents are texts, or lists of parts where the template knows no other.
    """
    source = str(tokenizer.get_chat_template(tools=talk.tools))
    messages = [_name_parts(message, source) for message in talk.messages]
    called = any("tool_calls" in message for message in messages)
    if called and "tool_calls" not in source:
        raise BadRow("malformed", "it has tool calls, and the chat template has no place for them")
    taken: list[tuple[_Faults, ChatTemplate, str]] = []
    refusal: Exception | None = None
    for parts, as_text, empty in itertools.product(
        (False, True), (False, True)[: 1 + called], (None, "")[: 1 + called]
    ):
        form = [_put_in_form(message, parts=parts, as_text=as_text, empty=empty) for message in messages]
        template = ChatTemplate(tokenizer, form, talk.tools, talk.options or {})
        try:
            text = template.render(form)
        except REFUSALS as error:
            refusal = refusal or error
            continue
        taken.append((_count_faults(text, messages), template, text))
        if not any(taken[-1][0]):
            break
    if not taken:
        raise BadRow("malformed", f"the chat template refuses it: {refusal}")
    (lacking, _, _), template, text = min(taken, key=lambda one: one[0])
    if lacking:
        why = f": {refusal}" if refusal else ""
        raise BadRow("malformed", f"the chat template leaves out its tool calls{why}")
    return template, text


def _name_parts(message: Message, source: str) -> Message:
    """The message with the role and the thoughts under names that the template knows."""
    made = dict(message)
    if made["role"] == "developer" and "developer" not in source:
        made["role"] = "system"
    known = [name for name in THOUGHTS if re.search(rf"\b{name}\b", source)]
    for name in THOUGHTS:
        if known and name in made and name not in known:
            made.setdefault(known[0], made.pop(name))
    return made


def _put_in_form(message: Message, *, parts: bool, as_text: bool, empty: str | None) -> Message:
    made = dict(message)
    if made["content"] is None:
        made["content"] = empty
    if parts and isinstance(made["content"], str):
        made["content"] = [{"type": "text", "text": made["content"]}]
    if as_text and "tool_calls" in made:
        calls = [dict(call) for call in made["tool_calls"]]
        for call in calls:
            call["function"] = {**call["function"], "arguments": _write_arguments(call["function"]["arguments"])}
        made["tool_calls"] = calls
    return made


def _write_arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    written = arguments.written if isinstance(arguments, WrittenArguments) else ""
    return written or json.dumps(arguments, ensure_ascii=False)


def _count_faults(text: str, messages: Sequence[Message]) -> _Faults:
    """How many calls and contents the text lacks, and how often it holds what Python prints of an object or of None."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    objects = [call["arguments"] for call in calls if isinstance(call["arguments"], dict) and call["arguments"]]
    printed = sum(str(dict(one)) in text for one in objects) + text.count("None") + text.count("[{'type': '")
    said = sum(not _is_in(words, text) for message in messages for words in list_texts(message["content"]))
    return sum(call["name"] not in text for call in calls), said, printed


def _is_in(words: str, text: str) -> bool:
    """Are the words in the text, as they are or as JSON?"""
    return (
        words.strip() in text or json.dumps(words)[1:-1] in text or json.dumps(words, ensure_ascii=False)[1:-1] in text
    )


def _find_omissions(template: ChatTemplate, text: str) -> Iterator[str]:
    """What of the conversation is not in the text."""
    if template.tools and "tools" not in template.source:
        yield "tools that the chat template has no place for"
    last = [message for message in template.messages if message["role"] == "assistant"][-1]
    thoughts = [last[name] for name in THOUGHTS if isinstance(last.get(name), str)]
    thoughts += re.findall(r"<think>(.*?)</think>", str(last["content"]), re.DOTALL)
    if not all(thought.strip() in text for thought in thoughts):
        yield "thoughts that the chat template leaves out"
    said = [message["content"] for message in template.messages if message["role"] != "assistant"]
    if not all(_is_in(words, text) for content in said for words in list_texts(content)):
        yield "messages that the chat template leaves out or rewrites"
