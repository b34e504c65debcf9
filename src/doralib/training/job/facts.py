"""What a job is about to do, in words."""

import logging
import math
from collections.abc import Iterator

from torch import nn
from transformers import TrainingArguments

from ...adapters.registry import trainable
from ...data.survey import LEFT, RIGHT
from ...recipe import Recipe
from ..sampler import count_rows
from ..task_batches import make_task_batches
from .load import Job

log = logging.getLogger(__name__)

_ORDERS = {
    "group_by_length": "rows of like length together",
    "random": "drawn anew for each epoch",
    "sequential": "as the objective needs it",
}


def describe(job: Job) -> None:
    """Log what is about to happen, before it does."""
    recipe = job.plan.recipe
    log.info(list_facts(job))
    for line in list_row_notes(job):
        log.info(line)
    if job.data.first:
        log.info(f"the first row, what is learned of it in {LEFT} {RIGHT}:\n{job.data.first}")
    if recipe.adapter.method == "full" and next(iter(trainable(job.model)))[1].dtype.itemsize < 4:
        log.info("full fine-tuning in 16 bits loses small steps; model.dtype: float32 keeps them")


def list_facts(job: Job) -> dict[str, str]:
    """What the job is, by a word for each."""
    plan, report, validation = job.plan, job.data.train.report, job.data.validation
    recipe = plan.recipe
    changed, total = count_parameters(job.model)
    answers, (steps, per_epoch) = _count_answers(plan.args), count_steps(job)
    each = (
        f"{answers} answers to each prompt"
        if answers
        else f"about {report.tokens / per_epoch:,.0f} {job.data.unit} each"
    )
    held_out = f", {validation.report.kept:,} held out" if validation else ""
    return {
        "model": f"{recipe.model.describe()}, {total:,} parameters",
        "method": _method(recipe),
        **({} if recipe.objective.kind == "sft" else {"objective": recipe.objective.kind}),
        "trained": f"{changed:,} parameters, {changed / total:.2%}",
        "rows": f"{report.kept:,} of {report.rows:,}{held_out}",
        job.data.unit: f"{report.tokens:,} an epoch, {report.label_tokens:,} of them count in the loss",
        **job.data.told,
        "steps": f"{steps:,}, {per_epoch:,} an epoch of {each}",
        "order": _ORDERS.get(plan.args.train_sampling_strategy, plan.args.train_sampling_strategy),
        "run": str(plan.run.path),
    }


def list_row_notes(job: Job) -> Iterator[str]:
    """Rows that are left out, cut or divided, a line each."""
    for name, prepared in (("train", job.data.train), ("validation", job.data.validation)):
        for line in prepared.report.lines() if prepared else []:
            yield f"{name}: {line}" if not line.startswith(" ") else line


def _method(recipe: Recipe) -> str:
    adapter = recipe.adapter
    if adapter.method == "full":
        return adapter.method
    # vera and dvora have no scale
    alpha = "" if adapter.has_bank else f", alpha {adapter.lora_alpha:g}"
    return f"{adapter.method}, r {adapter.r}{alpha}"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained, and all."""
    return sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())


def _count_answers(args: TrainingArguments) -> int:
    """To each prompt, times how often they are learned from; 0 where the rows hold the answers."""
    return int(getattr(args, "num_generations", 0) * getattr(args, "num_iterations", 1))


def count_steps(job: Job) -> tuple[int, int]:
    """Optimizer steps in all, and of one epoch."""
    args, kinds = job.plan.args, job.data.kinds
    batches = make_task_batches(job.data, args)
    several = len(set(kinds)) > 1
    rows = count_rows(kinds, args.train_batch_size * args.world_size) if several else len(job.data.train.rows)
    return _steps(args, rows * max(_count_answers(args), 1), None if batches is None else len(batches))


def _steps(args: TrainingArguments, rows: int, batches: float | None = None) -> tuple[int, int]:
    batches = batches or rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch
