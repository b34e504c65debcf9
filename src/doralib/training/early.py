"""What can be said against a recipe before torch, transformers and `datasets` are imported, which takes seconds."""

from ..checkpoints.kind import guess_kind
from ..checkpoints.parts import check_model_is_there
from ..data.columns import check_columns, check_label_columns
from ..data.detect import find_first, find_style
from ..data.sources import list_files
from ..data.tables import read_head
from ..errors import DoraError, collecting, raise_all
from ..evaluation.task_file import load_tasks
from ..recipe import DataSettings, Recipe
from .fields import find_unfit


def check_early(recipe: Recipe) -> None:
    """Check that the model is there, the files of data and their columns, and the names of tasks and in `training`.

    Raises:
        DoraError: with all that is wrong; a UsageError if one of them is.
    """
    problems: list[DoraError] = []
    trl = recipe.objective.kind != "sft"  # has more fields, and columns of its own, which are looked at later
    if not trl:
        problems += find_unfit(recipe.training)
    with collecting(problems):
        load_tasks(recipe.eval.tasks)
    with collecting(problems):
        check_model_is_there(recipe.model)
    # folders of tasks are looked at later, all files of a task together
    if not trl and not recipe.data.has_tasks:
        kind = guess_kind(recipe.model.path) if recipe.model.kind == "auto" else recipe.model.kind
        if kind == "forecast":
            problems += _find_missing_files(recipe.data)
        elif kind not in ("image-text", "speech", "audio-class"):  # whose columns are looked at later
            problems += find_data_problems(recipe.data, has_labels=kind in ("classify", "tokens"))
    raise_all(problems)


def find_data_problems(data: DataSettings, *, has_labels: bool = False) -> list[DoraError]:
    """What is wrong with the files of data and their columns; hub data sets are not looked at."""
    problems: list[DoraError] = []
    sources, styles = data.sources(), []
    for i, source in enumerate(sources):
        own, setting = data.of_source(source), "data.train" if len(sources) == 1 else f"data.train[{i}]"
        with collecting(problems):
            styles.append(_check_source(own, source.path, setting, own.split, has_labels=has_labels))
    if isinstance(data.validation, str):
        found = next((each for each in styles if each is not None), data)
        with collecting(problems):
            _check_source(found, data.validation, "data.validation", data.validation_split, has_labels=has_labels)
    return problems


def _find_missing_files(data: DataSettings) -> list[DoraError]:
    """Which files are not there; of series the columns say nothing before all values are read."""
    problems: list[DoraError] = []
    named = [("data.train", source.path) for source in data.sources()]
    named += [("data.validation", data.validation)] if isinstance(data.validation, str) else []
    for setting, path in named:
        with collecting(problems):
            list_files(path, setting)
    return problems


def _check_source(
    settings: DataSettings, path: str, setting: str, split: str, *, has_labels: bool
) -> DataSettings | None:
    """The settings with the style that was found; None where the columns are not known yet."""
    head = read_head(path, setting, split, settings.documents)
    if head is None:
        return None
    if has_labels:
        check_label_columns(settings, list(head), path)
        return settings
    found = find_style(settings, list(head), find_first(head), path)
    check_columns(found, list(head), path)
    return found
