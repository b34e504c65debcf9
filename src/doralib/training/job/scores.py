"""A job's scores and samples, before and after training."""

import logging
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from ... import files
from ...adapters.adapt import disabled
from ...evaluation.evaluate import evaluate
from ...evaluation.metrics import Score, compare_answers
from ...evaluation.result import TaskResult
from ...runs import checkpointing
from ..distributed import is_main
from ..modality import KeepingModality, ScoringModality
from .load import Job

log = logging.getLogger(__name__)


def score_before(job: Job) -> None:
    """Scores and samples of the untouched model, unless an earlier session has them."""
    recipe, run = job.plan.recipe, job.plan.run
    if not recipe.eval.before or run.trained.exists() or checkpointing.find_newest(run.checkpoints):
        return
    untouched = nullcontext() if recipe.adapter.method == "full" else disabled(job.model)
    with untouched:
        score(job, "before")
        sample(job, "before")


def score(job: Job, when: str) -> None:
    """Score the model on the job's tasks, unless an earlier session has.

    Args:
        job: With the tasks.
        when: before or after; after is compared to before.
    """
    run, settings = job.plan.run, job.plan.recipe.eval
    results = run.read(run.results, {})
    scoring = isinstance(job.plan.modality, ScoringModality)
    if when in results or not (job.plan.tasks or (scoring and job.data.validation)):
        return
    named = [*(task.name for task in job.plan.tasks), *(["the validation rows"] if scoring else [])]
    log.info(f"scoring the model {when} training: {', '.join(named)}")
    found = evaluate(
        job.model,
        job.processor,
        job.plan.tasks,
        batch_size=settings.batch_size,
        limit=settings.limit,
        seed=job.plan.recipe.seed,
        tick=job.tick,
    )
    if isinstance(job.plan.modality, ScoringModality):
        found |= job.plan.modality.score(
            job.model,
            job.processor,
            job.plan.recipe.data,
            batch_size=settings.batch_size,
            seed=job.plan.recipe.seed,
            tick=job.tick,
        )
    change = _compare_to_before(results.get("before", {}), found, job.plan.recipe.seed) if when == "after" else {}
    if is_main():
        scored = {name: result.to_json() for name, result in found.items()}
        told = {name: {"accuracy": asdict(score)} for name, score in change.items()}
        if when == "after" and isinstance(job.plan.modality, KeepingModality):
            run.write_predictions(job.plan.modality.predictions)
        files.write_json(run.results, {**results, when: scored, **({"change": told} if told else {})})
    for name, result in found.items():
        scores = ", ".join(f"{metric} {score.value:.3f}" for metric, score in result.metrics.items())
        if name in change:
            scores += f"; accuracy {change[name].value:+.3f} ({change[name].low:+.3f} to {change[name].high:+.3f})"
        log.info(f"  {name}: {scores}")


def _compare_to_before(before: dict[str, Any], after: dict[str, TaskResult], seed: int) -> dict[str, Score]:
    """How much more was right than before, for the tasks whose rows are the same."""
    rows = {name: before.get(name, {}).get("right", "") for name in after}
    return {
        name: compare_answers(rows[name], result.right, seed)
        for name, result in after.items()
        if result.right and "accuracy" in result.metrics and len(rows[name]) == len(result.right)
    }


def sample(job: Job, when: str) -> None:
    """Keep what the model answers to a few prompts of the data."""
    run = job.plan.run
    asked = run.read(run.samples, [sample.to_json() for sample in job.data.samples])
    if not asked:
        return
    answers = job.plan.modality.samples(job.model, job.processor, job.plan.recipe.data, asked)
    if is_main():
        files.write_json(run.samples, [{**sample, when: text} for sample, text in zip(asked, answers, strict=True)])
