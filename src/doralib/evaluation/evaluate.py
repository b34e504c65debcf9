"""Score a model on tasks: choices by log-likelihood, generated answers, perplexity; with intervals and mistakes."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..adapters.inference import unchanged
from ..data.encoding import check_ids, context_length, encode, has_encoder, pad_token, user_text
from ..data.forecaster import is_forecaster
from ..data.layouts import choose_tasks
from ..data.layouts.task import LayoutTask
from ..data.picture_rows import ask_with_pictures
from ..data.picture_tokens import PictureEncoder, PictureText, make_encoder
from ..data.prepare import BadRow, Row
from ..data.sounds import Clip, name_clip
from ..data.windows import Origin
from ..errors import DoraError, UsageError, collecting, list_some, raise_all
from ..progress import Tick, log_progress
from .bertscore import load_encoder
from .captions import caption_scores, check_caption_tools
from .classifier import find_head_kind, list_labels, predict_labels, predict_sounds, predict_tags
from .forecast import Scoring, score_origins
from .generation import Sampling, answer_each, answer_pictures, evaluation_mode, stop_at_turn_end, tell_ends
from .likelihood import LikelihoodRequest, log_likelihoods, option_requests, score_options, text_requests
from .llava.answers import answer_left, check_answered
from .llava.scores import SCORED, rate_answers
from .metrics import (
    Score,
    accuracy_score,
    classification_scores,
    confusion_counts,
    label_scores,
    mean_score,
    perplexity_scores,
    tag_score,
    yes_no_scores,
)
from .overlap import rouge_scores, translation_scores
from .task import (
    BertScoreTask,
    CaptionTask,
    ChoiceTask,
    ClassificationTask,
    Example,
    FirstLabelTask,
    FolderTask,
    ForecastExample,
    ForecastTask,
    GenerationTask,
    LlavaExample,
    LlavaTask,
    PerplexityTask,
    SoundLabelTask,
    SummaryTask,
    Task,
    TranslationTask,
    VqaTask,
    WordsTask,
    YesNoTask,
    read_examples,
)
from .transcripts import Spoken, choose_normalizer, score_transcripts, transcribe
from .visual import VisualModel, score_answers
from .vqa import normalize_answer, soft_accuracy, vqa_scores

WRONG_KEPT = 20
"""Mistakes of a task that a result shows."""
_SHOWN = 12
_MOSTLY = 0.5
"""From here on a soft accuracy counts as right, where answers are compared row by row."""


@dataclass(frozen=True)
class TaskResult:
    """What one model got on one task."""

    task: str
    kind: str
    n: int
    metrics: Mapping[str, Score]
    confusion: Mapping[str, Any] | None
    """``{"labels": [...], "counts": [[...]]}``; a row of counts is a true label."""
    wrong: tuple[Mapping[str, str], ...]
    """At most 20 mistakes: prompt, expected, predicted, and for generated answers the whole output."""
    cut: int
    """Prompts longer than the model takes, whose beginning was left out."""
    seconds: float
    right: str = ""
    """A 1 for each row that was answered rightly and a 0 for the others, in their order; empty for a perplexity."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "wrong": list(self.wrong)}

    @classmethod
    def from_json(cls, values: Any, file: Path) -> Self:
        """What `to_json` made, as it stands in a file.

        Raises:
            DoraError: if the file is damaged.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DoraError(f"{file} is damaged: a task's result, {where}: {first['msg']}") from None


@dataclass(frozen=True)
class _Scorer:
    """Everything a task is scored with."""

    model: nn.Module
    tokenizer: Tokenizer
    batch_size: int
    seed: int
    tick: Callable[[float], None]
    """Takes the share of the task done since the last call."""
    encoder: PictureEncoder | None = None
    """Of a model that takes pictures."""


@dataclass(frozen=True)
class _Outcome:
    """The part of a TaskResult that depends on the kind of task."""

    metrics: Mapping[str, Score]
    said: Sequence[str] = ()
    """What was said to each example, where it can be wrong."""
    right: Sequence[bool] = ()
    outputs: Sequence[str] = ()
    """The generated texts that the answers were found in."""
    cut: int = 0
    confusion: Mapping[str, Any] | None = None
    asked: Sequence[Example] = ()
    """The answers that were wanted, where an example has several; empty: one of each example."""


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> dict[str, TaskResult]:
    """The result of each task by its name; all data is read and checked before the model is asked anything.

    The model is a causal language model of `transformers`, adapted or not; every module gets its mode back. The batch
    size changes no result beyond rounding, ``limit`` takes the first rows of each task alone, ``seed`` is that of the
    bootstrap, and ``tick`` gets each step forward by the name of the task, whose total is 1; without it a log line now
    and then says how far it is.

    Raises:
        UsageError: if data, columns or labels do not fit, for all tasks at once.
        DoraError: if the data is damaged or the model gives NaN.
    """
    encoder = None
    if hasattr(tokenizer, "image_processor"):
        encoder = make_encoder(model, tokenizer)
        tokenizer = encoder.tokenizer
    _check_sight(tasks, encoder)
    check_answered(tasks)
    examples = read_all(tasks, limit)
    if any(task.chat and isinstance(task, GenerationTask) for task in tasks):
        tell_ends(model, tokenizer)
    results = {}
    tick = tick or log_progress()
    with evaluation_mode(model), unchanged(model):
        for task in tasks:
            advance = lambda share, name=task.name: tick(name, share, 1.0)
            seeing = encoder if task.shows else None
            scorer = _Scorer(model, tokenizer, batch_size, seed, advance, seeing)
            results[task.name] = _result(task, examples[task.name], scorer)
            advance(1.0)
    return results


def _check_sight(tasks: Sequence[Task], encoder: PictureEncoder | None) -> None:
    """Check that the model takes what the tasks show it."""
    if encoder is None and (blind := [task for task in tasks if task.shows]):
        words = {"images": "pictures", "videos": "videos"}
        shown = " and ".join(words[name] for name in words if any(getattr(task, name) for task in blind))
        names = ", ".join(task.name for task in blind)
        raise UsageError(f"task {names}: asks about {shown}, and this model takes text alone")
    if encoder is not None and encoder.video_place is None and any(task.videos for task in tasks):
        names, takes = ", ".join(task.name for task in tasks if task.videos), type(encoder.processor).__name__
        raise UsageError(f"task {names}: asks about videos, and {takes} takes pictures alone")


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


def encode_prompts(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, *, whole: bool = False
) -> list[list[int]]:
    """The tokens of each prompt as the model gets them, whole for an encoder."""
    texts = [_prompt_text(task, example, tokenizer) for example in examples]
    return [encode(tokenizer, text, chat=task.chat, whole=whole) for text in texts]


def read_all(tasks: Sequence[Task], limit: int | None = None) -> dict[str, list[Example]]:
    """The examples of every task by its name.

    Raises:
        DoraError: with everything that is wrong with the data of all tasks.
    """
    examples: dict[str, list[Example]] = {}
    problems: list[DoraError] = []
    for task in tasks:
        with collecting(problems):
            examples[task.name] = read_examples(task, limit)
    raise_all(problems)
    return examples


def _result(task: Task, examples: list[Example], scorer: _Scorer) -> TaskResult:
    start = time.perf_counter()
    head = find_head_kind(scorer.model)
    if isinstance(task, SoundLabelTask):
        return _rate_labels(task, examples, scorer)
    if head in ("tokens", "audio-class") or (head is not None and not isinstance(task, ClassificationTask)):
        raise UsageError(
            f"task {task.name}: kind {task.kind} asks a language model, and this one gives labels ({head})"
        )
    if is_forecaster(scorer.model) != isinstance(task, ForecastTask):
        asks = "a model of series" if isinstance(task, ForecastTask) else "a language model"
        raise UsageError(f"task {task.name}: kind {task.kind} asks {asks}, not a {type(scorer.model).__name__}")
    if isinstance(task, WordsTask):
        spoken = Spoken(_list_sounds(examples), task.language)
        if not hasattr(scorer.tokenizer, "feature_extractor"):
            raise UsageError(f"task {task.name}: kind words asks a model of speech, and this one hears nothing")
        asked_of = (scorer.model, scorer.tokenizer, scorer.batch_size, scorer.seed, scorer.tick)
        return rate_transcripts(task.name, spoken, *asked_of)
    if has_encoder(scorer.model) and head is None and not isinstance(task, GenerationTask | FolderTask):
        raise UsageError(
            f"task {task.name}: kind {task.kind} asks how likely a text is to go on so, and this model writes its own; "
            "use a kind with generated text, such as exact_match or translation"
        )
    run = next(run for kind, run in _RUNS.items() if isinstance(task, kind))
    outcome = run(task, examples, scorer)
    asked = outcome.asked or examples
    wrong = [
        {"prompt": asked[i].prompt, "expected": asked[i].answer, "predicted": outcome.said[i]}
        | ({"output": outcome.outputs[i]} if outcome.outputs else {})
        for i, right in enumerate(outcome.right)
        if not right
    ]
    return TaskResult(
        task=task.name,
        kind=task.kind,
        n=len(asked),
        metrics=outcome.metrics,
        confusion=outcome.confusion,
        wrong=tuple(wrong[:WRONG_KEPT]),
        cut=outcome.cut,
        seconds=time.perf_counter() - start,
        right="".join("01"[right] for right in outcome.right),
    )


def _rate_labels(task: SoundLabelTask, examples: Sequence[Example], scorer: _Scorer) -> TaskResult:
    """The result of a model with a head for sounds.

    Raises:
        UsageError: if it has none, or the task's labels are none of its own.
    """
    if find_head_kind(scorer.model) != "audio-class":
        raise UsageError(f"task {task.name}: kind audio-class asks a model that gives labels to sounds")
    own = list_labels(scorer.model)
    if unknown := sorted({example.answer for example in examples} - set(own)):
        told = list_some(unknown, _SHOWN, ", ")
        raise UsageError(f"task {task.name}: the data has the labels {told}, and the model's are {', '.join(own)}")
    rows = _list_sounds(examples)
    return rate_sounds(task.name, rows, scorer.model, scorer.tokenizer, scorer.batch_size, scorer.seed, scorer.tick)


def _list_sounds(examples: Sequence[Example]) -> list[tuple[Clip, str]]:
    """Sounds, and what is right of each."""
    return [(example.sound, example.answer) for example in examples if example.sound is not None]


def _run_choice(task: ChoiceTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    chosen, cut = _choose(task, examples, scorer, task.length_normalise)
    said = [example.options[index].strip() for index, example in zip(chosen, examples, strict=True)]
    right = [index == example.truth for index, example in zip(chosen, examples, strict=True)]
    return _Outcome({"accuracy": accuracy_score(right, scorer.seed)}, said, right, cut=cut)


def _run_classification(task: ClassificationTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    names = list(task.labels)
    if find_head_kind(scorer.model) is None:
        _check_labels(task, examples[0], scorer)
        chosen, cut = _choose(task, examples, scorer)
    else:
        chosen, cut = _ask_head(task, examples, scorer), 0
    counts_LL = confusion_counts([example.truth for example in examples], chosen, len(names))
    return _Outcome(
        metrics=classification_scores(counts_LL, scorer.seed),
        said=[names[index] for index in chosen],
        right=[index == example.truth for index, example in zip(chosen, examples, strict=True)],
        cut=cut,
        confusion={"labels": names, "counts": counts_LL.tolist()},
    )


def _ask_head(task: ClassificationTask, examples: Sequence[Example], scorer: _Scorer) -> list[int]:
    """The label that a classifier's head gives each example, by the task's names or the texts of its labels."""
    own, names = list_labels(scorer.model), list(task.labels)
    texts = [text.strip() for text in task.labels.values()]
    if not set(own) <= {*names, *texts}:
        raise UsageError(
            f"task {task.name}: the model's labels are {', '.join(own)}, and the task's {', '.join(names)}; write the "
            "task's labels as {value in the data: label of the model}"
        )
    prompts = [_prompt(task, example, scorer) for example in examples]
    found = predict_labels(scorer.model, scorer.tokenizer, prompts, scorer.batch_size, scorer.tick)
    return [names.index(own[i]) if own[i] in names else texts.index(own[i]) for i in found]


def _run_generation(task: GenerationTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    texts, cut = _answer(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    right = [answer == example.answer for answer, example in zip(said, examples, strict=True)]
    return _Outcome({"accuracy": accuracy_score(right, scorer.seed)}, said, right, texts, cut)


def _run_first_label(task: FirstLabelTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    texts, cut = _answer(task, examples, scorer)
    asked, written = [], []
    for example, text in zip(examples, texts, strict=True):
        answers = task.divide(example.answer)
        # of several answers, those too many do not count and those missing are wrong
        parts = task.divide(task.counted(text).strip())
        asked += [replace(example, answer=answer) for answer in answers]
        written += [*parts, *[""] * len(answers)][: len(answers)]
    known = {task.normal(label) for label in task.labels or [example.answer for example in asked]}
    labels = [task.find_label(text, known) for text in written]
    right = [label == task.normal(example.answer) for label, example in zip(labels, asked, strict=True)]
    # FinLoRA's F1 takes a wrong text whole: "negative ." is no "negative" that was said wrongly
    said = [example.answer if yes else text for example, text, yes in zip(asked, written, right, strict=True)]
    metrics = label_scores([example.answer for example in asked], said, scorer.seed)
    return _Outcome(metrics, labels, right, written, cut, asked=asked)


def _run_bertscore(task: BertScoreTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    # first, so that nothing is generated in vain
    encoder = load_encoder(task.scorer, task.scorer_layer, f"task {task.name}: scorer")
    texts, cut = _answer(task, examples, scorer)
    found = encoder.compare([task.predicted(text) for text in texts], [example.answer for example in examples])
    metrics = {
        f"bertscore_{name}": mean_score([getattr(each, name) for each in found], scorer.seed)
        for name in ("f1", "precision", "recall")
    }
    return _Outcome(metrics, cut=cut)


def _run_translation(task: TranslationTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    texts, cut = _answer(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    metrics = translation_scores(said, [example.answer for example in examples], task.tokenize, scorer.seed)
    return _Outcome(metrics, cut=cut)


def _run_summary(task: SummaryTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    texts, cut = _answer(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    return _Outcome(rouge_scores(said, [example.answer for example in examples], scorer.seed), cut=cut)


def _answer(task: GenerationTask, examples: Sequence[Example], scorer: _Scorer) -> tuple[list[str], int]:
    """What the model writes after each prompt, and how many prompts were cut: at their end for an encoder."""
    sampling = Sampling(num_beams=task.num_beams, stop=task.stop)
    if scorer.encoder is not None:
        return _answer_about(task, examples, scorer, sampling, task.max_new_tokens), 0
    encoded = has_encoder(scorer.model)
    prompts = encode_prompts(task, examples, scorer.tokenizer, whole=encoded)
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


def _answer_about(
    task: Task, examples: Sequence[Example], scorer: _Scorer, sampling: Sampling, max_new_tokens: int
) -> list[str]:
    """What a model that takes pictures writes about those of each example."""
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


def _run_vqa(task: VqaTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    texts, cut = _answer(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    # one answer is compared in the form that several are
    alone = [len(set(example.answers)) == 1 for example in examples]
    given = [
        [normalize_answer(answer) for answer in example.answers] if one else example.answers
        for example, one in zip(examples, alone, strict=True)
    ]
    heard = [normalize_answer(text) if one else text for text, one in zip(said, alone, strict=True)]
    right = [soft_accuracy(text, answers) >= _MOSTLY for text, answers in zip(heard, given, strict=True)]
    return _Outcome(vqa_scores(heard, given, scorer.seed), said, right, texts, cut)


def _run_yes_no(task: YesNoTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    texts, cut = _answer(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    right = [answer == example.answer for answer, example in zip(said, examples, strict=True)]
    return _Outcome(
        yes_no_scores([one.answer == "yes" for one in examples], [each == "yes" for each in said], scorer.seed),
        said,
        right,
        texts,
        cut,
    )


def _run_caption(task: CaptionTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    # first, so that nothing is generated in vain
    check_caption_tools(f"task {task.name}")
    texts, cut = _answer(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    return _Outcome(caption_scores(said, [example.answers for example in examples], scorer.seed), cut=cut)


def _run_llava(task: LlavaTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    questions = [each.question for each in examples if isinstance(each, LlavaExample)]

    def answer(places: Sequence[int]) -> list[str]:
        share = lambda done: scorer.tick(done * len(places) / len(examples))
        texts, _ = _answer(task, [examples[i] for i in places], replace(scorer, tick=share))
        return [text.strip() for text in texts]

    said = answer_left(task, questions, answer, scorer.batch_size)
    if task.benchmark not in SCORED:
        return _Outcome({})
    rated = rate_answers(task.benchmark, questions, said, scorer.seed)
    return _Outcome(rated.metrics, rated.read, rated.right, said)


def _run_perplexity(task: PerplexityTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    limit = min(task.window, context_length(scorer.model) or task.window)
    pieces = [
        text_requests(scorer.tokenizer, _prompt(task, example, scorer), example.answer, chat=task.chat, limit=limit)
        for example in examples
    ]
    logp = iter(_log_likelihoods(scorer, [request for found, _ in pieces for request in found]))
    loss_N = [-sum(itertools.islice(logp, len(found))) for found, _ in pieces]
    tokens_N = [sum(request.length for request in found) for found, _ in pieces]
    bytes_N = [len(example.answer.encode()) for example in examples]
    return _Outcome(perplexity_scores(loss_N, tokens_N, bytes_N, scorer.seed), cut=sum(cut for _, cut in pieces))


def _run_folder(task: FolderTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    own, rows = choose_tasks(task.settings())[task.task], [one.row for one in examples if one.row is not None]
    if task.videos:
        said = _answer_about(task, examples, scorer, Sampling(num_beams=own.num_beams), own.target_tokens)
    else:
        said = _ask_features(task, own, rows, scorer)
    said = [text.strip() for text in said]
    metrics, values = score_answers(own, rows, said, seed=scorer.seed)
    return _Outcome(metrics, said, [value > 0 for value in values])


def _ask_features(task: FolderTask, own: LayoutTask, rows: Sequence[Row], scorer: _Scorer) -> list[str]:
    """What a VL-BART answers to each row."""
    if not hasattr(scorer.model, "visual_embedding"):
        raise UsageError(
            f"task {task.name}: asks a VL-BART about features, and this is a {type(scorer.model).__name__}; "
            "value/tvqa and its like show videos themselves"
        )
    settings = task.settings()
    if (limit := context_length(scorer.model)) is not None:
        settings = settings.model_copy(update={"max_length": min(limit, settings.max_length)})
    return VisualModel(scorer.model, scorer.tokenizer, settings, scorer.batch_size).answer(own, rows, scorer.tick)


def _run_forecast(task: ForecastTask, examples: Sequence[Example], scorer: _Scorer) -> _Outcome:
    origins = [each.origin for each in examples if isinstance(each, ForecastExample)]
    # a model of series has no tokenizer, but what it looked back on in training
    form = getattr(scorer.tokenizer, "settings", None)
    context = task.series.context or (form.context if form else None)
    scoring = Scoring(context, task.series.season, scorer.batch_size, scorer.seed)
    return _Outcome(score_origins(scorer.model, origins, scoring, scorer.tick))


_RUNS: dict[type[Task], Callable[[Any, Sequence[Example], _Scorer], _Outcome]] = {
    ChoiceTask: _run_choice,
    ClassificationTask: _run_classification,
    FirstLabelTask: _run_first_label,
    BertScoreTask: _run_bertscore,
    VqaTask: _run_vqa,
    YesNoTask: _run_yes_no,
    LlavaTask: _run_llava,
    CaptionTask: _run_caption,
    TranslationTask: _run_translation,
    SummaryTask: _run_summary,
    GenerationTask: _run_generation,
    PerplexityTask: _run_perplexity,
    FolderTask: _run_folder,
    ForecastTask: _run_forecast,
}


def _choose(task: Task, examples: Sequence[Example], scorer: _Scorer, normalize: str = "none") -> tuple[list[int], int]:
    """The most probable option of each example, and how many prompts were cut."""
    if scorer.encoder is not None:
        return _choose_about(task, examples, scorer, scorer.encoder, normalize), 0
    asked = [_ask(task, row, example, scorer) for row, example in enumerate(examples, 1)]
    logp = iter(_log_likelihoods(scorer, [request for found, _ in asked for request in found]))
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
    task: Task, examples: Sequence[Example], scorer: _Scorer, encoder: PictureEncoder, normalize: str
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


def _ask(task: Task, row: int, example: Example, scorer: _Scorer) -> tuple[list[LikelihoodRequest], bool]:
    """The requests for the options of one row."""
    limit, prompt = context_length(scorer.model), _prompt(task, example, scorer)
    try:
        return option_requests(scorer.tokenizer, prompt, example.options, chat=task.chat, limit=limit)
    except UsageError as error:
        raise UsageError(f"task {task.name}, row {row}: {error}") from None


def _check_labels(task: ClassificationTask, example: Example, scorer: _Scorer) -> None:
    """Every label must be a text of its own to the tokenizer."""
    requests, _ = _ask(task, 1, example, scorer)
    by_tokens: dict[tuple[int, ...], str] = {}
    for label, request in zip(example.options, requests, strict=True):
        other = by_tokens.setdefault(request.tokens[request.start :], label)
        if other != label:
            raise UsageError(
                f"task {task.name}: the tokenizer maps {other!r} and {label!r} to the same tokens; choose other labels"
            )


def _log_likelihoods(scorer: _Scorer, requests: Sequence[LikelihoodRequest]) -> list[float]:
    check_ids(scorer.model, scorer.tokenizer, (request.tokens for request in requests), "the task's rows")
    pad = pad_token(scorer.tokenizer, scorer.model)
    return log_likelihoods(scorer.model, requests, batch_size=scorer.batch_size, pad=pad, tick=scorer.tick)


def _prompt(task: Task, example: Example, scorer: _Scorer) -> str:
    return _prompt_text(task, example, scorer.tokenizer)


def _prompt_text(task: Task, example: Example, tokenizer: Tokenizer) -> str:
    return user_text(tokenizer, example.prompt) if task.chat else example.prompt
