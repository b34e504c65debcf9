"""Log-probabilities of continuations under a causal language model, the head computed only where they are."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.encoding import encode, first_token
from ..data.picture_encoder import PictureEncoder, PictureText
from ..errors import DoraError, UsageError

_Body = Callable[[Tensor, Tensor], Tensor]
_Head = Callable[[Tensor], Tensor]

_TOKENS_AT_ONCE = 16384  # of one batch, padding included
_LOGITS_AT_ONCE = 512  # rows of the vocabulary head: 100 MB in float32 at 49k words


@dataclass(frozen=True)
class LikelihoodRequest:
    """Asks for the log-probability of ``tokens[start:]`` after ``tokens[:start]``; start is at least 1."""

    tokens: tuple[int, ...]
    start: int

    @property
    def length(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.start


@dataclass
class _Row:
    """One input of the model, and every (position, next token, request) that is read from it."""

    inputs: tuple[int, ...]
    reads: list[tuple[int, int, int]] = field(default_factory=list)


def option_requests(
    tokenizer: Tokenizer, prompt: str, options: Sequence[str], *, chat: bool, limit: int | None
) -> tuple[list[LikelihoodRequest], bool]:
    """One request for each option, all after the same tokens, and whether the prompt's beginning was cut to fit.

    The common tokens end where the first option departs from the prompt's own: an option may melt into its last token.

    Raises:
        UsageError: if the tokenizer maps an option to nothing, or one is longer than the model takes.
    """
    before = encode(tokenizer, prompt, chat=chat)
    whole = [encode(tokenizer, prompt + option, chat=chat) for option in options]
    shared = _num_shared([before, *whole])
    if nothing := [option for option, tokens in zip(options, whole, strict=True) if len(tokens) == shared]:
        raise UsageError(f"the tokenizer maps {', '.join(map(repr, nothing))} to nothing; choose other labels")
    if shared == 0:
        whole, shared = [[first_token(tokenizer), *tokens] for tokens in whole], 1
    over = 0 if limit is None else max(0, max(map(len, whole)) - 1 - limit)
    if over >= shared:
        raise UsageError(f"an option has {max(map(len, whole)) - shared} tokens; the model takes {limit} in all")
    return [LikelihoodRequest(tuple(tokens[over:]), shared - over) for tokens in whole], over > 0


def text_requests(
    tokenizer: Tokenizer, prompt: str, text: str, *, chat: bool, limit: int
) -> tuple[list[LikelihoodRequest], bool]:
    """Requests that score each token of a text once, and whether the prompt's beginning was cut to fit.

    Each piece has at most ``limit`` tokens of input and begins with the last token of the piece before.

    Raises:
        UsageError: if the tokenizer maps the text to nothing.
    """
    before, tokens = encode(tokenizer, prompt, chat=chat), encode(tokenizer, prompt + text, chat=chat)
    at = _num_shared([before, tokens])
    if at == len(tokens):
        raise UsageError(f"the tokenizer maps {text!r:.80} to nothing")
    if at == 0:
        tokens, at = [first_token(tokenizer), *tokens], 1
    begin = 0 if at <= limit else at - 1
    cut, requests = begin > 0, []
    while at < len(tokens):
        end = min(begin + limit + 1, len(tokens))
        requests.append(LikelihoodRequest(tuple(tokens[begin:end]), at - begin))
        at, begin = end, end - 1
    return requests, cut


def log_likelihoods(
    model: nn.Module,
    requests: Sequence[LikelihoodRequest],
    *,
    batch_size: int,
    pad: int = 0,
    tick: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """The summed log-probability of each request, whatever the batch size; the model must be in eval mode.

    Requests whose input is the same, or the beginning of another's, share one pass: labels of one token cost one
    forward together. ``pad`` fills the masked places at the right; ``tick`` is called with the share of the work done
    since its last call.

    Raises:
        DoraError: if the model gives NaN.
    """
    body, head = _body_and_head(model)
    device = next(model.parameters()).device
    rows = sorted(_rows(requests), key=lambda row: len(row.inputs), reverse=True)
    totals = torch.zeros(len(requests), dtype=torch.float64)
    work = sum(len(row.inputs) for row in rows)
    with torch.inference_mode():
        for batch in _batches(rows, batch_size):
            ids_BT, mask_BT = _padded(batch, pad, device)
            hidden_NH = body(ids_BT, mask_BT).flatten(0, 1)
            asked, logp = _read(head, hidden_NH, batch, ids_BT.shape[1])
            totals.index_add_(0, asked, logp.double().cpu())
            tick(sum(len(row.inputs) for row in batch) / work)
    if bad := int(totals.isnan().sum()):
        raise DoraError(f"the model gives NaN for {bad} of {len(totals)} texts; its weights or its dtype are at fault")
    return totals.tolist()


def score_options(
    model: nn.Module, encoder: PictureEncoder, asked: PictureText, options: Sequence[str]
) -> list[tuple[float, int]]:
    """The log-probability of each option after a question about pictures, and how many tokens it has.

    Raises:
        UsageError: if the tokenizer maps an option to nothing.
    """
    parameter = next(model.parameters())
    texts = [asked, *(replace(asked, text=asked.text + option) for option in options)]
    inputs = {name: value.to(parameter.device) for name, value in encoder.call(texts).items()}
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    shared = _num_shared(rows)
    if nothing := [option for option, row in zip(options, rows[1:], strict=True) if len(row) == shared]:
        raise UsageError(f"the tokenizer maps {', '.join(map(repr, nothing))} to nothing; choose other labels")
    dtype = getattr(model, "dtype", parameter.dtype)
    placed = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        logits_BTV = model(**placed, use_cache=False).logits[1:]
    found = []
    for logits_TV, row in zip(logits_BTV, rows[1:], strict=True):
        logp_TV = logits_TV[shared - 1 : len(row) - 1].float().log_softmax(-1)
        tokens = torch.tensor(row[shared:], device=logp_TV.device)
        found.append((float(logp_TV.gather(1, tokens[:, None]).sum()), len(tokens)))
    return found


def _num_shared(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows have in common."""
    alike = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def _rows(requests: Sequence[LikelihoodRequest]) -> list[_Row]:
    """The fewest inputs that answer every request."""
    by_inputs: dict[tuple[int, ...], _Row] = {}
    for index, request in enumerate(requests):
        row = by_inputs.setdefault(request.tokens[:-1], _Row(request.tokens[:-1]))
        row.reads += [(at - 1, request.tokens[at], index) for at in range(request.start, len(request.tokens))]
    kept: list[_Row] = []
    # backwards in dictionary order a beginning comes right after the inputs that continue it
    for inputs in sorted(by_inputs, reverse=True):
        if kept and kept[-1].inputs[: len(inputs)] == inputs:
            kept[-1].reads += by_inputs[inputs].reads
        else:
            kept.append(by_inputs[inputs])
    return kept


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[Sequence[_Row]]:
    """Rows, longest first, in batches that also keep to a number of tokens."""
    at = 0
    while at < len(rows):
        count = max(1, min(batch_size, _TOKENS_AT_ONCE // len(rows[at].inputs)))
        yield rows[at : at + count]
        at += count


def _padded(batch: Sequence[_Row], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and mask, padded at the right."""
    lengths = [len(row.inputs) for row in batch]
    width = max(lengths)
    ids_BT = torch.tensor([[*row.inputs, *[pad] * (width - len(row.inputs))] for row in batch], device=device)
    mask_BT = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long().to(device)
    return ids_BT, mask_BT


def _read(head: _Head, hidden_NH: Tensor, batch: Sequence[_Row], width: int) -> tuple[Tensor, Tensor]:
    """The request index and the log-probability of every read of a batch."""
    reads = [(b * width + at, token, index) for b, row in enumerate(batch) for at, token, index in row.reads]
    places, tokens, asked = torch.tensor(reads).unbind(1)
    places, which = places.unique(return_inverse=True)
    logp = torch.empty(len(reads))
    for begin in range(0, len(places), _LOGITS_AT_ONCE):
        here = places[begin : begin + _LOGITS_AT_ONCE].to(hidden_NH.device)
        logp_PV = head(hidden_NH[here]).float().log_softmax(-1)
        inside = (which >= begin) & (which < begin + len(here))
        at, token = (which[inside] - begin).to(here.device), tokens[inside].to(here.device)
        logp[inside] = logp_PV[at, token].cpu()
    return asked, logp


def _body_and_head(model: nn.Module) -> tuple[_Body, _Head]:
    """The model in two parts, so that the vocabulary head runs on chosen positions; else logits and the identity."""

    def logits(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits

    decoder, head = (getattr(model, name, lambda: None)() for name in ("get_decoder", "get_output_embeddings"))
    if decoder is None or decoder is model or head is None:
        return logits, nn.Identity()

    def hidden(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state

    return (hidden, head) if _agree(model, logits, hidden, head) else (logits, nn.Identity())


def _agree(model: nn.Module, logits: _Body, hidden: _Body, head: _Head) -> bool:
    """Whether body and head give the model's own logits: some models scale or cap them after the head."""
    ids_BT = torch.arange(4, device=next(model.parameters()).device)[None]
    with torch.inference_mode():
        whole = logits(ids_BT, torch.ones_like(ids_BT))
        parts = head(hidden(ids_BT, torch.ones_like(ids_BT)))
    return whole.shape == parts.shape and torch.allclose(whole.float(), parts.float(), rtol=1e-5, atol=1e-6)
