"""Text to tokens: special tokens, the chat template, and how much a model takes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError, list_some

Message = Mapping[str, str]


def encode(tokenizer: Tokenizer, text: str, *, chat: bool = False, whole: bool = False) -> list[int]:
    """Tokens of a text that goes on: with what the tokenizer puts before a text, without what it puts behind one.

    A text made by a chat template already spells its special tokens; a whole one, which an encoder reads, has both.
    """
    ids = list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
    return ids if chat or whole else ids[: len(ids) - _count_ending(tokenizer)]


def leave_blanks(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt without as many of the blanks at its end as the tokenizer joins to the word after them.

    In a trained row such a blank belongs to the answer's first token. A prompt that ends with it by itself is one that
    the model never saw.
    """
    if not prompt.endswith(" "):
        return prompt
    tokens = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    joined, shortest = tokens(f"{prompt}a"), len(prompt.rstrip(" "))
    for end in range(len(prompt), shortest - 1, -1):
        if (given := tokens(prompt[:end])) == joined[: len(given)]:
            return prompt[:end]
    return prompt[:shortest]


def has_encoder(model: Any) -> bool:
    """Whether an encoder reads the prompt, and a decoder writes the answer from its own beginning."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


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


def pad_token(tokenizer: Tokenizer, model: Any) -> int:
    """A token for the masked places of a batch; one that the model has, which a tokenizer's own need not be."""
    tokens, rows = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0), count_embeddings(model)
    return next(int(token) for token in tokens if token is not None and (rows is None or token < rows))


def count_embeddings(model: Any) -> int | None:
    """How many tokens the model has a row for; without weights what its configuration says."""
    try:
        layer = model.get_input_embeddings() if isinstance(model, nn.Module) else None  # type: ignore[operator]
    except NotImplementedError:
        layer = None
    count = getattr(getattr(layer, "base_layer", layer), "num_embeddings", None)
    if count is None:
        count = getattr(model.config.get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) and count > 0 else None


def check_ids(model: Any, tokenizer: Tokenizer, rows: Iterable[Sequence[int]], what: str) -> None:
    """Check that the model has an embedding for every token of some rows.

    Raises:
        UsageError: naming the tokens that it lacks, and what to do.
    """
    count = count_embeddings(model)
    if count is None or find_largest_id(tokenizer) < count:
        return
    beyond = Counter(token for row in rows for token in {token for token in row if token >= count})
    if not beyond:
        return
    named = [f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token}, in {n:,})" for token, n in beyond.most_common()]
    raise UsageError(
        f"the tokenizer has tokens that the model has no embedding for (it has {count:,}), and {what} hold some: "
        f"{list_some(named, 5, ', ')}; give the model rows for them (model.resize_token_embeddings(len(tokenizer)), "
        "then model.save_pretrained), or take these tokens out of the tokenizer"
    )


def find_largest_id(tokenizer: Tokenizer) -> int:
    """The largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


def context_length(model: Any) -> int | None:
    """The most tokens the model takes, if its configuration says, or that of the language model in it."""
    length = getattr(model.config, "max_position_embeddings", None)
    if length is None and getattr(model.config, "vision_config", None) is not None:
        length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
