"""A conversation in a tokenizer's chat template, and where in the text each answer stands."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError
from .conversations import Conversation, Message, WrittenArguments
from .labels import count_common
from .prepare import BadRow, RenderedRow

_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template that is given something it does not know may raise."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

Span = tuple[int, int]


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
    template = _choose_form(talk, tokenizer)
    text = template.render(template.messages)
    answers = [i for i, message in enumerate(template.messages) if message["role"] == "assistant"]
    wanted = [i for i in answers if talk.learned[i] != learn_all]
    found = {turn: span for turn in wanted if (span := template.find_answer(turn, text)) is not None}
    notes = list(_find_omissions(template, text, talk))
    if learn_all:
        if len(found) < len(wanted):
            raise BadRow("malformed", "an answer that is not to be learned cannot be found in what the template writes")
        learned = _invert(found.values(), len(text))
    else:
        if not found:
            raise BadRow("malformed", "the answers cannot be told from the rest of what the chat template writes")
        if len(found) < len(wanted):
            notes.append("answers that the chat template leaves out or rewrites, which are not learned")
        learned = sorted(found.values())
    return RenderedRow(text, _merge(learned), closed=True, notes=tuple(notes))


@dataclass(frozen=True)
class _Template:
    """A tokenizer's chat template, and one conversation in the form that it takes."""

    tokenizer: Tokenizer
    messages: list[Message]
    tools: list[Any] | None
    options: Mapping[str, Any]

    def render(self, messages: Sequence[Message], *, open_turn: bool = False) -> str:
        """The text of these messages, with `open_turn` up to where the next answer begins."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=self.tools, tokenize=False, add_generation_prompt=open_turn, **self.options
            )
        )

    def find_answer(self, turn: int, text: str) -> Span | None:
        """Start and end of an answer in the whole text: what the model has to write, up to what ends its turn.

        Where the whole text begins as the conversation up to this turn does, the answer is what that has more than the
        conversation before it. A template may write a turn in another way once others follow; then another word in
        its place shows where it stands.
        """
        before, upto = self._try(self.messages[:turn], open_turn=True), self._try(self.messages[: turn + 1])
        if upto is None:
            return None
        if before is not None and turn > 0 and upto.startswith(before) and text.startswith(upto):
            return len(before), len(upto)
        words = self._find_words(self.messages, turn, text)
        if words is None:
            bare = self._try(self.messages[:turn])
            last = turn == len(self.messages) - 1
            return (len(bare), len(text)) if last and bare is not None and text.startswith(bare) else None
        return self._find_start(turn, text, words[0]), self._find_end(turn, text, upto, words[1])

    def _try(self, messages: Sequence[Message], *, open_turn: bool = False) -> str | None:
        try:
            return self.render(messages, open_turn=open_turn)
        except _REFUSALS:
            return None

    def _find_words(self, messages: Sequence[Message], turn: int, text: str) -> Span | None:
        """Where a message's own words are in the text of the messages: what is another with other words."""
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        plain = {key: value for key, value in messages[turn].items() if key not in ("tool_calls", *_THOUGHTS)}
        other = self._try([*messages[:turn], {**plain, "content": mark}, *messages[turn + 1 :]])
        if other is None or mark not in other:
            return None
        start = count_common(text, other)
        return start, len(text) - min(count_common(text[::-1], other[::-1]), len(text) - start)

    def _find_start(self, turn: int, text: str, words: int) -> int:
        """Where the model begins to write: behind the words that open an answer, as far as they are there."""
        opening = self._find_opening(turn)
        above = self._find_words(self.messages, turn - 1, text) if turn else (0, 0)
        if above is not None and opening:
            place = text.rfind(opening, above[1], words)
            if place >= 0:
                return place + len(opening)
        return words

    def _find_opening(self, turn: int) -> str:
        """What the template writes for an answer to begin; empty if it writes nothing."""
        for upto in (turn, *range(1, len(self.messages))):
            shut, opened = self._try(self.messages[:upto]), self._try(self.messages[:upto], open_turn=True)
            if upto and shut is not None and opened is not None:
                return opened[count_common(shut, opened) :]
        return ""

    def _find_end(self, turn: int, text: str, upto: str, words: int) -> int:
        """Where the turn ends: behind what the template writes after an answer's words."""
        there = self._find_words(self.messages[: turn + 1], turn, upto)
        if there is None:
            return words
        tail, after = upto[there[1] :], text[words:]
        end = count_common(tail, after)
        # two texts may part in the middle of a token like <|im_end|>
        for token in map(str, self.tokenizer.get_added_vocab()):
            for one in (tail, after):
                place = one.find(token, max(0, end - len(token) + 1), end + len(token) - 1)
                end = place if 0 <= place < end else end
        return words + end


def _choose_form(talk: Conversation, tokenizer: Tokenizer) -> _Template:
    """The conversation in the first form that the template takes and does not print as Python would.

    Arguments of tool calls are objects, or texts where the template joins them to others; no content is None, or an
    empty text where the template would write None.
    """
    source = str(tokenizer.get_chat_template(tools=talk.tools))
    messages = [_name_parts(message, source) for message in talk.messages]
    called = any("tool_calls" in message for message in messages)
    if called and "tool_calls" not in source:
        raise BadRow("malformed", "it has tool calls, and the chat template has no place for them")
    taken: list[tuple[int, _Template]] = []
    refusal: Exception | None = None
    for as_text in (False, True) if called else (False,):
        for empty in (None, "") if called else ("",):
            form = [_put_in_form(message, as_text=as_text, empty=empty) for message in messages]
            template = _Template(tokenizer, form, talk.tools, talk.options or {})
            try:
                taken.append((_count_python(template.render(form), form), template))
            except _REFUSALS as error:
                refusal = refusal or error
    if not taken:
        raise BadRow("malformed", f"the chat template refuses it: {refusal}")
    return min(taken, key=lambda one: one[0])[1]


def _name_parts(message: Message, source: str) -> Message:
    """The message with the role and the thoughts under names that the template knows."""
    made = dict(message)
    if made["role"] == "developer" and "developer" not in source:
        made["role"] = "system"
    known = [name for name in _THOUGHTS if re.search(rf"\b{name}\b", source)]
    for name in _THOUGHTS:
        if known and name in made and name not in known:
            made.setdefault(known[0], made.pop(name))
    return made


def _put_in_form(message: Message, *, as_text: bool, empty: str | None) -> Message:
    made = dict(message)
    if made["content"] is None:
        made["content"] = empty
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


def _count_python(text: str, messages: Sequence[Message]) -> int:
    """How often the text holds what Python prints of an object or of nothing."""
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    objects = sum(str(arguments) in text for arguments in calls if isinstance(arguments, dict) and arguments)
    return objects + text.count("None")


def _find_omissions(template: _Template, text: str, talk: Conversation) -> Iterator[str]:
    source = str(template.tokenizer.get_chat_template(tools=talk.tools))
    if talk.tools and "tools" not in source:
        yield "tools that the chat template has no place for"
    if any(name in message for message in template.messages for name in _THOUGHTS if name not in source):
        yield "thoughts that the chat template has no place for"
    said = [message["content"].strip() for message in template.messages if message["role"] != "assistant"]
    if not all(words in text or json.dumps(words)[1:-1] in text for words in said):
        yield "messages that the chat template leaves out or rewrites"


def _merge(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order, those that touch as one."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        elif end > start:
            made.append((start, end))
    return tuple(made)


def _invert(spans: Iterable[Span], length: int) -> list[Span]:
    """What lies between the spans."""
    edges = [0, *(edge for span in _merge(spans) for edge in span), length]
    return list(zip(edges[::2], edges[1::2], strict=True))
