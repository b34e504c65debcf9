"""Where an answer ends: what a chat template puts after an assistant's last word."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import DoraError

# words that no template changes, nor any other text holds
_ASKED, _SAID = ("QUESTIONONE", "QUESTIONTWO"), ("ANSWERONE", "ANSWERTWO")


@dataclass(frozen=True)
class TurnEnd:
    """The end of an assistant's turn; empty without a chat template."""

    tokens: tuple[int, ...] = ()
    """Ids that end an answer."""
    text: str = ""
    """Ordinary text that ends an answer, in templates that have no token for it."""


def find_turn_end(tokenizer: Tokenizer) -> TurnEnd:
    """The first token of its own that the template puts after the last answer, or else what stands there as text.

    A template that leaves the last answer open is asked what comes after an earlier one.
    """
    known = _list_own_tokens(tokenizer)
    for tail in _render_tails(tokenizer):
        # of two tokens that begin at one place, the longer is the one that is read
        places = [(tail.find(text), -len(text), token) for text, token in known.items() if text in tail]
        at, _, token = min(places, default=(len(tail), 0, None))
        before = tail[:at].rstrip()
        if token is not None or before.strip():
            return TurnEnd(() if token is None else (token,), before if before.strip() else "")
    return TurnEnd()


def find_end_tokens(eos: int | Sequence[int] | None, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends a text: the model's own, the tokenizer's, and that of an assistant's turn.

    Args:
        eos: `eos_token_id` of the model's generation settings.

    Raises:
        DoraError: if that is neither a number nor a list of numbers.
    """
    own: list[Any] = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    if not all(isinstance(token, int) for token in own):
        raise DoraError(f"the model's generation settings are damaged: eos_token_id is {eos!r}, and no token has it")
    more = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*own, *more, *find_turn_end(tokenizer).tokens]))


def set_end_tokens(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Make the model's own `generate` stop there too, and what `save_pretrained` writes."""
    settings: Any = model.generation_config
    settings.eos_token_id = find_end_tokens(settings.eos_token_id, tokenizer) or None


def name_ends(tokens: Iterable[int], end: TurnEnd, tokenizer: Tokenizer) -> str:
    """The ends of an answer in words: ``<|im_end|>, <|endoftext|>``."""
    return ", ".join(
        [*map(str, tokenizer.convert_ids_to_tokens(list(tokens))), *([repr(end.text)] if end.text else [])]
    )


def _list_own_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens that stand for themselves, by their text; some tokenizers have runs of blanks among them."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {str(text): int(number) for text, number in {**added, **special}.items() if str(text).strip()}


def _render_tails(tokenizer: Tokenizer) -> list[str]:
    """The text after the last answer of a conversation, and the text between an earlier one and the next question."""
    if not tokenizer.chat_template:
        return []
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        turns = [("user", _ASKED[0]), ("assistant", _SAID[0]), ("user", _ASKED[1]), ("assistant", _SAID[1])]
        messages = [{"role": role, "content": wrap(text)} for role, text in turns]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError):
            # it takes parts and no text, or cannot be rendered at all, which the caller of the template is told
            continue
        if all(mark in text for mark in (*_SAID, *_ASKED)):
            return [text.rpartition(_SAID[1])[2], text.partition(_SAID[0])[2].partition(_ASKED[1])[0]]
    return []
