"""Task files: read, checked, and those that come with doralib."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.sources import find_ending
from ..data.templates import columns_in
from ..errors import DoraError, UsageError, collecting, did_you_mean, raise_all
from ..files import read_yaml
from .task import KINDS, Task


def load_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names; each is a packaged name or a task file, with `=DATA` behind it for other data.

    Raises:
        UsageError: listing every name, file, key and value that is wrong.
    """
    tasks: list[Task] = []
    problems: list[DoraError] = []
    for name in names:
        with collecting(problems):
            tasks.append(_load(name))
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    problems += [UsageError(f"two tasks are called {name!r}; give one of them another name") for name in twice]
    raise_all(problems)
    return tasks


def packaged_tasks() -> dict[str, Path]:
    """The task files that come with doralib, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "tasks").glob("*.yaml"))}


def _load(name: str) -> Task:
    if path := _find(name):
        return read_task(path)
    asked, _, data = name.partition("=")
    if path := _find(asked):
        return read_task(path, data)
    known = packaged_tasks()
    raise UsageError(
        f"there is no task {asked!r}, neither a file nor packaged{did_you_mean(asked, known)}\n"
        f"  packaged: {', '.join(known)}; or give the path of a .yaml file"
    )


def _find(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.is_file() else packaged_tasks().get(name)


def read_task(path: Path, data: str | None = None) -> Task:
    """The task in a YAML file, on its own data or on others.

    Raises:
        UsageError: if the file is not a task, with every problem in it.
    """
    values = _values(path, ())
    values.setdefault("name", path.stem)
    if data is not None:
        values["data"] = data
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        said = "no kind" if kind is None else f"kind {kind!r}{did_you_mean(str(kind), KINDS)}"
        raise UsageError(f"{path}: {said}; known kinds: {', '.join(KINDS)}")
    try:
        task = KINDS[kind](**values)
        for template in task.templates():
            columns_in(template)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return task


def _values(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a task file, over those of the task it names in `like`."""
    values = read_yaml(path)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path} must hold `key: value` lines, found {type(values).__name__}")
    data = values.get("data")
    # a relative file name is as seen from the task file; hub names stay as they are
    if isinstance(data, str) and ((path.parent / data).is_file() or find_ending(data)):
        values["data"] = str(path.parent / data)
    if "like" not in values:
        return values
    like = str(values.pop("like"))
    found = path.parent / like if (path.parent / like).is_file() else packaged_tasks().get(like)
    if found is None:
        raise UsageError(f"{path}: like: there is no task {like!r}{did_you_mean(like, packaged_tasks())}")
    if found in above:
        raise UsageError(f"{path}: like: {like!r} leads back to itself")
    return {key: value for key, value in _values(found, (*above, path)).items() if key != "name"} | values
