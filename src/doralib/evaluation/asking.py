"""How a task's examples are put to a model: what it writes after each, and which option it finds most probable."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.encoding import check_ids, context_length, encode, has_encoder, leave_blanks, pad_token, user_text
from ..data.picture_encoder import PictureEncoder, PictureText
from ..data.picture_rows import ask_with_pictures
from ..data.prepare import BadRow
from ..errors import DoraError, UsageError
from .example import Example
from .generation import Sampling, answer_each, answer_pictures, stop_at_turn_end
from .likelihood import LikelihoodRequest, log_likelihoods, option_requests, score_options
from .task import ClassificationTask, Task
from .task_generated import GenerationTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scorer:
    """Everything a task is scored with."""

    model: nn.Module
    tokenizer: Tokenizer
    batch_size: int
    seed: int
    tick: Callable[[float], None]
    """Takes the share of the task done since the last call."""
    encoder: PictureEncoder | None = None
    """Of a model that takes pictures."""


def answer_examples(task: GenerationTask, examples: Sequence[Example], scorer: Scorer) -> tuple[list[str], int]:
    """What the model writes after each prompt, and how many prompts were cut: at their end for an encoder.

    Raises:
        UsageError: if max_new_tokens leaves no room for a prompt.
        DoraError: if a picture can no longer be read.
    """
    sampling = Sampling(num_beams=task.num_beams, stop=task.stop)
    if scorer.encoder is not None:
        return answer_about(task, examples, scorer, sampling, task.max_new_tokens), 0
    encoded = has_encoder(scorer.model)
    prompts = encode_prompts(task, examples, scorer.tokenizer, whole=encoded)
    first = [] if encoded or task.chat else [example.prompt for example in examples[:1]]
    if any(leave_blanks(scorer.tokenizer, prompt) != prompt for prompt in first):
        log.info(
            f"  {task.name}: its prompts end with a blank, which this tokenizer joins to the word after it; a model "
            "that was trained on prompt and answer in one may answer badly"
        )
    cut = 0
    if (limit := context_length(scorer.model)) is not None:
        room = limit if encoded else limit - task.max_new_tokens
        if room < 1:
            raise UsageError(
                f"task {task.name}: max_new_tokens {task.max_new_tokens} leaves no room for a prompt: "
                f"the model takes {limit} tokens in all"
            )
        cut = sum(len(tokens) > room for tokens in prompts)
        prompts = [tokens[:room] if encoded else tokens[-room:] for tokens in prompts]
    answers = answer_each(
        scorer.model,
        scorer.tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        batch_size=scorer.batch_size,
        sampling=stop_at_turn_end(sampling, scorer.tokenizer) if task.chat else sampling,
        tick=lambda done: scorer.tick(done / len(examples)),
    )
    return [answer.text for answer in answers], cut


def answer_about(
    task: Task, examples: Sequence[Example], scorer: Scorer, sampling: Sampling, max_new_tokens: int
) -> list[str]:
    """What a model that takes pictures writes about those of each example.

    Raises:
        DoraError: if one can no longer be read.
    """
    encoder = scorer.encoder
    assert encoder is not None, "see _check_sight"
    answers = answer_pictures(
        scorer.model,
        encoder,
        [_ask_about(task, row, example, encoder) for row, example in enumerate(examples, 1)],
        max_new_tokens=max_new_tokens,
        batch_size=scorer.batch_size,
        sampling=stop_at_turn_end(sampling, scorer.tokenizer),
        tick=lambda done: scorer.tick(done / len(examples)),
    )
    return [answer.text for answer in answers]


def _ask_about(task: Task, row: int, example: Example, encoder: PictureEncoder) -> PictureText:
    try:
        return encoder.ask(ask_with_pictures(example.prompt, example.pictures))
    except BadRow as bad:
        raise DoraError(f"task {task.name}, row {row}: {bad}") from None


def choose_options(
    task: Task, examples: Sequence[Example], scorer: Scorer, normalize: str = "none"
) -> tuple[list[int], int]:
    """The most probable option of each example, and how many prompts were cut.

    Args:
        normalize: What a log-likelihood is divided by: "tokens" or "bytes" of the option, or "none".

    Raises:
        UsageError: if a token is none of the model's.
        DoraError: if a picture can no longer be read, or the model gives NaN.
    """
    if scorer.encoder is not None:
        return _choose_about(task, examples, scorer, scorer.encoder, normalize), 0
    asked = [_ask(task, row, example, scorer) for row, example in enumerate(examples, 1)]
    logp = iter(find_log_likelihoods(scorer, [request for found, _ in asked for request in found]))
    chosen = []
    for example, (found, _) in zip(examples, asked, strict=True):
        lengths = {
            "none": [1] * len(found),
            "tokens": [request.length for request in found],
            "bytes": [len(option.encode()) for option in example.options],
        }[normalize]
        chosen.append(int(np.argmax([next(logp) / length for length in lengths])))
    return chosen, sum(cut for _, cut in asked)


def _choose_about(
    task: Task, examples: Sequence[Example], scorer: Scorer, encoder: PictureEncoder, normalize: str
) -> list[int]:
    """The most probable option about the pictures of each example; those of one example go through together."""
    chosen = []
    for row, example in enumerate(examples, 1):
        asked = _ask_about(task, row, example, encoder)
        found = score_options(scorer.model, encoder, asked, example.options)
        divide = {
            "none": lambda *_: 1,
            "tokens": lambda count, _: count,
            "bytes": lambda _, option: len(option.encode()),
        }[normalize]
        values = [logp / divide(count, text) for (logp, count), text in zip(found, example.options, strict=True)]
        chosen.append(int(np.argmax(values)))
        scorer.tick(1 / len(examples))
    return chosen


def _ask(task: Task, row: int, example: Example, scorer: Scorer) -> tuple[list[LikelihoodRequest], bool]:
    """The requests for the options of one row."""
    limit, prompt = context_length(scorer.model), write_prompt(task, example, scorer.tokenizer)
    try:
        return option_requests(scorer.tokenizer, prompt, example.options, chat=task.chat, limit=limit)
    except UsageError as error:
        raise UsageError(f"task {task.name}, row {row}: {error}") from None


def check_labels(task: ClassificationTask, example: Example, scorer: Scorer) -> None:
    """Check that each label is a text of its own to the tokenizer.

    Raises:
        UsageError: naming two that are not.
    """
    requests, _ = _ask(task, 1, example, scorer)
    by_tokens: dict[tuple[int, ...], str] = {}
    for label, request in zip(example.options, requests, strict=True):
        other = by_tokens.setdefault(request.tokens[request.start :], label)
        if other != label:
            raise UsageError(
                f"task {task.name}: the tokenizer maps {other!r} and {label!r} to the same tokens; choose other labels"
            )


def find_log_likelihoods(scorer: Scorer, requests: Sequence[LikelihoodRequest]) -> list[float]:
    """The log-likelihood of each request.

    Raises:
        UsageError: if a token is none of the model's.
        DoraError: if the model gives NaN.
    """
    check_ids(scorer.model, scorer.tokenizer, (request.tokens for request in requests), "the task's rows")
    pad = pad_token(scorer.tokenizer, scorer.model)
    return log_likelihoods(scorer.model, requests, batch_size=scorer.batch_size, pad=pad, tick=scorer.tick)


def encode_prompts(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, *, whole: bool = False
) -> list[list[int]]:
    """The tokens of each prompt as the model gets them, whole for an encoder."""
    texts = [write_prompt(task, example, tokenizer) for example in examples]
    return [encode(tokenizer, text, chat=task.chat, whole=whole) for text in texts]


def write_prompt(task: Task, example: Example, tokenizer: Tokenizer) -> str:
    """What the model reads, as text: an example's prompt, in the chat template where the task asks so."""
    return user_text(tokenizer, example.prompt) if task.chat else example.prompt
