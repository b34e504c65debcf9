"""The life of a job, whatever its data are: check everything, load, score, train, score again, report."""

import logging
from contextlib import nullcontext
from pathlib import Path

from ... import files
from ...checkpoints.parts import settle_parts
from ...progress import Tick
from ...recipe import Recipe
from ...runs.card import write_card
from ...runs.divergence import find_divergence
from ...runs.record import read_run
from ...runs.report import write_report
from ...runs.use import closing_lines
from ..distributed import is_main, wait_for_all
from ..outlook import Outlook
from ..plan.estimate import check_fits
from ..sharding import take_over_launcher
from .check import check_job, compose, estimate_memory, with_model_settings
from .facts import count_steps, describe, list_facts, list_row_notes
from .load import load_job
from .optimize import Interrupted, run_training
from .scores import sample, score, score_before

__all__ = ["Interrupted", "fine_tune", "look_ahead", "train"]

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tick: Tick | None = None,
    check_memory: bool = True,
) -> Path:
    """Fine-tune as the recipe says; returns the run folder. How it goes is logged, at the level INFO.

    Args:
        recipe: Complete.
        resume: Go on from the newest whole checkpoint of the run that stands at `out`.
        overwrite: Delete the run that stands there; only once model and data are loaded.
        tick: Gets each step of training and scoring; losses too, which are logged where nobody draws them.
        check_memory: Refuse a run that cannot fit into the device's memory, by `estimate_run`.

    Raises:
        UsageError: before the model is loaded, for everything in the recipe that cannot be, all at once; after, for
            targets that the model does not have.
        LossNotFinite: if the loss became NaN; the checkpoints before it stay.
        Interrupted: after Ctrl-C, once a checkpoint is saved.
    """
    run = fine_tune(recipe, resume=resume, overwrite=overwrite, tick=tick, check_memory=check_memory)
    if is_main():
        write_card(run)
        record = read_run(run)
        if (divergence := find_divergence(record)) is not None:
            log.warning(str(divergence))
        log.info(closing_lines(record, write_report(run)))
    return run


def fine_tune(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tick: Tick | None = None,
    check_memory: bool = True,
) -> Path:
    """`train` without its report, for those who run many jobs and report on all of them."""
    recipe = take_over_launcher(recipe.with_whole_path())
    plan = compose(check_job(recipe, resume=resume, overwrite=overwrite))
    if not is_main():
        # the first process speaks for all
        logging.getLogger("doralib").setLevel(logging.WARNING)
        tick = None
    if (memory := estimate_memory(plan)) is not None:
        log.info(f"memory: {memory.summary()}")
        if check_memory:
            check_fits(memory)
    job = load_job(plan, tick)
    # the others may still be checking what stands there
    wait_for_all()
    with plan.run.open(recipe, **plan.asked) if is_main() else nullcontext():
        if is_main() and job.data.survey is not None:
            files.write_json(plan.run.survey, job.data.survey)
        wait_for_all()
        describe(job)
        score_before(job)
        if not plan.run.trained.exists():
            run_training(job)
        score(job, "after")
        sample(job, "after")
    return plan.run.path


def look_ahead(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, check_out: bool = True, tick: Tick | None = None
) -> Outlook:
    """Everything that can be known of a job without its model's weights; nothing is written.

    Args:
        recipe: Complete.
        resume: As `train` would be told.
        overwrite: Likewise.
        check_out: Whether a run that stands at `out` is an error where neither is given.
        tick: Gets each step of tokenizing.

    Raises:
        UsageError: for all that `train` would refuse before the first step, all at once where it is in the recipe.
    """
    plan = check_job(recipe.with_whole_path(), resume=resume, overwrite=overwrite, check_out=check_out)
    with settle_parts(plan.recipe.model, recipe.seed, empty=True) as settings:
        plan = with_model_settings(plan, settings)
        job = load_job(plan, tick, empty=True)
        steps, per_epoch = count_steps(job)
        facts, notes = list_facts(job), tuple(list_row_notes(job))
        return Outlook(plan.recipe, facts, notes, steps, per_epoch, estimate_memory(plan), job.data)
