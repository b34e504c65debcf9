"""What a model with a head says: a label for each text, for each word, or for each sound."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.classes import encode_words
from ..data.encoding import context_length, pad_token
from ..data.sounds import Clip, Hearing
from ..errors import DoraError
from .generation import evaluation_mode


def find_head_kind(model: nn.Module) -> str | None:
    """classify, tokens or audio-class, by the class of a model with a head; None for others."""
    name = type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids" and name.endswith("Classification"):
        return "audio-class"
    endings = {"ForSequenceClassification": "classify", "ForTokenClassification": "tokens"}
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), None)


def list_labels(model: nn.Module) -> list[str]:
    """The model's labels in the order of its outputs."""
    names = model.config.id2label  # type: ignore[union-attr]
    return [str(names[i]) for i in sorted(names)]  # type: ignore[index,arg-type]


def predict_labels(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, tick: Callable[[float], None]
) -> list[int]:
    """The number of the likeliest label of each text; the end of one too long for the model is left out.

    Raises:
        DoraError: if the model gives NaN.
    """
    tokens = [tokenizer(text, verbose=False)["input_ids"][: context_length(model)] for text in texts]
    found = _run(model, tokenizer, tokens, batch_size, tick)
    return [int(logits_L.argmax()) for logits_L in found]


def predict_tags(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[str]],
    batch_size: int,
    tick: Callable[[float], None],
) -> list[list[int]]:
    """The number of the likeliest label of each word of each text; -1 for words beyond what the model takes.

    Raises:
        DoraError: if the model gives NaN.
    """
    coded = [encode_words(tokenizer, words) for words in texts]
    limit = context_length(model)
    found = _run(model, tokenizer, [tokens[:limit] for tokens, _ in coded], batch_size, tick)
    return [
        [-1 if first is None or first >= len(logits_TL) else int(logits_TL[first].argmax()) for first in firsts]
        for (_, firsts), logits_TL in zip(coded, found, strict=True)
    ]


@torch.inference_mode()
def predict_sounds(
    model: nn.Module, extractor: Any, clips: Sequence[Clip], batch_size: int, tick: Callable[[float], None]
) -> list[int]:
    """The number of the likeliest label of each sound; the end of one too long for the model is left out.

    Raises:
        BadRow: if a sound cannot be heard.
        DoraError: if the model gives NaN.
    """
    hearing, device, found = Hearing(extractor), next(model.parameters()).device, list[int]()
    with evaluation_mode(model):
        for start in range(0, len(clips), batch_size):
            sounds = [hearing.read(clip) for clip in clips[start : start + batch_size]]
            features = {name: value.to(device) for name, value in hearing.make_features(sounds).items()}
            logits_NL = model(**features).logits.float()
            if not bool(logits_NL.isfinite().all()):
                raise DoraError("the model gives NaN or infinite numbers; was it trained to its end?")
            found += logits_NL.argmax(-1).tolist()
            tick(len(sounds) / len(clips))
    return found


@torch.inference_mode()
def _run(
    model: nn.Module, tokenizer: Tokenizer, tokens: Sequence[list[int]], batch_size: int, tick: Callable[[float], None]
) -> list[Tensor]:
    """Logits of each text, (L,) or (T, L); texts of like lengths go together."""
    device = next(model.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found: dict[int, Tensor] = {}
    pad = pad_token(tokenizer, model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(tokens[i]) for i in batch)
        ids = torch.tensor([[*tokens[i], *[pad] * (longest - len(tokens[i]))] for i in batch], device=device)
        mask = torch.tensor([[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in batch], device=device)
        logits = model(input_ids=ids, attention_mask=mask).logits.float().cpu()
        if not bool(logits.isfinite().all()):
            raise DoraError("the model gives NaN or infinite numbers; was it trained to its end?")
        found |= dict(zip(batch, logits, strict=True))
        tick(min(1.0, (start + len(batch)) / len(order)))
    return [found[i] for i in range(len(tokens))]
