"""Scores in a file that grows task by task, so that an evaluation that was stopped goes on where it was."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DoraError, UsageError
from ..files import read_json, write_json
from .result import TaskResult
from .task import Task


class ResultsFile:
    """One model's results.

    Args:
        path: The file, JSON.
        settings: Everything that results depend on: the model, its base, limit, seed.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._results: dict[str, TaskResult] = {}
        self._tasks: dict[str, Any] = {}

    def read(self, tasks: Sequence[Task]) -> dict[str, TaskResult]:
        """Read the results of these tasks that are there already, if the file is.

        Raises:
            UsageError: if the file is of another model or of other settings.
            DoraError: if it is damaged.
        """
        if not self.path.is_file():
            return {}
        found = read_json(self.path)
        before, after, asked = (found.get(key) for key in ("settings", "after", "tasks"))
        if before is None:
            raise UsageError(f"--resume: {self.path} does not say how it was made; write to another file")
        if not all(isinstance(each, dict) for each in (before, after, asked)) or set(after) - set(asked):
            raise DoraError(f"{self.path} is damaged: settings, tasks and after do not fit together")
        if other := [key for key, value in self.settings.items() if before.get(key) != value]:
            told = ", ".join(f"{key} {before.get(key)!r} and not {self.settings[key]!r}" for key in other)
            raise UsageError(f"--resume: {self.path} was made with {told}; take it back, or write to another file")
        now = {task.name: task.model_dump(mode="json") for task in tasks}
        # of a task that has changed the result means nothing any more
        kept = [name for name in after if now.get(name, asked[name]) == asked[name]]
        self._results = {name: TaskResult.from_json(after[name], self.path) for name in kept}
        self._tasks = {name: asked[name] for name in kept}
        return {name: self._results[name] for name in now if name in self._results}

    def add(self, task: Task, result: TaskResult) -> None:
        """Write one more result."""
        self._results[task.name] = result
        self._tasks[task.name] = task.model_dump(mode="json")
        after = {name: result.to_json() for name, result in self._results.items()}
        write_json(
            self.path,
            {"model": self.settings["model"], "settings": self.settings, "tasks": self._tasks, "after": after},
        )
