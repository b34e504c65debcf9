"""The result of a file of answers that LLaVA's own scripts, or others, have written."""

import time
from pathlib import Path

from ..result import WRONG_KEPT, TaskResult
from ..task_media import LlavaTask, check_scored
from .answers import AnswerFolder, check_upload, send_answers
from .files import AnswerFile
from .questions import read_asked
from .scores import SCORED, rate_answers


def rate_answer_file(
    task: LlavaTask, path: Path, *, limit: int | None = None, seed: int = 0, kept: AnswerFolder | None = None
) -> TaskResult:
    """The result of the answers in a file; the pictures are not needed.

    Args:
        kept: Where the file for the task's server goes.

    Raises:
        UsageError: if answers are missing, or a server scores the task and `kept` is not given.
        DoraError: if a file is damaged.
    """
    start = time.perf_counter()
    if kept is None:
        check_scored([task])
    else:
        check_upload(task)
    questions = read_asked(task.benchmark, task.folder)[:limit]
    said = AnswerFile(path, task.benchmark).read_all(questions)
    if kept is not None:
        send_answers(task, questions, said, kept)
    spent = time.perf_counter() - start
    if task.benchmark not in SCORED:
        return TaskResult(task.name, task.kind, len(questions), {}, None, (), 0, spent)
    rated = rate_answers(task.benchmark, questions, said, seed)
    wrong = [
        {"prompt": each.told, "expected": each.answers[0], "predicted": read, "output": text}
        for each, read, text, right in zip(questions, rated.read, said, rated.right, strict=True)
        if not right
    ]
    right = "".join("01"[each] for each in rated.right)
    metrics, shown = rated.metrics, tuple(wrong[:WRONG_KEPT])
    return TaskResult(task.name, task.kind, len(questions), metrics, None, shown, 0, spent, right)
