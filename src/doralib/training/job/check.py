"""What can be checked and read of a job without its model."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ...checkpoints.parts import check_model_is_there, compose_parts, settle_parts
from ...data.rows import RawRows, hash_sources, list_inputs
from ...errors import DoraError, collecting, raise_all
from ...evaluation.rows import read_examples
from ...evaluation.task import Task
from ...evaluation.task_file import load_tasks
from ...evaluation.task_media import check_scored
from ...recipe import ModelSettings, Recipe
from ...runs.folder import RunFolder
from ..arguments import make_arguments
from ..distributed import is_main, wait_for_all
from ..modalities import choose_modality
from ..modality import DrawingModality, Modality
from ..plan.batch import Lengths
from ..plan.estimate import Estimate, estimate_run
from ..plan.sampled import Sampled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobPlan:
    """What could be checked and read without the model."""

    recipe: Recipe
    modality: Modality
    run: RunFolder
    rows: RawRows
    tasks: list[Task]
    args: TrainingArguments
    resume: bool
    asked: dict[str, Any]
    """How the run's folder is to be opened."""


def check_job(recipe: Recipe, *, resume: bool, overwrite: bool, check_out: bool = True) -> JobPlan:
    """Check everything that needs no model: settings, tasks, rows, the folder of the run.

    Raises:
        DoraError: with all that is wrong; a UsageError if one of them is.
    """
    run, modality = RunFolder(Path(recipe.out).expanduser()), choose_modality(recipe)
    problems: list[DoraError] = []
    tasks: list[Task] = []
    with collecting(problems):
        args = make_arguments(recipe, run.checkpoints)
    with collecting(problems):
        tasks = load_tasks(recipe.eval.tasks)
        check_scored(tasks)
        for task in tasks:
            with collecting(problems):
                read_examples(task, recipe.eval.limit)
    hashes = hash_sources(recipe.data)
    with collecting(problems):
        rows = modality.check_rows(recipe.data, recipe.seed)
        if isinstance(modality, DrawingModality):
            hashes |= modality.hash_rows(rows)
    with collecting(problems):
        check_model_is_there(recipe.model)
    parts = recipe.model.parts
    named = [recipe.model.path] if parts is None else [parts.language, parts.vision, parts.projector or parts.vision]
    inputs = [*named, *recipe.eval.tasks, *(task.data for task in tasks if task.data)]
    inputs += [str(file) for files in list_inputs(recipe.data).values() for file in files]
    asked: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "data": hashes,
        "inputs": inputs,
    }
    with collecting(problems):
        # the first process of several holds the lock, and may not yet have left an earlier job of them all
        if is_main() and check_out:
            run.check_free()
        if check_out:
            run.check(recipe, **asked)
    raise_all(problems)
    recipe = recipe.model_copy(update={"data": rows.settings or recipe.data})
    return JobPlan(recipe, modality, run, rows, tasks, args, resume, asked)


def estimate_memory(plan: JobPlan) -> Estimate | None:
    """What the run will take of its device; None of a model that cannot be built without its values."""
    sample = partial(Sampled, plan.recipe, plan.modality, plan.rows)
    try:
        found = estimate_run(plan.recipe, sample=sample, calibrate=False)
        assumed = isinstance(found.lengths, Lengths)
        if assumed and found.limit_bytes is not None and found.peak_bytes > found.limit_bytes / 4:
            # with every row as long as it may be; how long are they?
            found = estimate_run(plan.recipe, rows=plan.rows, calibrate=False)
    except Exception as error:  # noqa: BLE001  such a model may train all the same
        log.debug(f"memory: not estimated, {type(error).__name__}: {error}")
        return None
    return found


def with_model_settings(plan: JobPlan, settings: ModelSettings) -> JobPlan:
    """The plan with another model."""
    return replace(plan, recipe=plan.recipe.model_copy(update={"model": settings}))


def compose(plan: JobPlan) -> JobPlan:
    """The plan with the path of its model, which the first process composes of its parts if it is not there yet."""
    parts, seed = plan.recipe.model.parts, plan.recipe.seed
    if parts is None:
        return plan
    if is_main():
        compose_parts(parts, seed)
    wait_for_all()
    with settle_parts(plan.recipe.model, seed) as settings:
        return with_model_settings(plan, settings)
