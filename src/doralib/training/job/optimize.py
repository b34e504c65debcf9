"""The training itself, from the newest checkpoint or the beginning to its end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ... import disk
from ...errors import DoraError
from ...runs import checkpointing
from ...runs.folder import RunFolder
from ..callbacks import AtCheckpoints, MetricsFile, StepLog, StopOnSignal
from ..distributed import is_lost_process, is_main
from ..label_trainer import LabelTrainer
from ..modality import DrawingModality
from ..optimizers import make_prodigy
from ..rewards import find_rewards
from ..trainer import AdapterTrainer, LossNotFinite
from .check import JobPlan
from .load import Job
from .save import save_trained, write_summary
from .scores import sample

log = logging.getLogger(__name__)

# Trainer's own printer and bar would repeat ours
_STOCK_PRINTERS = ("PrinterCallback", "ProgressCallback")


class Interrupted(DoraError):
    """Ctrl-C or SIGTERM during training; a checkpoint was saved."""

    exit_status = 130


def run_training(job: Job) -> None:
    """Train to the end, and save what was trained.

    Raises:
        LossNotFinite: if the loss became NaN.
        Interrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
        DoraError: if a file could not be written, or another process of the run has ended.
    """
    plan = job.plan
    trainer = make_trainer(job)
    stop, metrics = StopOnSignal(), MetricsFile(plan.run.metrics, trainer.meter)
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ not in _STOCK_PRINTERS
    ]
    patience = plan.recipe.training.get("early_stopping_patience")
    more: list[TrainerCallback] = [EarlyStoppingCallback(int(patience))] if patience is not None else []
    trainer.meter.unit = job.data.unit
    if isinstance(plan.modality, DrawingModality):
        more.append(AtCheckpoints(lambda step: sample(job, f"step {step}")))
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
                write_summary(job, trainer, status)
    if status == "interrupted":
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
            f"{checkpointing.find_newest(plan.run.checkpoints)}; the same command with --resume goes on from there"
        )
    with _explain_write_errors(plan):
        save_trained(job, trainer)


def _place_tensorboard(run: RunFolder, trainer: AdapterTrainer, begun: int) -> None:
    """Let the events, where they are asked for, go into the run's folder; those after a resumed step are gone."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and is_main():
            # the class that transformers found: torch's, or that of tensorboardX
            callback.tb_writer = callback._SummaryWriter(
                str(run.path / "tensorboard"), purge_step=begun + 1 if begun else None
            )


def make_trainer(job: Job) -> AdapterTrainer:
    """Transformers' or TRL's trainer, as the objective asks."""
    plan = job.plan
    if getattr(job.model, "one_device", False):
        plan.args._n_gpu = 1
    given = (job.model, plan.args, job.processor, job.collate(), job.data, plan.recipe.adapter)
    if (objective := plan.recipe.objective).kind == "sft":
        made = LabelTrainer(*given, optimizer_cls_and_kwargs=make_prodigy(plan.recipe.training, plan.args))
        made.whole_rate = plan.recipe.training.get("projector_learning_rate")
        return made
    # TRL is an extra
    from ..objectives import TRAINERS  # noqa: PLC0415

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
def _explain_write_errors(plan: JobPlan) -> Iterator[None]:
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
def _explain_lost_processes(plan: JobPlan) -> Iterator[None]:
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
