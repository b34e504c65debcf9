"""Answers to LLaVA-1.5's evaluations: made where they are missing, kept as they come, handed on to servers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from ..task import Task
from ..task_media import LlavaTask, check_scored
from .files import AnswerFile, check_workbooks, name_upload, write_upload
from .questions import LlavaQuestion

_BATCHES_KEPT = 8
"""After so many batches answers are written."""


@dataclass(frozen=True)
class AnswerFolder:
    """A folder with a file of answers for each evaluation, and those for servers."""

    path: Path
    model: str
    """Whose answers they are."""

    def name_file(self, task: LlavaTask) -> Path:
        """The file of the answers to a task's questions."""
        return self.path / f"{task.benchmark}.jsonl"

    def name_uploaded(self, task: LlavaTask) -> Path | None:
        """The file for a task's server; None: there is none."""
        name = name_upload(task.benchmark)
        return None if name is None else self.path / name


_kept: ContextVar[AnswerFolder | None] = ContextVar("_kept", default=None)


@contextmanager
def keeping_answers(folder: AnswerFolder | None) -> Iterator[None]:
    """Let evaluations inside the block keep their answers in a folder, and take from it those that are there."""
    token = _kept.set(folder)
    try:
        yield
    finally:
        _kept.reset(token)


def check_answered(tasks: Sequence[Task]) -> None:
    """Check that each task gives a score here, or keeps its answers.

    Raises:
        UsageError: if it does neither, or what writes the file for its server is not installed.
    """
    if _kept.get() is None:
        check_scored(tasks)
    else:
        for task in tasks:
            check_upload(task)


def answer_left(
    task: LlavaTask,
    questions: Sequence[LlavaQuestion],
    answer: Callable[[Sequence[int]], list[str]],
    batch_size: int,
) -> list[str]:
    """The answer to each question; those that are kept already are not made again.

    Args:
        answer: What the model says to the questions at these places.

    Raises:
        UsageError: if the kept answers are another model's.
    """
    kept = _kept.get()
    if kept is None:
        return answer(range(len(questions)))
    file = AnswerFile(kept.name_file(task), task.benchmark)
    said = file.read(questions, kept.model)
    left, size = [i for i in range(len(questions)) if i not in said], batch_size * _BATCHES_KEPT
    for places in (left[at : at + size] for at in range(0, len(left), size)):
        texts = answer(places)
        file.append([questions[i] for i in places], texts, kept.model)
        said |= dict(zip(places, texts, strict=True))
    told = [said[i] for i in range(len(questions))]
    send_answers(task, questions, told, kept)
    return told


def check_upload(task: Task) -> None:
    """Check that what writes the file for a task's server is installed.

    Raises:
        UsageError: if it is not.
    """
    if isinstance(task, LlavaTask) and task.benchmark == "mmbench":
        check_workbooks(task.name)


def send_answers(task: LlavaTask, questions: Sequence[LlavaQuestion], said: Sequence[str], kept: AnswerFolder) -> None:
    """Write the file for a task's server, if it has one."""
    if path := kept.name_uploaded(task):
        write_upload(task.benchmark, task.folder, questions, said, path)
