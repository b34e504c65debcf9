"""Folders of tasks about pictures and videos, in the layouts in which they are published."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets

from ...errors import DoraError, UsageError, collecting, did_you_mean, raise_all
from ...recipe import DataSettings
from ..frames import VIDEOS
from .task import Asked, Layout, LayoutTask, Split
from .value import VALUE
from .vlbart import VLBART

LAYOUTS: Mapping[str, Layout] = {"vlbart": VLBART, "value": VALUE}
_SPLITS = ("train", "validation", "test")
_COLUMNS = {
    **dict.fromkeys(("task", "key", "text", "told"), datasets.Value("large_string")),
    **dict.fromkeys(("features", "targets", "answers", "pictures"), datasets.List(datasets.Value("large_string"))),
    "scores": datasets.List(datasets.Value("float64")),
    "spare": datasets.Value("int64"),
}


def choose_tasks(settings: DataSettings) -> dict[str, LayoutTask]:
    """The tasks that data.tasks names, by name; all of the layout if it names none.

    Raises:
        UsageError: if there is no such task.
    """
    known = LAYOUTS[settings.layout].tasks
    if unknown := [name for name in settings.tasks if name not in known]:
        told = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise UsageError(f"data.tasks: layout {settings.layout} has no {told}; it has {', '.join(known)}")
    return {name: known[name] for name in settings.tasks or known}


def read_layout(settings: DataSettings, folder: str, split: str, setting: str) -> tuple[datasets.Dataset, list[str]]:
    """The rows of all tasks and where each stands, such as ``vqa:12``; of each task at most data.limit.

    Args:
        folder: Of the layout.
        split: train, validation or test.
        setting: Which names the folder, for messages.

    Raises:
        UsageError: for files that are missing, of all tasks at once.
        DoraError: if one is damaged.
    """
    if split not in _SPLITS:
        raise UsageError(f"data.validation_split: a layout has validation and test, not {split!r}")
    tasks, root = choose_tasks(settings), Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"{setting}: layout {settings.layout} is a folder, and there is none at {folder}")
    features = settings.features or LAYOUTS[settings.layout].features
    problems: list[DoraError] = []
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    numbers: list[str] = []
    for name, task in tasks.items():
        with collecting(problems):
            _check_there(name, task, root, cast("Split", split), setting)
            read = islice(task.read(root, cast("Split", split), features), settings.limit)
            for number, asked in enumerate(read, 1):
                _add_row(columns, name, asked)
                numbers.append(f"{name}:{number}")
    raise_all(problems)
    if not numbers:
        raise UsageError(f"{setting}: {folder} has no rows of {', '.join(tasks)} for {split}")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(_COLUMNS)), numbers


def make_questions(rows: datasets.Dataset, root: str | None) -> datasets.Dataset:
    """Rows of a layout of videos as questions with answers: the columns video, question and answer.

    Args:
        root: The folder of the videos; None: as the layout has them.
    """
    columns: dict[str, list[str]] = {"video": [], "question": [], "answer": []}
    for row in rows:
        stem = Path(row["pictures"][0])
        stem = (stem if root is None else Path(root).expanduser() / stem.name).absolute()
        files = [stem.with_name(stem.name + ending) for ending in VIDEOS]
        right = max(zip(row["scores"], row["targets"], strict=True), default=(0.0, ""))
        values = (str(next(filter(Path.is_file, files), files[0])), row["text"].strip(), right[1])
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return datasets.Dataset.from_dict(columns)


def list_layout_files(settings: DataSettings) -> dict[str, list[Path]]:
    """The files that rows are read from, by the setting that names their folder."""
    wanted = {"data.train": (str(settings.train), "train")}
    if isinstance(settings.validation, str):
        wanted["data.validation"] = (settings.validation, settings.validation_split)
    return {
        setting: [file for file in _list_files(settings, Path(folder).expanduser(), split) if file.is_file()]
        for setting, (folder, split) in wanted.items()
    }


def _list_files(settings: DataSettings, root: Path, split: str) -> Iterator[Path]:
    if split not in _SPLITS or any(name not in LAYOUTS[settings.layout].tasks for name in settings.tasks):
        return  # told by who reads the rows
    for task in choose_tasks(settings).values():
        yield from dict.fromkeys(task.list_files(root, cast("Split", split)))


def _check_there(name: str, task: LayoutTask, root: Path, split: Split, setting: str) -> None:
    if absent := [str(file) for file in task.list_files(root, split) if not file.is_file()]:
        raise UsageError(
            f"{setting}: task {name} is read from {' and '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} "
            "not there; fetch it, or leave the task out of data.tasks"
        )


def _add_row(columns: Mapping[str, list[Any]], task: str, asked: Asked) -> None:
    values = {**vars(asked), "task": task, "told": json.dumps(asked.told)}
    for name, column in columns.items():
        column.append(list(value) if isinstance(value := values[name], tuple) else value)
