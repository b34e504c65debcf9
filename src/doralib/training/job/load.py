"""A job's adapted model and its data."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ...adapters.adapt import adapt
from ...adapters.load import load_adapter
from ...checkpoints.models import Loaded, loading_on_cpu
from ...errors import UsageError
from ...progress import Tick
from ..arguments import has_own_order
from ..configure import configure_adapter
from ..modality import Collate, Prepared
from ..sampler import PADDING_WORTH_GROUPING, measure_padding
from ..sharding import is_shared_out, reads_once, share_out, waits_for_weights
from .check import JobPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The plan with the adapted model and its data."""

    plan: JobPlan
    model: Any
    processor: Any
    data: Prepared
    tick: Tick | None

    def collate(self) -> Collate | None:
        """What makes batches, None: the trainer; packed rows are tried on the model."""
        return self.plan.modality.collate(self.model, self.processor, self.data)


def load_job(plan: JobPlan, tick: Tick | None, *, empty: bool = False) -> Job:
    """Load and adapt the model, and make its data; empty: without weights.

    Raises:
        DoraError: if the model, the targets or the rows cannot be used.
    """
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
    return Job(plan, model, processor, data, tick)


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


def _model(plan: JobPlan, *, empty: bool) -> Loaded:
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
