"""What a model hears in sounds, as text, and how far that is from what was said: word and character error rates."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..data.sounds import Clip, Hearing
from ..extras import import_extra
from ..progress import quiet_transformers
from .generation import evaluation_mode
from .metrics import Score, ratio_score

_TOKENS_A_SECOND = 12
_TOKENS_AT_LEAST = 24
"""So many tokens a sound may have: nobody speaks faster, and a model that repeats itself has to stop."""

Normalize = Callable[[str], str]


@dataclass(frozen=True)
class Spoken:
    """Sounds with what is said in them."""

    rows: Sequence[tuple[Clip, str]]
    language: str | None = None
    """For a model that is told of none."""


def transcribe(
    model: nn.Module,
    processor: Any,
    clips: Sequence[Clip],
    *,
    batch_size: int = 8,
    language: str | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The text of each sound, by the likeliest token at a time; ``tick`` gets the number of sounds done.

    Task and language are those of the model's settings of generation, if no language is given.

    Raises:
        BadRow: if a sound cannot be heard.
    """
    hearing = Hearing(processor.feature_extractor)
    # a window is filled up, which Whisper has to be told
    masked = hearing.window is not None and model.can_generate()  # type: ignore[operator]
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    texts: list[str] = []
    with evaluation_mode(model):
        for begin in range(0, len(clips), batch_size):
            sounds = [hearing.read(clip) for clip in clips[begin : begin + batch_size]]
            if hearing.window:
                sounds = [sound[: hearing.window * hearing.rate] for sound in sounds]
            features = {
                name: value.to(device, dtype if value.is_floating_point() else value.dtype)
                for name, value in hearing.make_features(sounds, masked=masked).items()
            }
            seconds = max(map(len, sounds)) / hearing.rate
            texts += _write(model, processor, features, seconds, language)
            tick(len(sounds))
    return texts


def _write(
    model: Any, processor: Any, features: dict[str, torch.Tensor], seconds: float, language: str | None
) -> list[str]:
    if not model.can_generate():
        # CTC: the likeliest letter of each frame
        return list(processor.batch_decode(model(**features).logits.argmax(-1)))
    config = model.config
    room: int = getattr(config, "max_target_positions", 0) or getattr(config, "max_position_embeddings", 0) or 448
    # four tokens say language and task
    most = min(_TOKENS_AT_LEAST + round(_TOKENS_A_SECOND * seconds), room - 4)
    told = {"language": language} if language and getattr(model.generation_config, "lang_to_id", None) else {}
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=most, max_length=None, num_beams=1, do_sample=False)
    with quiet_transformers():
        ids = model.generate(**features, **told, generation_config=settings)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


@dataclass(frozen=True)
class TranscriptScores:
    """How far texts are from what was said."""

    metrics: dict[str, Score]
    """wer and cer: words, or characters, that are wrong, missing or too many, for each that was said."""
    right: list[bool]
    """Whether a text has no such word."""


def score_transcripts(said: Sequence[str], wanted: Sequence[str], normalize: Normalize, seed: int) -> TranscriptScores:
    """Error rates over all texts, each normalized first.

    Raises:
        UsageError: if jiwer is not installed.
    """
    jiwer = import_extra("jiwer", "a word error rate")
    ways: dict[str, tuple[Any, Callable[[str], list[str]]]] = {
        "wer": (jiwer.process_words, str.split),
        "cer": (jiwer.process_characters, list),
    }
    pairs = [(normalize(text).strip(), normalize(other).strip()) for text, other in zip(said, wanted, strict=True)]
    metrics: dict[str, Score] = {}
    wrong: list[int] = []
    for name, (compare, split) in ways.items():
        errors = []
        for text, other in pairs:
            if not other:
                # jiwer knows no reference of nothing: all that was written is too much
                errors.append(len(split(text)))
                continue
            found = compare(other, text)
            errors.append(found.substitutions + found.deletions + found.insertions)
        metrics[name] = ratio_score(errors, [len(split(other)) for _, other in pairs], seed)
        wrong = wrong or errors
    return TranscriptScores(metrics, [count == 0 for count in wrong])


def choose_normalizer(model: Any, processor: Any, language: str | None = None) -> Normalize:
    """Whisper's own way to compare texts: that for English, or the one for every language."""
    settings = getattr(model, "generation_config", None)
    language = str(language or getattr(settings, "language", None) or "").strip("<|>")
    alone = getattr(settings, "is_multilingual", None) is False
    if alone or language in ("en", "english"):
        return EnglishTextNormalizer(getattr(processor.tokenizer, "english_spelling_normalizer", None) or {})
    return BasicTextNormalizer()
