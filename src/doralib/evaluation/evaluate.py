"""Score a model on tasks; all of their data is read and checked before the model is asked anything."""

import time
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..adapters.inference import unchanged
from ..data.encoding import has_encoder
from ..data.forecaster import is_forecaster
from ..data.picture_encoder import PictureEncoder, make_encoder
from ..data.sounds import Clip
from ..errors import DoraError, UsageError, collecting, list_some, raise_all
from ..progress import Tick, log_progress
from .asking import Scorer
from .classifier import find_head_kind, list_labels
from .example import Example
from .generation import evaluation_mode, tell_ends
from .kinds import score_kind
from .llava.answers import check_answered
from .result import WRONG_KEPT, TaskResult
from .rows import read_examples
from .task import ClassificationTask, Task
from .task_generated import GenerationTask
from .task_media import FolderTask, ForecastTask, SoundLabelTask, WordsTask
from .transcripts import Spoken
from .validation import rate_sounds, rate_transcripts

_SHOWN = 12


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
            scorer = Scorer(model, tokenizer, batch_size, seed, advance, seeing)
            results[task.name] = _score_task(task, examples[task.name], scorer)
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


def _score_task(task: Task, examples: list[Example], scorer: Scorer) -> TaskResult:
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
    outcome = score_kind(task, examples, scorer)
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


def _rate_labels(task: SoundLabelTask, examples: Sequence[Example], scorer: Scorer) -> TaskResult:
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
