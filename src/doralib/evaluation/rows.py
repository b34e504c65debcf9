"""The rows of a task's data as examples."""

from dataclasses import replace
from pathlib import Path

from ..data.pictures import find_root
from ..data.prepare import Row
from ..data.templates import columns_in
from ..errors import DoraError, UsageError, did_you_mean
from .example import Example
from .media import find_pictures
from .task import Task
from .task_media import FolderTask, ForecastTask, LlavaTask


def read_examples(task: Task, limit: int | None = None) -> list[Example]:
    """The examples of the task's first rows, all columns checked first.

    Raises:
        UsageError: if the data is not there, has no rows, or lacks a column.
        DoraError: if the data is damaged, a value is missing in some rows, or an answer cannot be given.
    """
    from ..data.rows import keep_undecoded, read_dataset  # noqa: PLC0415  a task itself is checked without `datasets`

    if task.data is None:
        what = "the folder" if isinstance(task, FolderTask | LlavaTask) else "a file"
        raise UsageError(f"task {task.name} comes without data; name it as {task.name}=PATH, {what} with its rows")
    if isinstance(task, FolderTask | LlavaTask | ForecastTask):
        return task.read(limit)
    data = task.data
    if task.in_folder and Path(data).expanduser().is_dir():
        data = str(Path(data).expanduser() / task.in_folder)
    dataset = keep_undecoded(read_dataset(data, f"task {task.name}: data", task.split))
    rows: list[Row] = list(dataset.select(range(min(len(dataset), limit or len(dataset)))))
    known = dataset.column_names
    templates = [*task.templates(), *task.shows]
    wanted = list(dict.fromkeys(column for template in templates for column in columns_in(template)))
    if unknown := [column for column in wanted if column not in known]:
        lines = [f"  there is no column {column!r}{did_you_mean(column, known)}" for column in unknown]
        raise UsageError("\n".join([f"task {task.name}: {task.data} has the columns {', '.join(known)}", *lines]))
    absent = {column: sum(row[column] is None for row in rows) for column in wanted}
    if partly := ", ".join(f"{column!r} in {count}" for column, count in absent.items() if count):
        raise DoraError(f"task {task.name}: of {len(rows)} rows, a value is missing for {partly}; fill or remove them")
    if not task.shows:
        return task.examples(rows)
    within = task.in_folder and task.root and data != task.data
    root = str(Path(task.data).expanduser() / str(task.root)) if within else task.root
    shown = find_pictures(task.name, rows, find_root(root, data), task.images, task.videos)
    return [replace(example, pictures=seen) for example, seen in zip(task.examples(rows), shown, strict=True)]
