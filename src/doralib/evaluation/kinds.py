"""A task of each kind, scored: what the model said to its examples, and the metrics of that."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.encoding import context_length
from ..data.layouts import choose_tasks
from ..data.layouts.task import LayoutTask
from ..data.prepare import Row
from ..errors import UsageError
from .asking import (
    Scorer,
    answer_about,
    answer_examples,
    check_labels,
    choose_options,
    find_log_likelihoods,
    write_prompt,
)
from .bertscore import load_encoder
from .captions import caption_scores, check_caption_tools
from .classifier import find_head_kind, list_labels, predict_labels
from .example import Example, ForecastExample, LlavaExample
from .forecast import Scoring, score_origins
from .generation import Sampling
from .likelihood import text_requests
from .llava.answers import answer_left
from .llava.scores import SCORED, rate_answers
from .metrics import (
    Score,
    accuracy_score,
    classification_scores,
    confusion_counts,
    label_scores,
    mean_score,
    perplexity_scores,
    yes_no_scores,
)
from .overlap import rouge_scores, translation_scores
from .task import ChoiceTask, ClassificationTask, PerplexityTask, Task
from .task_generated import (
    BertScoreTask,
    CaptionTask,
    FirstLabelTask,
    GenerationTask,
    SummaryTask,
    TranslationTask,
    VqaTask,
    YesNoTask,
)
from .task_media import FolderTask, ForecastTask, LlavaTask
from .visual import VisualModel, score_answers
from .vqa import normalize_answer, soft_accuracy, vqa_scores

_MOSTLY = 0.5
"""From here on a soft accuracy counts as right, where answers are compared row by row."""


@dataclass(frozen=True)
class KindResult:
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


def score_kind(task: Task, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    """What a model got on a task's examples, by the task's kind.

    Raises:
        UsageError: if the model cannot be asked so.
        DoraError: if the model gives NaN, or a picture can no longer be read.
    """
    return next(score for kind, score in _KINDS.items() if isinstance(task, kind))(task, examples, scorer)


def _score_choice(task: ChoiceTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    chosen, cut = choose_options(task, examples, scorer, task.length_normalise)
    said = [example.options[index].strip() for index, example in zip(chosen, examples, strict=True)]
    right = [index == example.truth for index, example in zip(chosen, examples, strict=True)]
    return KindResult({"accuracy": accuracy_score(right, scorer.seed)}, said, right, cut=cut)


def _score_classification(task: ClassificationTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    names = list(task.labels)
    if find_head_kind(scorer.model) is None:
        check_labels(task, examples[0], scorer)
        chosen, cut = choose_options(task, examples, scorer)
    else:
        chosen, cut = _ask_head(task, examples, scorer), 0
    counts_LL = confusion_counts([example.truth for example in examples], chosen, len(names))
    return KindResult(
        metrics=classification_scores(counts_LL, scorer.seed),
        said=[names[index] for index in chosen],
        right=[index == example.truth for index, example in zip(chosen, examples, strict=True)],
        cut=cut,
        confusion={"labels": names, "counts": counts_LL.tolist()},
    )


def _ask_head(task: ClassificationTask, examples: Sequence[Example], scorer: Scorer) -> list[int]:
    """The label that a classifier's head gives each example, by the task's names or the texts of its labels."""
    own, names = list_labels(scorer.model), list(task.labels)
    texts = [text.strip() for text in task.labels.values()]
    if not set(own) <= {*names, *texts}:
        raise UsageError(
            f"task {task.name}: the model's labels are {', '.join(own)}, and the task's {', '.join(names)}; write the "
            "task's labels as {value in the data: label of the model}"
        )
    prompts = [write_prompt(task, example, scorer.tokenizer) for example in examples]
    found = predict_labels(scorer.model, scorer.tokenizer, prompts, scorer.batch_size, scorer.tick)
    return [names.index(own[i]) if own[i] in names else texts.index(own[i]) for i in found]


def _score_generation(task: GenerationTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    texts, cut = answer_examples(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    right = [answer == example.answer for answer, example in zip(said, examples, strict=True)]
    return KindResult({"accuracy": accuracy_score(right, scorer.seed)}, said, right, texts, cut)


def _score_first_label(task: FirstLabelTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    texts, cut = answer_examples(task, examples, scorer)
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
    return KindResult(metrics, labels, right, written, cut, asked=asked)


def _score_bertscore(task: BertScoreTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    # first, so that nothing is generated in vain
    encoder = load_encoder(task.scorer, task.scorer_layer, f"task {task.name}: scorer")
    texts, cut = answer_examples(task, examples, scorer)
    found = encoder.compare([task.predicted(text) for text in texts], [example.answer for example in examples])
    metrics = {
        f"bertscore_{name}": mean_score([getattr(each, name) for each in found], scorer.seed)
        for name in ("f1", "precision", "recall")
    }
    return KindResult(metrics, cut=cut)


def _score_translation(task: TranslationTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    texts, cut = answer_examples(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    metrics = translation_scores(said, [example.answer for example in examples], task.tokenize, scorer.seed)
    return KindResult(metrics, cut=cut)


def _score_summary(task: SummaryTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    texts, cut = answer_examples(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    return KindResult(rouge_scores(said, [example.answer for example in examples], scorer.seed), cut=cut)


def _score_vqa(task: VqaTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    texts, cut = answer_examples(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    # one answer is compared in the form that several are
    alone = [len(set(example.answers)) == 1 for example in examples]
    given = [
        [normalize_answer(answer) for answer in example.answers] if one else example.answers
        for example, one in zip(examples, alone, strict=True)
    ]
    heard = [normalize_answer(text) if one else text for text, one in zip(said, alone, strict=True)]
    right = [soft_accuracy(text, answers) >= _MOSTLY for text, answers in zip(heard, given, strict=True)]
    return KindResult(vqa_scores(heard, given, scorer.seed), said, right, texts, cut)


def _score_yes_no(task: YesNoTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    texts, cut = answer_examples(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    right = [answer == example.answer for answer, example in zip(said, examples, strict=True)]
    return KindResult(
        yes_no_scores([one.answer == "yes" for one in examples], [each == "yes" for each in said], scorer.seed),
        said,
        right,
        texts,
        cut,
    )


def _score_caption(task: CaptionTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    # first, so that nothing is generated in vain
    check_caption_tools(f"task {task.name}")
    texts, cut = answer_examples(task, examples, scorer)
    said = [task.predicted(text) for text in texts]
    return KindResult(caption_scores(said, [example.answers for example in examples], scorer.seed), cut=cut)


def _score_llava(task: LlavaTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    questions = [each.question for each in examples if isinstance(each, LlavaExample)]

    def answer(places: Sequence[int]) -> list[str]:
        share = lambda done: scorer.tick(done * len(places) / len(examples))
        texts, _ = answer_examples(task, [examples[i] for i in places], replace(scorer, tick=share))
        return [text.strip() for text in texts]

    said = answer_left(task, questions, answer, scorer.batch_size)
    if task.benchmark not in SCORED:
        return KindResult({})
    rated = rate_answers(task.benchmark, questions, said, scorer.seed)
    return KindResult(rated.metrics, rated.read, rated.right, said)


def _score_perplexity(task: PerplexityTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    limit = min(task.window, context_length(scorer.model) or task.window)
    prompts = [write_prompt(task, example, scorer.tokenizer) for example in examples]
    pieces = [
        text_requests(scorer.tokenizer, prompt, example.answer, chat=task.chat, limit=limit)
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    logp = iter(find_log_likelihoods(scorer, [request for found, _ in pieces for request in found]))
    loss_N = [-sum(itertools.islice(logp, len(found))) for found, _ in pieces]
    tokens_N = [sum(request.length for request in found) for found, _ in pieces]
    bytes_N = [len(example.answer.encode()) for example in examples]
    return KindResult(perplexity_scores(loss_N, tokens_N, bytes_N, scorer.seed), cut=sum(cut for _, cut in pieces))


def _score_folder(task: FolderTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    own, rows = choose_tasks(task.settings())[task.task], [one.row for one in examples if one.row is not None]
    if task.videos:
        said = answer_about(task, examples, scorer, Sampling(num_beams=own.num_beams), own.target_tokens)
    else:
        said = _ask_features(task, own, rows, scorer)
    said = [text.strip() for text in said]
    metrics, values = score_answers(own, rows, said, seed=scorer.seed)
    return KindResult(metrics, said, [value > 0 for value in values])


def _ask_features(task: FolderTask, own: LayoutTask, rows: Sequence[Row], scorer: Scorer) -> list[str]:
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


def _score_forecast(task: ForecastTask, examples: Sequence[Example], scorer: Scorer) -> KindResult:
    origins = [each.origin for each in examples if isinstance(each, ForecastExample)]
    # a model of series has no tokenizer, but what it looked back on in training
    form = getattr(scorer.tokenizer, "settings", None)
    context = task.series.context or (form.context if form else None)
    scoring = Scoring(context, task.series.season, scorer.batch_size, scorer.seed)
    return KindResult(score_origins(scorer.model, origins, scoring, scorer.tick))


_KINDS: dict[type[Task], Callable[[Any, Sequence[Example], Scorer], KindResult]] = {
    ChoiceTask: _score_choice,
    ClassificationTask: _score_classification,
    FirstLabelTask: _score_first_label,
    BertScoreTask: _score_bertscore,
    VqaTask: _score_vqa,
    YesNoTask: _score_yes_no,
    LlavaTask: _score_llava,
    CaptionTask: _score_caption,
    TranslationTask: _score_translation,
    SummaryTask: _score_summary,
    GenerationTask: _score_generation,
    PerplexityTask: _score_perplexity,
    FolderTask: _score_folder,
    ForecastTask: _score_forecast,
}
