"""`transformers.Trainer` for an adapted model: only the adapter is saved, and a resumed run is the same run."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .. import files
from ..adapters.audit import audit
from ..adapters.fsdp import as_placed, is_sharded, whole_tensor
from ..adapters.param_groups import learning_rates
from ..adapters.save import save_adapter
from ..config import DoraConfig
from ..errors import DoraError, UsageError
from ..runs import checkpointing
from ..state import MAGNITUDE
from .distributed import is_main, wait_for_all
from .meter import Meter
from .modality import Collate, Prepared
from .sampler import SeededSampler, SortedSampler
from .sharding import gather_optimizer, scatter_optimizer
from .task_batches import make_task_batches

log = logging.getLogger(__name__)

_WEIGHTS = "adapter.safetensors"
_METER = "meter.json"


class LossNotFinite(DoraError):
    """The loss or its gradient became NaN or infinite; the step was not taken."""


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trains what requires a gradient, and saves nothing else.

    Args:
        model: Adapted.
        args: Of the stock Trainer.
        processor: The model's tokenizer or processor, which checkpoints keep.
        collate: Makes a batch of rows; None: as the Trainer does it.
        data: Rows to train on and, if there are some, to measure the loss on.
        adapter: Its learning rates by the kind of a parameter, and whether a checkpoint is an adapter.
        others: What the Trainer of another library takes, where one stands between this and the stock Trainer.
    """

    sampler: Any = None
    """The order of the rows, once it is made; `set_epoch` begins an epoch."""
    whole_rate: float | None = None
    """The learning rate of modules that are trained whole; None: as of all else."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        processor: Any,
        collate: Collate | None,
        data: Prepared,
        adapter: DoraConfig,
        **others: Any,
    ) -> None:
        self.meter = Meter()
        self.adapter = adapter
        self.resumed_from: Path | None = None
        self._lengths: list[int] = data.train.rows["length"][:]
        self._kinds = data.kinds
        self._batches = make_task_batches(data, args)
        self._staging: Path | None = None
        self.shared_out = is_sharded(model)
        with _mark_as_adapted(model), _mark_as_shared_out(model, args) if self.shared_out else nullcontext():
            super().__init__(
                model=model,
                args=args,
                processing_class=processor,
                train_dataset=data.train.rows,
                eval_dataset=data.validation and data.validation.rows,
                callbacks=[_Bookkeeper(self)],
                **({} if collate is None else {"data_collator": collate}),
                **others,
            )

    def train(self, resume_from_checkpoint: Path | None = None) -> Any:
        """Train to the end, from the start or from a whole checkpoint."""
        self.resumed_from = resume_from_checkpoint
        if resume_from_checkpoint is not None:
            self._check_rows(files.read_json(resume_from_checkpoint / _METER).get("rows_per_step"))
        return super().train(None if resume_from_checkpoint is None else str(resume_from_checkpoint))

    def _check_rows(self, before: int | None) -> None:
        """Check that a step has the rows that it had; how many processes share them does not matter.

        Raises:
            UsageError: if not.
        """
        if before not in (None, self._rows_per_step):
            raise UsageError(
                f"--resume: a step had {before} rows, and has {self._rows_per_step} now ({self.args.train_batch_size} "
                f"rows, {self.args.gradient_accumulation_steps} batches, {self.args.world_size} processes); change "
                "training.per_device_train_batch_size or training.gradient_accumulation_steps so that it has as many"
            )

    def load_if_done(self, checkpoint: Path | None) -> bool:
        """Whether no step comes after the checkpoint; then its weights are taken, or the best ones if they are wanted.

        The stock Trainer would make one step too many, and forgets that early stopping has ended the run.
        """
        if checkpoint is None:
            return False
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        patience = next((each.early_stopping_patience for each in self._early_stoppings()), math.inf)
        if state.global_step < state.max_steps and _count_without_better(state) < patience:
            return False
        self.state = state
        self.meter.restore(files.read_json(checkpoint / _METER))
        if self.args.load_best_model_at_end and state.best_global_step:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            self._prune_at_end()
        return True

    def _prune_at_end(self) -> None:
        """Leave the checkpoints that the stock Trainer leaves: a kill may have come before it did."""
        best = self._best_checkpoint()
        checkpointing.prune(Path(self.args.output_dir), self.args.save_total_limit, best)
        if self.args.load_best_model_at_end and self.args.save_total_limit == 1:
            checkpointing.keep_alone(best)

    def take_up(self, checkpoint: Path) -> None:
        """Bring back what the stock Trainer forgets of a checkpoint."""
        counted = files.read_json(checkpoint / _METER)
        self.meter.restore(counted)
        self.take_up_unlogged(counted.get("unlogged", {}))
        # the first log line after a resume is a mean over steps of both sessions
        self._tr_loss += counted["loss_since_log"]
        self._globalstep_last_logged = counted["last_logged"]
        for early_stopping in self._early_stoppings():
            early_stopping.early_stopping_patience_counter = _count_without_better(self.state)
        # by its step, for the run may have been moved since
        self.state.best_model_checkpoint = self._name_best()

    def unwrap(self) -> None:
        """Remove what training put around the model: hooks and automatic casts."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one batch.

        Raises:
            LossNotFinite: before the optimizer could spread it.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss became {loss.item()}")
        return loss

    def check_gradients(self) -> None:
        """Check that every gradient is finite; under float16 the gradient scaler does.

        Raises:
            LossNotFinite: if one is not.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.accelerator.scaler is None and not torch.isfinite(whole_tensor(torch.nn.utils.get_total_norm(grads))):
            raise self._not_finite("the gradient became NaN or infinite")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the validation rows; leaves the random numbers of training alone."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """What weight decay shrinks: never a magnitude, norm or bias."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(MAGNITUDE)]

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The stock optimizer; what has a learning rate of its own is moved into a group of its own."""
        fresh = self.optimizer is None
        with _blame_settings("optim, optim_args"):
            optimizer: torch.optim.Optimizer = super().create_optimizer(*args)
        if not fresh:
            return optimizer
        rates = learning_rates(self.model, self.adapter, self.args.learning_rate, self.whole_rate)
        for group in list(optimizer.param_groups):
            members = group["params"]
            group["params"] = [p for p in members if rates[p] == self.args.learning_rate]
            for rate in sorted({rates[p] for p in members} - {self.args.learning_rate}):
                own = [p for p in members if rates[p] == rate]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """The stock schedule of learning rates."""
        with _blame_settings("lr_scheduler_type, lr_scheduler_kwargs"):
            return super().create_scheduler(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The stock batches, or those of one task each."""
        if self._batches is None:
            return super().get_train_dataloader()
        self.sampler = self._batches
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        args = self.args
        if args.train_sampling_strategy not in ("group_by_length", "random"):
            return super()._get_train_sampler(train_dataset)
        grouped = args.train_sampling_strategy == "group_by_length"
        seed = args.data_seed or args.seed
        if len(set(self._kinds)) > 1:
            together = args.train_batch_size * args.world_size
            self.sampler = SortedSampler(self._lengths, self._kinds, together, seed, grouped=grouped)
        else:
            self.sampler = SeededSampler(self._lengths, self._rows_per_step if grouped else None, seed)
        return self.sampler

    def _early_stoppings(self) -> list[EarlyStoppingCallback]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]

    def _best_checkpoint(self) -> Path | None:
        """Where the best checkpoint of this run stands, wherever the run stood when it was written."""
        best = self.state.best_global_step
        return checkpointing.at_step(Path(self.args.output_dir), best) if best else None

    def _name_best(self, written: Path | None = None) -> str | None:
        """The best checkpoint as the stock Trainer looks for it; named though it is lost where it is wanted."""
        best = self._best_checkpoint()
        there = best is not None and (best == written or best.is_dir() or self.args.load_best_model_at_end)
        return str(best) if there else None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        folder = Path(self.args.output_dir)
        final = checkpointing.at_step(folder, self.state.global_step)
        if self.args.world_size > 1:
            with checkpointing.explaining_write_errors(final):
                self._write_in_place(final, model, trial)
        else:
            with checkpointing.new_checkpoint(final) as part:
                self._write(part, final, model, trial)
        if self.args.should_save:
            checkpointing.prune(folder, self.args.save_total_limit, self._best_checkpoint())

    def _write_in_place(self, final: Path, model: nn.Module, trial: Any) -> None:
        """In its place, where every process puts its random numbers; no checkpoint to anyone before it is sealed."""
        loss_since_log = float(self.accelerator.reduce(self._tr_loss, "mean"))
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        wait_for_all()
        if self.args.should_save:
            files.write_json(final / _METER, self._count(loss_since_log))
            checkpointing.seal(final)
        wait_for_all()

    def _write(self, part: Path, final: Path, model: nn.Module, trial: Any) -> None:
        """What the stock Trainer writes, moved up into ``part``, with the paths it will have."""
        self._staging = part
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        inner = part / final.name
        for file in inner.iterdir():
            file.replace(part / file.name)
        inner.rmdir()
        best = self._best_checkpoint()
        # the file says it without the folders above, which may be moved; the Trainer itself looks for the folder
        self.state.best_model_checkpoint = best and best.name
        self.state.save_to_json(str(part / "trainer_state.json"))
        self.state.best_model_checkpoint = self._name_best(final)
        files.write_json(part / _METER, self._count(float(self._tr_loss)))

    @property
    def _rows_per_step(self) -> int:
        args = self.args
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def _count(self, loss_since_log: float) -> dict[str, Any]:
        counted = self.meter.state(loss_since_log, self._globalstep_last_logged)
        return {**counted, "unlogged": self.unlogged(), "rows_per_step": self._rows_per_step}

    def take_up_unlogged(self, measured: dict[str, list[float]]) -> None:
        """Go on with what a checkpoint has of `unlogged`."""

    def unlogged(self) -> dict[str, list[float]]:
        """What was measured since the last line of metrics, besides the loss; a resumed run goes on with it."""
        return {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not (is_main() or self.shared_out):
            return
        source = dict(self.model.named_parameters()) if state_dict is None else state_dict
        folder = Path(output_dir or self.args.output_dir)
        # shared out, every process comes here and takes part, and the first one writes
        tensors = {name: whole_tensor(source[name].detach()) for name in sorted(_checkpoint_parameters(self.model))}
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            files.write_tensors(folder / _WEIGHTS, tensors)
        if self.adapter.method != "full":
            save_adapter(self.model, folder)  # so that an earlier state can be scored, merged and converted

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = files.read_tensors(Path(resume_from_checkpoint) / _WEIGHTS)
        into = _checkpoint_parameters(model or self.model)
        wrong = sorted(
            name
            for name in into.keys() | tensors.keys()
            if name not in into or name not in tensors or into[name].shape != tensors[name].shape
        )
        if wrong:
            raise DoraError(
                f"{resume_from_checkpoint} does not fit this model: {len(wrong)} tensors are missing, too many or of "
                f"another shape, first {wrong[0]!r}"
            )
        with torch.no_grad():
            for name, p in into.items():
                p.copy_(as_placed(tensors[name], p))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shared_out:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer(self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shared_out or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load = partial(torch.load, map_location="cpu", weights_only=True)
        scatter_optimizer(self.optimizer.optimizer, load(Path(checkpoint) / OPTIMIZER_NAME))
        self.lr_scheduler.load_state_dict(load(Path(checkpoint) / SCHEDULER_NAME))

    def _load_best_model(self) -> None:
        best = self._best_checkpoint()
        if best is None or not checkpointing.is_sound(best):
            best = self._find_next_best(best)
        self._load_from_checkpoint(str(best))

    def _find_next_best(self, lost: Path | None) -> Path:
        """The best checkpoint that is left, which becomes the run's best.

        Raises:
            DoraError: if none is left that was measured.
        """
        name = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        measured = {line["step"]: line[name] for line in self.state.log_history if name in line}
        sound = {checkpointing.step_of(path): path for path in checkpointing.list_sound(Path(self.args.output_dir))}
        if not (left := measured.keys() & sound.keys()):
            raise DoraError(f"the best checkpoint {lost} is damaged or gone, and no other one was measured")
        step = (max if self.args.greater_is_better else min)(sorted(left), key=lambda step: measured[step])
        log.warning(f"the best checkpoint {lost} is damaged or gone; the best of the others is taken, {sound[step]}")
        self.state.best_global_step, self.state.best_metric = step, measured[step]
        self.state.best_model_checkpoint = str(sound[step])
        return sound[step]

    def _check_weights(self) -> None:
        bad = [n for n, p in self.model.named_parameters() if p.requires_grad and not _is_finite(p)]
        if bad:
            raise self._not_finite(f"{len(bad)} weights, first {bad[0]!r}, hold NaN or infinite values,")

    def _not_finite(self, what: str) -> LossNotFinite:
        last = checkpointing.find_newest(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        return LossNotFinite(
            f"{what} at step {self.state.global_step + 1}; training stopped there, {kept}\n"
            f"  a lower training.learning_rate (it is {self.args.learning_rate:g}), a longer training.warmup_steps or "
            "model.dtype: float32 usually help; start again with --overwrite or another out"
        )


@contextmanager
def _blame_settings(settings: str) -> Iterator[None]:
    """Name the settings in an error inside the block: only making a thing of them shows that it cannot be made."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"training: {settings}: {error}") from error


@contextmanager
def _mark_as_adapted(model: Any) -> Iterator[None]:
    """Give a model PEFT's mark inside the block: Trainer wants it on a quantized one, and saving must not see it."""
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


@contextmanager
def _mark_as_shared_out(model: Any, args: TrainingArguments) -> Iterator[None]:
    """Give a model the mark of those that transformers shares out, inside the block.

    Trainer then leaves it where it is and wraps nothing. It could not save such an optimizer, and ours can.
    """
    model._is_distributed_loading_by_transformers, saves = True, args.save_only_model
    args.save_only_model = True
    try:
        yield
    finally:
        model._is_distributed_loading_by_transformers = False
        args.save_only_model = saves


def _is_finite(p: Tensor) -> bool:
    """Whether all of a parameter is, or this process's part of it."""
    local: Callable[[], Tensor] | None = getattr(p, "to_local", None)
    return bool(torch.isfinite(p if local is None else local()).all())


def _checkpoint_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds: all that is trained, and where A and B began, if that was a part of the weight."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad or n.endswith((".start_A", ".start_B"))}


def _count_without_better(state: TrainerState) -> int:
    """Evaluations since the best one, as early stopping has counted them."""
    kept = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    return int(kept.get("attributes", {}).get("early_stopping_patience_counter", 0))


class _Bookkeeper(TrainerCallback):  # type: ignore[misc]
    """Measures the steps, and sees to it that a resumed run takes up all that its checkpoint holds."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        trainer = self.trainer
        if not trainer.is_deepspeed_enabled:  # which keeps gradients and steps to itself
            tell = log.warning if is_main() else log.debug
            audit(trainer.model, optimizer.optimizer, tell=tell, listen=not trainer.args.torch_compile)
        if trainer.resumed_from is not None:
            trainer.take_up(trainer.resumed_from)

    def on_epoch_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        # accelerate does not reach the sampler of a resumed epoch in several processes
        for part in (self.trainer.sampler, self.trainer.data_collator):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.meter.start()

    def on_pre_optimizer_step(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        self.trainer.check_gradients()
        # a model may hold parts still from some share of the training on
        hold: Callable[[float], None] | None = getattr(self.trainer.model, "hold_still", None)
        if hold is not None:
            hold(state.global_step / state.max_steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.meter.stop()
