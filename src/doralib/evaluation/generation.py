"""Text made by a model: batches of prompts, a stream in the terminal, a chat."""

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..adapters.registry import find_record
from ..config import Checked
from ..data.encoding import check_ids, context_length, encode, first_token, has_encoder, pad_token, user_text
from ..data.picture_encoder import PictureEncoder, PictureText
from ..data.turns import find_end_tokens, find_turn_end, name_ends
from ..errors import UsageError

log = logging.getLogger(__name__)
# below it scores divided by it are beyond float32
_COLDEST = 0.001


def _check_temperature(value: float) -> float:
    if 0 < value < _COLDEST:
        raise ValueError(f"should be 0, which always takes the likeliest token, or at least {_COLDEST}")
    return value


class Sampling(Checked):
    """How the next token is chosen and where a text ends."""

    temperature: Annotated[float, AfterValidator(_check_temperature)] = Field(default=0.0, ge=0, le=1000)
    """0: always the most probable token; else 0.001 to 1000, beyond which scores are no numbers any more."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most probable tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """Draw from so many of the most probable tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Leave out tokens less probable than this share of the most probable one."""
    repetition_penalty: float = Field(default=1.0, ge=0.001, le=1000)
    """Above 1 makes tokens that are there already less probable."""
    num_beams: int = Field(default=1, ge=1, lt=2**31)
    """Search with so many beams."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these."""
    seed: int = Field(default=0, ge=0, lt=2**32)


GREEDY = Sampling()


class Answer(NamedTuple):
    """A text that a model has written."""

    text: str
    cut: bool
    """Whether it would have gone on."""
    empty: str = ""
    """Why there is no text in it, where there is none."""


_AS_IT_IS = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    chat: bool = False,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """The text that follows each prompt; the same for the same seed, and without sampling for any batch size.

    The model is a causal language model of `transformers` or an encoder-decoder, which writes its text from the prompt
    and does not go on with it; it is in eval mode for the time of the call. With ``chat`` each
    prompt is put into the tokenizer's chat template, and a log line says what ends an answer.

    Raises:
        UsageError: if a prompt and its answer are longer than the model takes, or it holds tokens that the model lacks.
    """
    texts = [user_text(tokenizer, prompt) if chat else prompt for prompt in prompts]
    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "sampling": sampling}
    return [answer.text for answer in answer_texts(model, tokenizer, texts, chat=chat, **given)]


def answer_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    chat: bool = False,
    sampling: Sampling = GREEDY,
) -> list[Answer]:
    """As `generate`, for texts that with ``chat`` are in the chat template already; and how each answer ended."""
    if chat:
        tell_ends(model, tokenizer)
        sampling = stop_at_turn_end(sampling, tokenizer)
    tokens = [encode(tokenizer, text, chat=chat, whole=has_encoder(model)) for text in texts]
    limit = context_length(model)
    room = math.inf if limit is None else limit if has_encoder(model) else limit - max_new_tokens
    if long := [i for i, ids in enumerate(tokens) if len(ids) > room]:
        beside = f" with the {max_new_tokens} new ones; shorten them or lower max_new_tokens"
        raise UsageError(
            f"{len(long)} of {len(tokens)} prompts, first number {long[0] + 1} with {len(tokens[long[0]])} tokens, "
            f"are too long: the model takes {limit}{'; shorten them' if has_encoder(model) else beside}"
        )
    return answer_each(
        model, tokenizer, tokens, max_new_tokens=max_new_tokens, batch_size=batch_size, sampling=sampling
    )


def stop_at_turn_end(sampling: Sampling, tokenizer: Tokenizer) -> Sampling:
    """For prompts in the chat template: text that it puts after an answer stops too, where it has no token for that."""
    text = find_turn_end(tokenizer).text
    return sampling.model_copy(update={"stop": (*sampling.stop, text)}) if text else sampling


def tell_ends(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Log what ends an answer."""
    log.info(f"an answer ends at {describe_ends(model, tokenizer)}")


def describe_ends(model: nn.Module, tokenizer: Tokenizer) -> str:
    """What ends an answer, by the model's settings and the chat template."""
    tokens = find_end_tokens(_own_end(model), tokenizer)
    return name_ends(tokens, find_turn_end(tokenizer), tokenizer) or "max_new_tokens alone"


def answer_each(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    tick: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The answer to each tokenized prompt, all short enough for the model.

    An empty prompt begins with the first token of any text. ``tick`` is called with the number of prompts done since
    its last call.

    Raises:
        UsageError: if the model's adapters are set row by row, or a prompt holds tokens that the model lacks.
    """
    check_ids(model, tokenizer, prompts, "the prompts")
    record = find_record(model)
    if record is not None and record.rows is not None:
        raise UsageError("prompts are sorted into batches here, so adapter_rows cannot follow; call model.generate")
    # longest first: prompts of like length share a batch, and a batch too large for the memory fails at once
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    found = [Answer("", cut=False)] * len(prompts)
    with evaluation_mode(model), _seeded(model, sampling.seed):
        for begin in range(0, len(order), batch_size):
            here = order[begin : begin + batch_size]
            rows = [list(prompts[i]) or [first_token(tokenizer)] for i in here]
            for i, answer in zip(here, _continue(model, tokenizer, rows, max_new_tokens, sampling), strict=True):
                found[i] = answer
            tick(len(here))
    return found


def answer_pictures(
    model: nn.Module,
    encoder: PictureEncoder,
    asked: Sequence[PictureText],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    tick: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The answer to each question about pictures or videos, which are read now; questions of each kind are asked by
    themselves.

    Raises:
        UsageError: if a question and its answer are longer than the model takes.
        DoraError: if a picture cannot be read.
    """
    order = sorted(range(len(asked)), key=lambda i: (asked[i].kind, -len(asked[i].text)))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda i: asked[i].kind)]
    batches = [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
    found: dict[int, Answer] = {}
    with evaluation_mode(model), _seeded(model, sampling.seed):
        for here in batches:
            inputs = _call(model, encoder, [asked[i] for i in here], max_new_tokens)
            answers = _generate(model, encoder.tokenizer, inputs, max_new_tokens, sampling)
            found |= dict(zip(here, answers, strict=True))
            tick(len(here))
    return [found[i] for i in range(len(asked))]


def stream_about(
    model: nn.Module,
    encoder: PictureEncoder,
    asked: PictureText,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 512,
    sampling: Sampling = GREEDY,
) -> Answer:
    """As `stream`, for a question about pictures."""
    pieces = _Pieces(encoder.tokenizer, write)
    with evaluation_mode(model), _seeded(model, sampling.seed):
        inputs = _call(model, encoder, [asked], max_new_tokens)
        return _generate(model, encoder.tokenizer, inputs, max_new_tokens, sampling, streamer=pieces)[0]


def _call(
    model: nn.Module, encoder: PictureEncoder, asked: Sequence[PictureText], max_new_tokens: int
) -> dict[str, Tensor]:
    """The inputs of one batch, padded at the left."""
    inputs = encoder.call(asked, left=True)
    limit, width = context_length(model), inputs["input_ids"].shape[1]
    if limit is not None and width + max_new_tokens > limit:
        raise UsageError(
            f"a prompt has {width} tokens with its pictures: the model takes {limit} with the {max_new_tokens} new "
            "ones; make the pictures smaller, shorten the text or lower max_new_tokens"
        )
    return inputs


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    write: Callable[[str], None],
    *,
    max_new_tokens: int = 512,
    chat: bool = False,
    sampling: Sampling = GREEDY,
) -> Answer:
    """Write what follows a text, piece by piece as it comes, and return it whole.

    With ``chat`` the text is already in the chat template, and spells its special tokens itself.
    """
    pieces = _Pieces(tokenizer, write)
    row = encode(tokenizer, text, chat=chat, whole=has_encoder(model)) or [first_token(tokenizer)]
    check_ids(model, tokenizer, [row], "the prompt")
    sampling = stop_at_turn_end(sampling, tokenizer) if chat else sampling
    with evaluation_mode(model), _seeded(model, sampling.seed):
        return _continue(model, tokenizer, [row], max_new_tokens, sampling, streamer=pieces)[0]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, without gradients; each goes back to its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands whole words to a function as they come."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if text:
            self._write(text)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Says for each row whether the end of its new text holds a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stop, self._begin = tokenizer, stop, prompt_length
        # a token spells at least one byte, and the string may end inside the last one
        self._window = max(len(text.encode()) for text in stop) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002
        tails = self._tokenizer.batch_decode(input_ids[:, self._begin :][:, -self._window :], **_AS_IT_IS)
        found = [any(stop in tail for stop in self._stop) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def _continue(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> list[Answer]:
    """The answers of one batch, padded at the left; at the right for an encoder, whose decoder begins by itself."""
    width, pad = max(map(len, rows)), pad_token(tokenizer, model)
    fill = lambda row, padding: [*row, *padding] if has_encoder(model) else [*padding, *row]
    ids_BT = torch.tensor([fill(row, [pad] * (width - len(row))) for row in rows])
    mask_BT = torch.tensor([fill([1] * len(row), [0] * (width - len(row))) for row in rows])
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return _generate(model, tokenizer, inputs, max_new_tokens, sampling, streamer)


def _generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> list[Answer]:
    """The answers to one batch of inputs of the model, padded as in `_continue`."""
    width, pad = inputs["input_ids"].shape[1], pad_token(tokenizer, model)
    parameter = next(model.parameters())
    dtype = getattr(model, "dtype", parameter.dtype)
    # pictures in the numbers of the model, tokens as they are
    placed = {
        name: value.to(parameter.device, dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    begin = 1 if has_encoder(model) else width
    stops = [_Stops(tokenizer, sampling.stop, begin)] if sampling.stop else []
    out_BT = model.generate(  # type: ignore[operator]
        **placed,
        generation_config=_config(model, tokenizer, pad, max_new_tokens, sampling),
        stopping_criteria=StoppingCriteriaList(stops),
        streamer=streamer,
    )
    ends = find_end_tokens(_own_end(model), tokenizer)
    return [_read_answer(tokenizer, ids, max_new_tokens, ends, sampling.stop) for ids in out_BT[:, begin:].tolist()]


def _read_answer(
    tokenizer: Tokenizer, ids: Sequence[int], max_new_tokens: int, ends: Collection[int], stops: Sequence[str]
) -> Answer:
    """New tokens as text, up to the first stop; whether the length cut it, or why nothing is in it."""
    whole = tokenizer.decode(ids, **_AS_IT_IS)
    found = {whole.find(stop): stop for stop in reversed(stops) if stop in whole}
    text, end = whole[: min(found, default=None)], next((token for token in ids if token in ends), None)
    empty = ""
    if not text.strip():
        empty = "it wrote blanks and special tokens alone"
        if found:
            empty = f"it began with {found[min(found)]!r}, which ends an answer"
        elif ids and ids[0] == end:
            empty = f"its first token was an end, {tokenizer.convert_ids_to_tokens(end)!r}"
    return Answer(text, len(ids) >= max_new_tokens and end is None and not found, empty)


def _own_end(model: nn.Module) -> Any:
    return model.generation_config.eos_token_id  # type: ignore[union-attr]


def _config(
    model: nn.Module, tokenizer: Tokenizer, pad: int, max_new_tokens: int, sampling: Sampling
) -> GenerationConfig:
    """Our settings over the model's own, which may name further end tokens."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    drawn = sampling.temperature > 0
    config.update(
        do_sample=drawn,
        temperature=sampling.temperature if drawn else 1.0,
        top_p=sampling.top_p if drawn else 1.0,
        top_k=sampling.top_k if drawn else 50,  # the library's own value for "not set"
        min_p=sampling.min_p if drawn and sampling.min_p else None,
        repetition_penalty=sampling.repetition_penalty,
        num_beams=sampling.num_beams,
        max_new_tokens=max_new_tokens,
        max_length=None,
        eos_token_id=find_end_tokens(_own_end(model), tokenizer) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    return config


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from a seed of our own; the caller's go on afterwards as if nothing had been drawn."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
