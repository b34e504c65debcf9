"""Where each answer of a conversation stands in what a chat template writes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from .conversations import Message
from .labels import count_common

Span = tuple[int, int]

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template that is given something it does not know may raise."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message for what was thought before its content was said."""

_LONGEST_TOKEN = 100


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, and one conversation in the form that it takes."""

    tokenizer: Tokenizer
    messages: list[Message]
    tools: list[Any] | None
    options: Mapping[str, Any]
    _beginnings: dict[tuple[int, bool], str | None] = field(default_factory=dict)
    _known: dict[str, str] = field(default_factory=dict)
    """What opens an answer, by the role above it, and under `end` what the template wrote last behind one."""

    @property
    def source(self) -> str:
        """The template's own text."""
        return str(self.tokenizer.get_chat_template(tools=self.tools))

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
        conversation before it. A template may write a turn in another way once others follow; then other words in
        its place show where it stands.
        """
        before, upto = self._begin(turn, open_turn=True), self._begin(turn + 1)
        if upto is None:
            return None
        if before is not None and upto.startswith(before) and text.startswith(upto):
            return len(before), len(upto)
        words = self._find_words(self.messages, turn, text)
        if words is None:
            bare = self._begin(turn)
            last = turn == len(self.messages) - 1
            return (len(bare), len(text)) if last and bare is not None and text.startswith(bare) else None
        return self._find_start(turn, text, words[0]), self._find_end(turn, text, upto, words[1])

    def find_marks(self, text: str) -> list[Span]:
        """What the template itself marks by `{% generation %}` as the model's words."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.source):
            return []
        given = [{key: value for key, value in message.items() if value is not None} for message in self.messages]
        texts, marks = render_jinja_template(
            conversations=[given],
            tools=self.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.options},
        )
        return [(start, end) for start, end in marks[0]] if texts[0] == text else []

    def _begin(self, count: int, *, open_turn: bool = False) -> str | None:
        """The text of so many messages, rendered once."""
        if (count, open_turn) not in self._beginnings:
            self._beginnings[count, open_turn] = self._try(self.messages[:count], open_turn=open_turn)
        return self._beginnings[count, open_turn]

    def _try(self, messages: Sequence[Message], *, open_turn: bool = False) -> str | None:
        """The text, or None where there are no messages or the template refuses them."""
        if not messages:
            return None
        try:
            return self.render(messages, open_turn=open_turn)
        except REFUSALS:
            return None

    def _find_words(self, messages: Sequence[Message], turn: int, text: str) -> Span | None:
        """Where a message's own words are in the text of the messages: what is another with other words."""
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        plain = {key: value for key, value in messages[turn].items() if key not in ("tool_calls", *THOUGHTS)}
        content = [{"type": "text", "text": mark}] if isinstance(plain["content"], list) else mark
        other = self._try([*messages[:turn], {**plain, "content": content}, *messages[turn + 1 :]])
        if other is None or mark not in other:
            return None
        start = count_common(text, other)
        return start, len(text) - min(count_common(text[::-1], other[::-1]), len(text) - start)

    def _find_start(self, turn: int, text: str, words: int) -> int:
        """Where the model begins to write: behind what opens an answer, as far as that is there."""
        role = self.messages[turn - 1]["role"] if turn else ""
        if role not in self._known:
            self._known[role] = self._find_opening(turn)
        opening = self._known[role]
        if not opening or text.endswith(opening, 0, words):
            return words
        above = self._find_words(self.messages, turn - 1, text) if turn else (0, 0)
        between = text[above[1] : words] if above is not None else ""
        found = [
            (_cut(self.tokenizer, count_common(opening, rest), opening, rest), len(rest))
            for rest in (between[place:] for place in range(len(between)))
            if opening.startswith(rest[0])
        ]
        length, rest = max(found, default=(0, 0))
        return words - rest + length if length else words

    def _find_opening(self, turn: int) -> str:
        """What the template writes for an answer to begin; empty if it writes nothing."""
        for count in (turn, *range(1, len(self.messages))):
            shut, opened = self._begin(count), self._begin(count, open_turn=True)
            if shut is not None and opened is not None:
                return opened[count_common(shut, opened) :]
        return ""

    def _find_end(self, turn: int, text: str, upto: str, words: int) -> int:
        """Where the turn ends: behind what the template writes after an answer's words."""
        if (tail := self._known.get("end")) and text.startswith(tail, words):
            return words + len(tail)
        there = self._find_words(self.messages[: turn + 1], turn, upto)
        if there is None:
            return words
        tail, after = upto[there[1] :], text[words:]
        end = _cut(self.tokenizer, count_common(tail, after), tail, after)
        self._known["end"] = tail[:end]
        return words + end


def merge_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans in order, those that touch as one, and none that is empty."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        elif end > start:
            made.append((start, end))
    return tuple(made)


def invert_spans(spans: Iterable[Span], length: int) -> tuple[Span, ...]:
    """What lies between the spans in a text of so many characters."""
    edges = [0, *(edge for span in merge_spans(spans) for edge in span), length]
    return merge_spans(zip(edges[::2], edges[1::2], strict=True))


def _cut(tokenizer: Tokenizer, end: int, *texts: str) -> int:
    """The end of what texts have in common at their beginning, without the half of a token like <|im_end|>."""
    pattern = _match_tokens(tuple(map(str, tokenizer.get_added_vocab())))
    for text in texts:
        for found in pattern.finditer(text[: end + _LONGEST_TOKEN]):
            if found.start() < end < found.end():
                end = found.start()
    return end


@lru_cache(maxsize=8)
def _match_tokens(added: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of these tokens, and of what looks like one."""
    named = [re.escape(token) for token in sorted(added, key=len, reverse=True)]
    return re.compile("|".join([*named, r"<[^<>\s]+>", r"\[/?[A-Z_]+\]"]))
