"""`doralib eval --answers`, and of a file of answers: LLaVA's evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..errors import UsageError
from .console import console

if TYPE_CHECKING:
    from ..evaluation.llava.answers import AnswerFolder
    from ..evaluation.result import TaskResult
    from ..evaluation.task import Task


def is_answer_file(model: str, given: Mapping[str, Any]) -> bool:
    """Whether what is to be scored is a file of answers.

    Raises:
        UsageError: if it is, and options of a model are given.
    """
    if Path(model).suffix != ".jsonl":
        return False
    if told := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{' and '.join(told)}: {model} is a file of answers, made already")
    return True


def keep_answers(folder: Path | None, model: str, tasks: "Sequence[Task]", *, resume: bool) -> "AnswerFolder | None":
    """Where answers are kept.

    Raises:
        UsageError: if no task has such, or files of an earlier call are there that are not gone on with.
    """
    from ..disk import check_writable
    from ..evaluation.llava.answers import AnswerFolder
    from ..evaluation.task_media import LlavaTask

    if folder is None:
        return None
    asked = [task for task in tasks if isinstance(task, LlavaTask)]
    if tasks and not asked:
        raise UsageError("--answers: none of these tasks is one of LLaVA's evaluations, llava/gqa and so on")
    check_writable(folder, "--answers", folder=True)
    kept = AnswerFolder(folder, model)
    there = [str(kept.name_file(task)) for task in asked if kept.name_file(task).exists()]
    if there and not resume:
        raise UsageError(f"--answers: {', '.join(there)}: there already; go on with --resume, or name another folder")
    return kept


def rate_file(
    task: "Task", chosen: "Sequence[Task]", settings: Mapping[str, Any], kept: "AnswerFolder | None"
) -> "TaskResult":
    """The result of a file of answers to a task.

    Raises:
        UsageError: if there is another task too, or it is none of LLaVA's evaluations.
    """
    from ..evaluation.llava.made_elsewhere import rate_answer_file
    from ..evaluation.task_media import LlavaTask
    from ..files import find_file

    path = find_file(Path(settings["model"]))
    if len(chosen) > 1 or not isinstance(task, LlavaTask):
        raise UsageError(
            f"{path} is a file of answers, to one of LLaVA's evaluations: name it, as in --tasks llava/gqa=eval"
        )
    return rate_answer_file(task, path, limit=settings["limit"], seed=settings["seed"], kept=kept)


def tell_files(kept: "AnswerFolder", tasks: "Sequence[Task]", *, made: bool) -> None:
    """Say where answers are, and what goes to which server."""
    from ..evaluation.llava.scores import SCORED
    from ..evaluation.task_media import LlavaTask

    for task in tasks:
        if isinstance(task, LlavaTask):
            path, answers = kept.name_uploaded(task), [f"answers in {kept.name_file(task)}"] * made
            whom = "its own script" if task.benchmark in SCORED else "its server"
            console.print(Text(f"{task.name}: {'; '.join([*answers, *([f'{path} for {whom}'] if path else [])])}"))
