"""A model with a head, of speech or of series on rows that are no task: those held out of a run's data."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..adapters.inference import unchanged
from ..data.sounds import Clip, name_clip
from ..data.windows import Origin
from ..progress import Tick, log_progress
from .classifier import find_head_kind, list_labels, predict_labels, predict_sounds, predict_tags
from .forecast import Scoring, score_origins
from .generation import evaluation_mode
from .metrics import classification_scores, confusion_counts, tag_score
from .result import WRONG_KEPT, TaskResult
from .transcripts import Spoken, choose_normalizer, score_transcripts, transcribe


def score_labels(
    name: str,
    rows: Sequence[tuple[list[str], list[str]]],
    model: nn.Module,
    tokenizer: Tokenizer,
    batch_size: int,
    seed: int,
    tick: Tick | None,
) -> TaskResult:
    """The result of a model with a head on rows of words, or of one text, and their labels."""
    start = time.perf_counter()
    labels = list_labels(model)
    tick = tick or log_progress()
    advance = lambda share: tick(name, share, 1.0)
    by_word = find_head_kind(model) == "tokens"
    with evaluation_mode(model), unchanged(model):
        if by_word:
            found = predict_tags(model, tokenizer, [words for words, _ in rows], batch_size, advance)
        else:
            texts = [words[0] for words, _ in rows]
            found = [[i] for i in predict_labels(model, tokenizer, texts, batch_size, advance)]
    advance(1.0)
    pairs = [
        (labels.index(said), got)
        for (_, truth), given in zip(rows, found, strict=True)
        for said, got in zip(truth, given, strict=True)
        if got >= 0 and said in labels
    ]
    counts_LL = confusion_counts([truth for truth, _ in pairs], [got for _, got in pairs], len(labels))
    metrics = classification_scores(counts_LL, seed)
    if by_word:
        metrics["token_f1"] = tag_score(counts_LL, [i for i, label in enumerate(labels) if label != "O"], seed)
    told = lambda numbers: " ".join(labels[i] for i in numbers if i >= 0)
    wrong = [
        {"prompt": " ".join(words), "expected": " ".join(truth), "predicted": told(given)}
        for (words, truth), given in zip(rows, found, strict=True)
        if " ".join(truth) != told(given)
    ]
    confusion = {"labels": labels, "counts": counts_LL.tolist()}
    seconds = time.perf_counter() - start
    kind = "tokens" if by_word else "classify"
    return TaskResult(name, kind, len(rows), metrics, confusion, tuple(wrong[:WRONG_KEPT]), 0, seconds)


def rate_sounds(
    name: str,
    rows: Sequence[tuple[Clip, str]],
    model: nn.Module,
    extractor: Any,
    batch_size: int,
    seed: int,
    tick: Callable[[float], None],
) -> TaskResult:
    """The result of a model with a head on sounds and their labels; ``tick`` as for `rate_transcripts`."""
    start, labels = time.perf_counter(), list_labels(model)
    with unchanged(model):
        found = predict_sounds(model, extractor, [clip for clip, _ in rows], batch_size, tick)
    truth = [labels.index(label) for _, label in rows]
    counts_LL = confusion_counts(truth, found, len(labels))
    wrong = [
        {"prompt": name_clip(clip).rpartition("/")[2], "expected": label, "predicted": labels[got]}
        for (clip, label), got in zip(rows, found, strict=True)
        if labels[got] != label
    ]
    right = "".join("01"[one == other] for one, other in zip(truth, found, strict=True))
    confusion = {"labels": labels, "counts": counts_LL.tolist()}
    metrics, seconds = classification_scores(counts_LL, seed), time.perf_counter() - start
    return TaskResult(name, "audio-class", len(rows), metrics, confusion, tuple(wrong[:WRONG_KEPT]), 0, seconds, right)


def rate_transcripts(
    name: str,
    spoken: Spoken,
    model: nn.Module,
    processor: Any,
    batch_size: int,
    seed: int,
    tick: Callable[[float], None],
) -> TaskResult:
    """The result of a model on sounds and what is said in them; ``tick`` gets the share done since its last call."""
    start, rows, language = time.perf_counter(), spoken.rows, spoken.language
    advance = lambda done: tick(done / len(rows))
    clips, wanted = [clip for clip, _ in rows], [text for _, text in rows]
    with unchanged(model):
        said = transcribe(model, processor, clips, batch_size=batch_size, language=language, tick=advance)
    found = score_transcripts(said, wanted, choose_normalizer(model, processor, language), seed)
    wrong = [
        {"prompt": name_clip(clip).rpartition("/")[2], "expected": text, "predicted": heard}
        for clip, text, heard, right in zip(clips, wanted, said, found.right, strict=True)
        if not right
    ]
    right = "".join("01"[each] for each in found.right)
    seconds = time.perf_counter() - start
    return TaskResult(name, "words", len(rows), found.metrics, None, tuple(wrong[:WRONG_KEPT]), 0, seconds, right)


def score_series(
    name: str, origins: Sequence[Origin], model: nn.Module, scoring: Scoring, tick: Tick | None
) -> TaskResult:
    """The result of a model of series on what followed these origins."""
    start = time.perf_counter()
    tick = tick or log_progress()
    advance = lambda share: tick(name, share, 1.0)
    with evaluation_mode(model), unchanged(model):
        scores = score_origins(model, origins, scoring, advance)
    advance(1.0)
    return TaskResult(name, "forecast", len(origins), scores, None, (), 0, time.perf_counter() - start)
