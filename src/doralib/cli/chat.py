"""A chat in the terminal."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ..data.encoding import chat_text, context_length, encode
from ..evaluation.generation import GREEDY, Sampling, describe_ends, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_loop(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    read: Callable[[str], str],
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
) -> list[dict[str, str]]:
    """Talk until /quit or the end of the input; returns the messages since the last /reset.

    Ctrl-C ends an answer, which is then forgotten with its question; at the prompt it ends the chat.

    Args:
        model: as for `generate`.
        tokenizer: the model's, with a chat template.
        read: like `input`: shows a prompt, returns a line, raises EOFError at the end.
        write: shows a piece of text, without a line end of its own.
        max_new_tokens: the most tokens an answer gets.
        sampling: how tokens are chosen.

    Raises:
        UsageError: if the tokenizer has no chat template.
    """
    chat_text(tokenizer, [{"role": "user", "content": ""}])
    write(f"/reset forgets the conversation, /quit ends it; an answer ends at {describe_ends(model, tokenizer)}\n")
    messages: list[dict[str, str]] = []
    while (line := _line(read)) is not None and line != "/quit":
        if line == "/reset":
            messages = []
            write("forgotten\n")
        elif line.startswith("/"):
            write(f"there is no command {line.split()[0]}; there are /reset and /quit\n")
        elif line:
            messages.append({"role": "user", "content": line})
            text = _fit(model, tokenizer, messages, max_new_tokens, write)
            answer = None
            if text:
                answer = _answer(model, tokenizer, text, write, max_new_tokens=max_new_tokens, sampling=sampling)
            write("\n")
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return messages


def _line(read: Callable[[str], str]) -> str | None:
    """What the user says, or None at the end."""
    try:
        return read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _fit(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    max_new_tokens: int,
    write: Callable[[str], None],
) -> str | None:
    """The conversation as text, without its oldest turns where it is too long; None if even the last message is."""
    limit, kept = context_length(model), list(messages)
    length = lambda: len(encode(tokenizer, chat_text(tokenizer, kept), chat=True)) + max_new_tokens
    too_long = lambda: limit is not None and length() > limit
    while too_long() and len(kept) > 1:
        del kept[:2]  # a question and its answer
    if too_long():
        write(f"that is too long: the model takes {limit} tokens with the {max_new_tokens} of the answer")
        return None
    if len(kept) < len(messages):
        write(f"(the oldest turns are forgotten: the model takes {limit} tokens)\n")
        messages[:] = kept
    return chat_text(tokenizer, messages)


def _answer(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> str | None:
    """The answer, written as it comes; None if the user stopped it."""
    try:
        return stream(model, tokenizer, text, write, max_new_tokens=max_new_tokens, chat=True, sampling=sampling)
    except KeyboardInterrupt:
        write("\n(stopped)")
        return None
