"""Text to tokens: special tokens, the chat template, and how much a model takes."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError

Message = Mapping[str, str]


def encode(tokenizer: Tokenizer, text: str, *, chat: bool = False) -> list[int]:
    """Tokens of a text that goes on: with what the tokenizer puts before a text, without what it puts behind one.

    A text made by a chat template already spells its special tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
    return ids if chat else ids[: len(ids) - _count_ending(tokenizer)]


def _count_ending(tokenizer: Tokenizer) -> int:
    """How many tokens the tokenizer puts behind a text, such as the end-of-text token."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    return next((len(whole) - i - len(bare) for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)


def chat_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The messages in the tokenizer's chat template, up to where the answer begins.

    Raises:
        UsageError: if the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "this model's tokenizer has no chat template; leave chat off and write the whole prompt, "
            "or use a model tuned for chat"
        )
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def user_text(tokenizer: Tokenizer, prompt: str) -> str:
    """A prompt as the first message of a chat, in the tokenizer's template."""
    return chat_text(tokenizer, [{"role": "user", "content": prompt}])


def first_token(tokenizer: Tokenizer) -> int:
    """The token that stands before any text.

    Raises:
        UsageError: if the tokenizer has neither a beginning nor an end token.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UsageError("an empty prompt needs a tokenizer with a beginning (or end) token, and this one has neither")


def pad_token(tokenizer: Tokenizer) -> int:
    """A token for the masked places of a batch."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in tokens if token is not None)


def context_length(model: nn.Module) -> int | None:
    """The most tokens the model takes, if its configuration says."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
