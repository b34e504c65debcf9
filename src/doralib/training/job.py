"""`doralib train` for language models: check everything, load, score, train, score again, report."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments

from .. import files
from ..adapters.adapt import adapt, disabled
from ..adapters.registry import trainable
from ..adapters.save_load import load_adapter, save_adapter
from ..checkpoints.load import Loaded, load_base
from ..console import console
from ..data.encoding import context_length, encode
from ..data.prompts import STYLES, check_columns
from ..data.rows import RawRows, read_both
from ..data.tokenize import Sample, Tokenised, samples, tokenise
from ..errors import DoraError, UsageError, collecting, raise_all
from ..evaluation.evaluate import evaluate
from ..evaluation.generation import continuations
from ..evaluation.task import Task, read_examples
from ..evaluation.task_file import load_tasks
from ..recipe import DataSettings, Recipe
from ..runs import checkpointing as saving
from ..runs.folder import RunFolder
from ..runs.report import write_report
from . import arguments as training_keys
from .callbacks import MetricsFile, ProgressBar, StopOnSignal, Tensorboard
from .distributed import is_main, wait_for_all
from .trainer import AdapterTrainer, LossNotFinite

_SAMPLES = 5
_SAMPLE_TOKENS = 64


class Interrupted(DoraError):
    """Ctrl-C or SIGTERM during training; a checkpoint was saved."""

    exit_status = 130


@dataclass(frozen=True)
class _Plan:
    """What could be checked and read without the model."""

    recipe: Recipe
    run: RunFolder
    rows: RawRows
    tasks: list[Task]
    args: TrainingArguments
    resume: bool


@dataclass(frozen=True)
class _Job:
    """The plan with the adapted model and its data."""

    plan: _Plan
    model: Any
    tokenizer: Any
    train: Tokenised
    validation: Tokenised | None
    samples: list[Sample]


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Fine-tune as the recipe says; returns the run folder.

    Args:
        recipe: Complete.
        resume: Go on from the newest whole checkpoint of the run that stands at `out`.
        overwrite: Delete the run that stands there; only once model and data are loaded.

    Raises:
        UsageError: before the model is loaded, for everything in the recipe that cannot be, all at once; after, for
            targets that the model does not have.
        LossNotFinite: if the loss became NaN; the checkpoints before it stay.
        Interrupted: after Ctrl-C, once a checkpoint is saved.
    """
    run = fine_tune(recipe, resume=resume, overwrite=overwrite)
    if is_main():
        console.print(f"report: {write_report(run)}")
    return run


def fine_tune(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """`train` without its report, for those who run many jobs and report on all of them."""
    plan = _check(recipe, resume=resume, overwrite=overwrite)
    console.quiet = console.quiet or not is_main()
    job = _load(plan)
    # the others may still be checking what stands there
    wait_for_all()
    if is_main():
        plan.run.open(recipe, overwrite=overwrite)
    wait_for_all()
    _describe(job)
    _before(job)
    if not plan.run.trained.exists():
        _train(job)
    _after(job)
    return plan.run.path


def _check(recipe: Recipe, *, resume: bool, overwrite: bool) -> _Plan:
    run = RunFolder(Path(recipe.out).expanduser())
    problems: list[DoraError] = []
    with collecting(problems):
        run.check(recipe, resume=resume, overwrite=overwrite)
    with collecting(problems):
        args = training_keys.arguments(recipe, run.checkpoints)
    with collecting(problems):
        tasks = load_tasks(recipe.eval.tasks)
        for task in tasks:
            with collecting(problems):
                read_examples(task, recipe.eval.limit)
    with collecting(problems):
        rows = read_both(recipe.data, recipe.seed)
        check_columns(recipe.data, rows.train.column_names, recipe.data.train)
        if rows.validation is not None:
            check_columns(recipe.data, rows.validation.column_names, str(recipe.data.validation))
    raise_all(problems)
    return _Plan(recipe, run, rows, tasks, args, resume)


def _load(plan: _Plan) -> _Job:
    recipe = plan.recipe
    console.print(f"loading {recipe.model.path}")
    model, tokenizer = _model(plan)
    data = _within(recipe.data, model)
    train_rows = tokenise(plan.rows.train, plan.rows.train_numbers, data, tokenizer)
    kept, whole = train_rows.report.kept, plan.args.train_batch_size * plan.args.world_size
    if plan.args.dataloader_drop_last and kept < whole:
        raise UsageError(f"training.dataloader_drop_last: {kept} rows do not fill one batch of {whole}; none is left")
    held_out = None
    if plan.rows.validation is not None:
        held_out = tokenise(plan.rows.validation, plan.rows.validation_numbers, data, tokenizer)
    shown = samples(plan.rows, data, tokenizer, _SAMPLES)
    return _Job(plan, model, tokenizer, train_rows, held_out, shown)


def _within(settings: DataSettings, model: nn.Module) -> DataSettings:
    """With no more tokens a row than the model takes: beyond, learned positions fail and turned ones mean nothing."""
    limit = context_length(model)
    if limit is None or settings.max_length <= limit:
        return settings
    console.print(f"data.max_length is {settings.max_length}, and the model takes {limit} tokens: {limit} is used")
    return settings.model_copy(update={"max_length": limit})


def _model(plan: _Plan) -> Loaded:
    """Adapted, on its device, and trained already if an earlier session came that far."""
    recipe, trained = plan.recipe, plan.run.trained
    settings = recipe.model
    if plan.resume and trained.is_dir():
        settings = settings.model_copy(update={"path": str(trained)})
    model, tokenizer = load_base(settings)
    torch.manual_seed(recipe.seed)
    adapt(model, recipe.adapter)
    if plan.resume and trained.is_file():
        load_adapter(model, plan.run.path)
    model.to(plan.args.device)
    return model, tokenizer


def _describe(job: _Job) -> None:
    """What is about to happen, before it does."""
    plan, report = job.plan, job.train.report
    recipe = plan.recipe
    changed, total = _parameters(job.model)
    table = Table(show_header=False, box=None)
    steps, per_epoch = _steps(plan.args, report.kept)
    lines = {
        "model": f"{recipe.model.path}, {total:,} parameters",
        "method": _method(recipe),
        "trained": f"{changed:,} parameters, {changed / total:.2%}",
        "rows": f"{report.kept:,} of {report.rows:,}" + _held_out(job.validation),
        "tokens": f"{report.tokens:,} an epoch, {report.label_tokens:,} of them count in the loss",
        "steps": f"{steps:,}, {per_epoch:,} an epoch",
        "run": str(plan.run.path),
    }
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(table)
    for name, told in (("train", report), ("validation", job.validation and job.validation.report)):
        for line in told.lines() if told else []:
            console.print(f"{name}: {line}" if not line.startswith(" ") else line)
    if recipe.adapter.method == "full" and next(iter(trainable(job.model)))[1].dtype.itemsize < 4:
        console.print("full fine-tuning in 16 bits loses small steps; model.dtype: float32 keeps them")


def _method(recipe: Recipe) -> str:
    adapter = recipe.adapter
    if adapter.method == "full":
        return adapter.method
    # vera and dvora have no scale
    alpha = "" if adapter.has_bank else f", alpha {adapter.lora_alpha:g}"
    return f"{adapter.method}, r {adapter.r}{alpha}"


def _held_out(validation: Tokenised | None) -> str:
    return f", {validation.report.kept:,} held out" if validation else ""


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Trained, and all."""
    return sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())


def _steps(args: TrainingArguments, rows: int) -> tuple[int, int]:
    """Optimizer steps in all, and of one epoch."""
    batches = rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def _before(job: _Job) -> None:
    """Scores and samples of the untouched model, unless an earlier session has them."""
    recipe, run = job.plan.recipe, job.plan.run
    if not recipe.eval.before or run.trained.exists() or saving.newest(run.checkpoints):
        return
    untouched = nullcontext() if recipe.adapter.method == "full" else disabled(job.model)
    with untouched:
        _score(job, "before")
        _sample(job, "before")


def _after(job: _Job) -> None:
    _score(job, "after")
    _sample(job, "after")


def _score(job: _Job, when: str) -> None:
    run, settings = job.plan.run, job.plan.recipe.eval
    results = run.read(run.results, {})
    if not job.plan.tasks or when in results:
        return
    console.print(f"scoring the model {when} training: {', '.join(task.name for task in job.plan.tasks)}")
    found = evaluate(
        job.model,
        job.tokenizer,
        job.plan.tasks,
        batch_size=settings.batch_size,
        limit=settings.limit,
        seed=job.plan.recipe.seed,
    )
    if is_main():
        files.write_json(run.results, {**results, when: {name: result.to_json() for name, result in found.items()}})
    for name, result in found.items():
        scores = ", ".join(f"{metric} {score.value:.3f}" for metric, score in result.metrics.items())
        console.print(f"  {name}: {scores}")


def _sample(job: _Job, when: str) -> None:
    """What the model writes after a few prompts of the data."""
    run = job.plan.run
    shown = run.read(run.samples, [{"prompt": s.prompt, "expected": s.expected} for s in job.samples])
    if not shown:
        return
    closed = STYLES[job.plan.recipe.data.style].closed
    longest = max(len(encode(job.tokenizer, sample["expected"], chat=True)) for sample in shown)
    prompts = [encode(job.tokenizer, sample["prompt"], chat=closed) for sample in shown]
    room = (context_length(job.model) or math.inf) - max(map(len, prompts))
    texts = continuations(
        job.model,
        job.tokenizer,
        prompts,
        max_new_tokens=max(1, int(min(longest + 8, _SAMPLE_TOKENS, room))),
        batch_size=_SAMPLES,
    )
    if is_main():
        files.write_json(run.samples, [{**sample, when: text} for sample, text in zip(shown, texts, strict=True)])


def _train(job: _Job) -> None:
    plan = job.plan
    trainer = AdapterTrainer(job.model, plan.args, job.tokenizer, job.train, job.validation, plan.recipe.adapter)
    stop, metrics, bar = StopOnSignal(), MetricsFile(plan.run.metrics, trainer.meter), ProgressBar(trainer.meter)
    # Trainer's own printer and bar would repeat ours
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ not in _STOCK_PRINTERS
    ]
    for callback in (metrics, bar, stop, *_wanted(plan)):
        trainer.add_callback(callback)
    checkpoint = saving.newest(plan.run.checkpoints) if plan.resume else None
    if is_main():
        metrics.cut_after(saving.step_of(checkpoint) if checkpoint else 0)
    if checkpoint:
        console.print(f"going on from {checkpoint}")
    status = "interrupted"
    try:
        with stop.listening(), _readable_failures(plan):
            _run(trainer, checkpoint)
        status = "interrupted" if stop.caught is not None and _unfinished(trainer) else "finished"
    except LossNotFinite:
        status = "nan"
        raise
    finally:
        bar.close()
        if status != "finished":
            # on a full disk this fails too, and the error that is under way says more
            with suppress(DoraError, OSError):
                _summarise(job, trainer, status)
    if status == "interrupted":
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
            f"{saving.newest(plan.run.checkpoints)}; the same command with --resume goes on from there"
        )
    _keep(job, trainer)


_STOCK_PRINTERS = ("PrinterCallback", "ProgressCallback")


def _wanted(plan: _Plan) -> list[Any]:
    """Callbacks that the recipe asks for."""
    patience = plan.recipe.training.get("early_stopping_patience")
    board = [Tensorboard(plan.run.path / "tensorboard")] if training_keys.wants_tensorboard(plan.recipe) else []
    return board + ([EarlyStoppingCallback(int(patience))] if patience is not None else [])


def _run(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    """Train to the end; a run killed after its last checkpoint has nothing left to do but read it."""
    use_cache = trainer.model.config.use_cache
    try:
        if not trainer.take_if_done(checkpoint):
            trainer.train(checkpoint)
    finally:
        trainer.leave()
        trainer.model.config.use_cache = use_cache


@contextmanager
def _readable_failures(plan: _Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        last = saving.newest(plan.run.checkpoints)
        go_on = f"--resume goes on from {last}" if last else "no checkpoint had been written yet"
        raise DoraError(f"training stopped, a file could not be written: {error}; {go_on}") from error


def _unfinished(trainer: AdapterTrainer) -> bool:
    return bool(trainer.state.global_step < trainer.state.max_steps)


def _keep(job: _Job, trainer: AdapterTrainer) -> None:
    """Write what was trained, which also marks the training as over."""
    run = job.plan.run
    if not is_main():
        return
    _summarise(job, trainer, "finished")
    if job.plan.recipe.adapter.method != "full":
        save_adapter(job.model, run.path)
        return
    with files.replacing(run.path / "model") as part:
        job.model.save_pretrained(part)
        job.tokenizer.save_pretrained(part)


def _summarise(job: _Job, trainer: AdapterTrainer, status: str) -> None:
    if not is_main():
        return
    recipe, meter, state = job.plan.recipe, trainer.meter, trainer.state
    changed, total = _parameters(job.model)
    best = state.best_global_step if job.plan.args.load_best_model_at_end else None
    files.write_json(
        job.plan.run.summary,
        {
            "base_model": recipe.model.path,
            "method": recipe.adapter.method,
            "trainable_parameters": changed,
            "total_parameters": total,
            "train_rows": job.train.report.kept,
            "dropped_rows": dict(job.train.report.dropped),
            "truncated_rows": job.train.report.truncated,
            "steps": state.global_step,
            "tokens": meter.tokens,
            "seconds": meter.seconds,
            "tokens_per_second": meter.tokens / meter.seconds if meter.seconds else 0.0,
            "best_step": best,
            "status": status,
        },
    )
