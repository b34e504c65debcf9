"""The life of a job, whatever its data are: check everything, load, score, train, score again, report."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from .. import disk, files
from ..adapters.adapt import adapt, disabled
from ..adapters.fsdp import whole_tensor
from ..adapters.load import load_adapter
from ..adapters.registry import trainable
from ..adapters.save import save_adapter
from ..checkpoints.heads import write_labels
from ..checkpoints.kind import name_auto_class
from ..checkpoints.models import Loaded, loading_on_cpu
from ..checkpoints.parts import check_model_is_there, compose_parts, settle_parts
from ..data.encoding import has_encoder
from ..data.prompt_form import write_form
from ..data.rows import RawRows, hash_sources, list_inputs
from ..data.survey import LEFT, RIGHT
from ..errors import DoraError, UsageError, collecting, raise_all
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import Score, compare_answers
from ..evaluation.result import TaskResult
from ..evaluation.rows import read_examples
from ..evaluation.task import Task, check_scored
from ..evaluation.task_file import load_tasks
from ..progress import Tick
from ..recipe import ModelSettings, Recipe
from ..runs import checkpointing
from ..runs.card import write_card
from ..runs.folder import RunFolder
from ..runs.record import read_run
from ..runs.report import write_report
from ..runs.use import closing_lines
from .arguments import has_own_order, make_arguments
from .callbacks import AtCheckpoints, MetricsFile, StepLog, StopOnSignal
from .configure import configure_adapter
from .distributed import is_lost_process, is_main, wait_for_all
from .label_trainer import LabelTrainer
from .modalities import choose_modality
from .modality import (
    Collate,
    DrawingModality,
    KeepingModality,
    Modality,
    Prepared,
    ScoringModality,
)
from .optimizers import make_prodigy
from .outlook import Outlook
from .plan.batch import Lengths
from .plan.estimate import Estimate, check_fits, estimate_run
from .plan.sampled import Sampled
from .rewards import find_rewards
from .sampler import PADDING_WORTH_GROUPING, count_rows, measure_padding
from .sharding import is_shared_out, reads_once, share_out, take_over_launcher, waits_for_weights
from .task_batches import make_task_batches
from .trainer import AdapterTrainer, LossNotFinite

log = logging.getLogger(__name__)

_ORDERS = {
    "group_by_length": "rows of like length together",
    "random": "drawn anew for each epoch",
    "sequential": "as the objective needs it",
}
# Trainer's own printer and bar would repeat ours
_STOCK_PRINTERS = ("PrinterCallback", "ProgressCallback")


class Interrupted(DoraError):
    """Ctrl-C or SIGTERM during training; a checkpoint was saved."""

    exit_status = 130


@dataclass(frozen=True)
class _Plan:
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


@dataclass(frozen=True)
class _Job:
    """The plan with the adapted model and its data."""

    plan: _Plan
    model: Any
    processor: Any
    data: Prepared
    tick: Tick | None

    def collate(self) -> Collate | None:
        """What makes batches, None: the trainer; packed rows are tried on the model."""
        return self.plan.modality.collate(self.model, self.processor, self.data)


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
        log.info(closing_lines(read_run(run), write_report(run)))
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
    plan = _compose(_check(recipe, resume=resume, overwrite=overwrite))
    if not is_main():
        # the first process speaks for all
        logging.getLogger("doralib").setLevel(logging.WARNING)
        tick = None
    if (memory := _estimate_memory(plan)) is not None:
        log.info(f"memory: {memory.summary()}")
        if check_memory:
            check_fits(memory)
    job = _load(plan, tick)
    # the others may still be checking what stands there
    wait_for_all()
    with plan.run.open(recipe, **plan.asked) if is_main() else nullcontext():
        if is_main() and job.data.survey is not None:
            files.write_json(plan.run.survey, job.data.survey)
        wait_for_all()
        _describe(job)
        _score_before(job)
        if not plan.run.trained.exists():
            _train(job)
        _score(job, "after")
        _sample(job, "after")
    return plan.run.path


def _check(recipe: Recipe, *, resume: bool, overwrite: bool, check_out: bool = True) -> _Plan:
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
    return _Plan(recipe, modality, run, rows, tasks, args, resume, asked)


def _estimate_memory(plan: _Plan) -> Estimate | None:
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
    plan = _check(recipe.with_whole_path(), resume=resume, overwrite=overwrite, check_out=check_out)
    with settle_parts(plan.recipe.model, recipe.seed, empty=True) as settings:
        plan = _with_model(plan, settings)
        job = _load(plan, tick, empty=True)
        steps, per_epoch = _count_steps(job)
        facts, notes = _list_facts(job), tuple(_list_row_notes(job))
        return Outlook(plan.recipe, facts, notes, steps, per_epoch, _estimate_memory(plan), job.data)


def _with_model(plan: _Plan, settings: ModelSettings) -> _Plan:
    return replace(plan, recipe=plan.recipe.model_copy(update={"model": settings}))


def _compose(plan: _Plan) -> _Plan:
    """The plan with the path of its model, which the first process composes of its parts if it is not there yet."""
    parts, seed = plan.recipe.model.parts, plan.recipe.seed
    if parts is None:
        return plan
    if is_main():
        compose_parts(parts, seed)
    wait_for_all()
    with settle_parts(plan.recipe.model, seed) as settings:
        return _with_model(plan, settings)


def _load(plan: _Plan, tick: Tick | None, *, empty: bool = False) -> _Job:
    recipe = plan.recipe
    log.info(
        f"reading the tokenizer and the shapes of {recipe.model.describe()}"
        if empty
        else f"loading {recipe.model.describe()}"
    )
    model, processor = _model(plan, empty=empty)
    data = plan.modality.prepare(plan.rows, recipe.data, model, processor, tick)
    _check_batch(data, plan.args)
    if "train_sampling_strategy" not in recipe.training and not has_own_order(recipe.objective.kind):
        plan.args.train_sampling_strategy = _choose_order(data, plan.args)
    return _Job(plan, model, processor, data, tick)


def _check_batch(data: Prepared, args: TrainingArguments) -> None:
    count, whole = len(data.train.rows), args.train_batch_size * args.world_size
    if data.ratios is not None and args.world_size > 1:
        raise UsageError(f"batches of one task each are made in one process, and this run has {args.world_size}")
    if args.dataloader_drop_last and count < whole:
        raise UsageError(f"training.dataloader_drop_last: {count} rows do not fill one batch of {whole}; none is left")
    prompts = getattr(args, "generation_batch_size", 1) // getattr(args, "num_generations", 1)
    if count < prompts:
        raise UsageError(
            f"{count} prompts are fewer than the {prompts} that are answered at a time; give more, or set a smaller "
            "training.per_device_train_batch_size or a larger training.num_generations"
        )


def _choose_order(data: Prepared, args: TrainingArguments) -> str:
    """Rows of like length in a batch where padding would else be much of it; in any order otherwise."""
    if data.order is not None:
        return data.order
    padding = measure_padding(data.train.rows["length"][:], args.train_batch_size)
    return "group_by_length" if padding > PADDING_WORTH_GROUPING else "random"


def _model(plan: _Plan, *, empty: bool) -> Loaded:
    """Adapted, on its device, and trained already if an earlier session came that far; or without weights."""
    recipe, trained = plan.recipe, plan.run.trained
    settings = recipe.model
    if plan.resume and trained.is_dir() and not empty:
        settings = settings.model_copy(update={"path": str(trained)})
    with loading_on_cpu() if is_shared_out(recipe) else nullcontext():
        model, processor = plan.modality.load(settings, empty=empty or waits_for_weights(recipe))
    torch.manual_seed(recipe.seed)
    config = configure_adapter(plan.modality, model, processor, recipe)
    if empty:
        return adapt(model, config), processor
    if plan.resume and trained.is_file():
        # as a plain model takes it: what began as a part of the weights is written as a change of them
        load_adapter(model, plan.run.path)
    else:
        adapt(model, config)
    if is_shared_out(recipe):
        share_out(model, recipe, plan.args.device, from_first=reads_once(recipe))
    else:
        model.to(plan.args.device)
    return model, processor


def _describe(job: _Job) -> None:
    """Log what is about to happen, before it does."""
    recipe = job.plan.recipe
    log.info(_list_facts(job))
    for line in _list_row_notes(job):
        log.info(line)
    if job.data.first:
        log.info(f"the first row, what is learned of it in {LEFT} {RIGHT}:\n{job.data.first}")
    if recipe.adapter.method == "full" and next(iter(trainable(job.model)))[1].dtype.itemsize < 4:
        log.info("full fine-tuning in 16 bits loses small steps; model.dtype: float32 keeps them")


def _list_facts(job: _Job) -> dict[str, str]:
    """What the job is, by a word for each."""
    plan, report, validation = job.plan, job.data.train.report, job.data.validation
    recipe = plan.recipe
    changed, total = _parameters(job.model)
    answers, (steps, per_epoch) = _count_answers(plan.args), _count_steps(job)
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


def _list_row_notes(job: _Job) -> Iterator[str]:
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


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Trained, and all."""
    return sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())


def _count_answers(args: TrainingArguments) -> int:
    """To each prompt, times how often they are learned from; 0 where the rows hold the answers."""
    return int(getattr(args, "num_generations", 0) * getattr(args, "num_iterations", 1))


def _count_steps(job: _Job) -> tuple[int, int]:
    args, kinds = job.plan.args, job.data.kinds
    batches = make_task_batches(job.data, args)
    several = len(set(kinds)) > 1
    rows = count_rows(kinds, args.train_batch_size * args.world_size) if several else len(job.data.train.rows)
    return _steps(args, rows * max(_count_answers(args), 1), None if batches is None else len(batches))


def _steps(args: TrainingArguments, rows: int, batches: float | None = None) -> tuple[int, int]:
    """Optimizer steps in all, and of one epoch."""
    batches = batches or rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch), per_epoch


def _score_before(job: _Job) -> None:
    """Scores and samples of the untouched model, unless an earlier session has them."""
    recipe, run = job.plan.recipe, job.plan.run
    if not recipe.eval.before or run.trained.exists() or checkpointing.find_newest(run.checkpoints):
        return
    untouched = nullcontext() if recipe.adapter.method == "full" else disabled(job.model)
    with untouched:
        _score(job, "before")
        _sample(job, "before")


def _score(job: _Job, when: str) -> None:
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


def _sample(job: _Job, when: str) -> None:
    """Keep what the model answers to a few prompts of the data."""
    run = job.plan.run
    asked = run.read(run.samples, [sample.to_json() for sample in job.data.samples])
    if not asked:
        return
    answers = job.plan.modality.samples(job.model, job.processor, job.plan.recipe.data, asked)
    if is_main():
        files.write_json(run.samples, [{**sample, when: text} for sample, text in zip(asked, answers, strict=True)])


def _train(job: _Job) -> None:
    plan = job.plan
    trainer = _make_trainer(job)
    stop, metrics = StopOnSignal(), MetricsFile(plan.run.metrics, trainer.meter)
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ not in _STOCK_PRINTERS
    ]
    patience = plan.recipe.training.get("early_stopping_patience")
    more: list[TrainerCallback] = [EarlyStoppingCallback(int(patience))] if patience is not None else []
    trainer.meter.unit = job.data.unit
    if isinstance(plan.modality, DrawingModality):
        more.append(AtCheckpoints(lambda step: _sample(job, f"step {step}")))
    for callback in (metrics, StepLog(trainer.meter, job.tick), stop, *more):
        trainer.add_callback(callback)
    checkpoint = checkpointing.find_sound(plan.run.checkpoints) if plan.resume else None
    _place_tensorboard(plan.run, trainer, checkpointing.step_of(checkpoint) if checkpoint else 0)
    if is_main():
        metrics.cut_after(checkpointing.step_of(checkpoint) if checkpoint else 0)
    if checkpoint:
        log.info(f"going on from {checkpoint}")
    status = "interrupted"
    try:
        with stop.listen(), _explain_write_errors(plan), _explain_lost_processes(plan):
            _run(trainer, checkpoint)
        status = "interrupted" if stop.caught is not None and _unfinished(trainer) else "finished"
    except LossNotFinite:
        status = "nan"
        raise
    finally:
        if status != "finished":
            # on a full disk this fails too, and the error that is under way says more
            with suppress(DoraError, OSError):
                _write_summary(job, trainer, status)
    if status == "interrupted":
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
            f"{checkpointing.find_newest(plan.run.checkpoints)}; the same command with --resume goes on from there"
        )
    _save_trained(job, trainer)


def _place_tensorboard(run: RunFolder, trainer: AdapterTrainer, begun: int) -> None:
    """Let the events, where they are asked for, go into the run's folder; those after a resumed step are gone."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and is_main():
            # the class that transformers found: torch's, or that of tensorboardX
            callback.tb_writer = callback._SummaryWriter(
                str(run.path / "tensorboard"), purge_step=begun + 1 if begun else None
            )


def _make_trainer(job: _Job) -> AdapterTrainer:
    plan = job.plan
    if getattr(job.model, "one_device", False):
        plan.args._n_gpu = 1
    given = (job.model, plan.args, job.processor, job.collate(), job.data, plan.recipe.adapter)
    if (objective := plan.recipe.objective).kind == "sft":
        made = LabelTrainer(*given, optimizer_cls_and_kwargs=make_prodigy(plan.recipe.training, plan.args))
        made.whole_rate = plan.recipe.training.get("projector_learning_rate")
        return made
    # TRL is an extra
    from .objectives import TRAINERS  # noqa: PLC0415

    rewards: dict[str, Any] = {"reward_funcs": find_rewards(objective.rewards)} if objective.rewards else {}
    return TRAINERS[objective.kind](*given, **rewards)


def _run(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    """Train to the end; a run killed after its last checkpoint has nothing left to do but read it."""
    use_cache = getattr(trainer.model.config, "use_cache", None)
    try:
        if not trainer.load_if_done(checkpoint):
            trainer.train(checkpoint)
    finally:
        trainer.unwrap()
        if use_cache is not None:
            trainer.model.config.use_cache = use_cache


@contextmanager
def _explain_write_errors(plan: _Plan) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, DoraError) or not disk.is_write_error(error):
            raise
        last = checkpointing.find_newest(plan.run.checkpoints)
        go_on = f"--resume goes on from {last}" if last else "no checkpoint had been written yet"
        why = str(error).splitlines()[0]
        raise DoraError(f"training stopped, a file could not be written: {why}; {go_on}") from error


@contextmanager
def _explain_lost_processes(plan: _Plan) -> Iterator[None]:
    """Say what an error of the network between processes means: that another one has ended."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, DoraError) or not is_lost_process(error):
            raise
        last = checkpointing.find_newest(plan.run.checkpoints)
        go_on = f"--resume goes on from {last}" if last else "no checkpoint had been written yet"
        why = str(error).strip().splitlines()[0]
        raise DoraError(f"training stopped, another process of this run has ended: {why}; {go_on}") from error


def _unfinished(trainer: AdapterTrainer) -> bool:
    return bool(trainer.state.global_step < trainer.state.max_steps)


def _save_beside(job: _Job) -> None:
    """Write what makes the model's inputs, and how it is asked, beside its adapter."""
    run = job.plan.run
    job.processor.save_pretrained(run.path)
    if (head := getattr(job.plan.modality, "head", None)) is not None:
        write_labels(run.path, head)
    if job.data.form is not None:
        write_form(run.path, job.data.form)
    if has_encoder(job.model) and job.model.can_generate():
        # with what a target begins, which the base may not say
        job.model.generation_config.save_pretrained(run.path)
    if isinstance(job.plan.modality, KeepingModality):
        job.plan.modality.keep(run.path)


def _save_trained(job: _Job, trainer: AdapterTrainer) -> None:
    """Write what was trained, which also marks the training as over."""
    run = job.plan.run
    _write_summary(job, trainer, "finished")
    if job.plan.recipe.adapter.method != "full":
        if is_main():
            # first: the adapter's file marks the training as over
            _save_beside(job)
        # a model that is shared out is gathered by all, and written by the first
        if is_main() or trainer.shared_out:
            if isinstance(job.plan.modality, DrawingModality):
                job.plan.modality.save(job.model, run.path)
            save_adapter(job.model, run.path)
        return
    state = {name: whole_tensor(t) for name, t in job.model.state_dict().items()} if trainer.shared_out else None
    if not is_main():
        return
    with disk.replacing(run.path / "model") as part:
        job.model.save_pretrained(part, state_dict=state)
        job.processor.save_pretrained(part)
        if job.data.form is not None:
            write_form(part, job.data.form)
        run.list_as_written(f"model/{file.relative_to(part).as_posix()}" for file in part.rglob("*") if file.is_file())


def _write_summary(job: _Job, trainer: AdapterTrainer, status: str) -> None:
    if not is_main():
        return
    recipe, meter, state = job.plan.recipe, trainer.meter, trainer.state
    changed, total = _parameters(job.model)
    best = state.best_global_step if job.plan.args.load_best_model_at_end else None
    files.write_json(
        job.plan.run.summary,
        {
            "base_model": recipe.model.path,
            "auto_class": name_auto_class(type(job.model).__name__),
            "method": recipe.adapter.method,
            "trainable_parameters": changed,
            "total_parameters": total,
            "train_rows": job.data.train.report.kept,
            "dropped_rows": dict(job.data.train.report.dropped),
            "truncated_rows": job.data.train.report.truncated,
            "steps": state.global_step,
            "tokens": meter.tokens,
            "seconds": meter.seconds,
            "unit": meter.unit,
            "tokens_per_second": meter.tokens / meter.seconds if meter.seconds else 0.0,
            "best_step": best,
            "status": status,
        },
    )
