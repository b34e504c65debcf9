"""Task files: read, checked, and those that come with doralib."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.sources import find_ending
from ..data.templates import columns_in
from ..errors import DoraError, UsageError, collecting, did_you_mean, raise_all
from ..families import is_family, read_family
from ..files import read_yaml
from .task import ChoiceTask, ClassificationTask, PerplexityTask, Task
from .task_generated import (
    BertScoreTask,
    CaptionTask,
    ExactMatchTask,
    FirstLabelTask,
    NumberTask,
    RegexTask,
    SummaryTask,
    TranslationTask,
    VqaTask,
    YesNoTask,
)
from .task_media import FolderTask, ForecastTask, LlavaTask, SoundLabelTask, WordsTask

KINDS: dict[str, type[Task]] = {
    "choice": ChoiceTask,
    "classification": ClassificationTask,
    "exact_match": ExactMatchTask,
    "regex": RegexTask,
    "number": NumberTask,
    "first_label": FirstLabelTask,
    "vqa": VqaTask,
    "yes_no": YesNoTask,
    "caption": CaptionTask,
    "llava": LlavaTask,
    "bertscore": BertScoreTask,
    "translation": TranslationTask,
    "summary": SummaryTask,
    "words": WordsTask,
    "audio-class": SoundLabelTask,
    "perplexity": PerplexityTask,
    "folder": FolderTask,
    "forecast": ForecastTask,
}
"""The kinds of task, by the name that a file gives."""
_FOLDER = Path(__file__).parent / "tasks"


def load_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names; each is a packaged name or a task file, with `=DATA` behind it for other data.

    The name of a group stands for all of its tasks; its data is a folder, in which each task knows its place.

    Raises:
        UsageError: listing every name, file, key and value that is wrong.
    """
    tasks: list[Task] = []
    problems: list[DoraError] = []
    for name in names:
        with collecting(problems):
            tasks += _load(name)
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    problems += [UsageError(f"two tasks are called {name!r}; give one of them another name") for name in twice]
    raise_all(problems)
    return tasks


def packaged_tasks() -> dict[str, Mapping[str, Any]]:
    """What the task files that come with doralib say, by the name of the task: NAME, or FOLDER/NAME."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(_FOLDER.rglob("*.yaml")):
        folder, values = path.parent.relative_to(_FOLDER), read_yaml(path)
        if is_family(values):
            found |= {(folder / name).as_posix(): variant.values for name, variant in read_family(path).items()}
        else:
            found[(folder / path.stem).as_posix()] = values
    return found


def _load(name: str) -> list[Task]:
    asked, _, data = name.partition("=")
    # a path may have the sign in it
    for path, given in ((name, None), (asked, data)):
        if Path(path).expanduser().is_file():
            return [read_task(Path(path).expanduser(), given)]
    known = packaged_tasks()
    if asked not in known:
        raise UsageError(
            f"there is no task {asked!r}, neither a file nor packaged{did_you_mean(asked, known)}\n"
            f"  packaged: {', '.join(known)}; or give the path of a .yaml file"
        )
    members = known[asked].get("group", [asked])
    if len(members) > 1 and data and not Path(data).expanduser().is_dir():
        raise UsageError(f"task {asked} is {len(members)} tasks: its data is a folder that holds theirs, not {data!r}")
    return [_make_task(each, {"name": each, **_lay_over_like(each, known[each], ())}, data or None) for each in members]


def read_task(path: Path, data: str | None = None) -> Task:
    """The task in a YAML file, on its own data or on others.

    Raises:
        UsageError: if the file is not a task, with every problem in it.
    """
    return _make_task(str(path), {"name": path.stem, **_values(path, ())}, data)


def _make_task(where: str, values: dict[str, Any], data: str | None) -> Task:
    if data is not None:
        values["data"] = data
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        said = "no kind" if kind is None else f"kind {kind!r}{did_you_mean(str(kind), KINDS)}"
        raise UsageError(f"{where}: {said}; known kinds: {', '.join(KINDS)}")
    try:
        task = KINDS[kind](**values)
        for template in task.templates():
            columns_in(template)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return task


def _values(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a task file, with those of the task that it names in `like` under them."""
    values = read_yaml(path)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path} must hold `key: value` lines, found {type(values).__name__}")
    data = values.get("data")
    # a relative file name is as seen from the task file; hub names stay as they are
    if isinstance(data, str) and ((path.parent / data).is_file() or find_ending(data)):
        values["data"] = str(path.parent / data)
    return _lay_over_like(str(path), values, above, path)


def _lay_over_like(
    where: str, values: Mapping[str, Any], above: tuple[Path, ...], path: Path | None = None
) -> dict[str, Any]:
    """The keys of a task over those of the task that it names in `like`."""
    if "like" not in values:
        return dict(values)
    like = str(values["like"])
    beside = path.parent / like if path else None
    known = packaged_tasks()
    if beside and beside.is_file():
        if beside in (*above, path):
            raise UsageError(f"{where}: like: {like!r} leads back to itself")
        found = _values(beside, (*above, *([path] if path else [])))
    elif like in known:
        found = _lay_over_like(like, known[like], above)
    else:
        raise UsageError(f"{where}: like: there is no task {like!r}{did_you_mean(like, known)}")
    own = {key: value for key, value in values.items() if key != "like"}
    return {key: value for key, value in found.items() if key != "name"} | own
