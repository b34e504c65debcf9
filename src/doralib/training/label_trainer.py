"""The trainer of rows with labels: a loss that depends neither on batches nor on accumulation nor on processes."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data.prepare import IGNORED
from .forecast_loss import ForecastLoss
from .loss import DecoderLoss, FrameLoss, HeadLoss, LabelLoss
from .trainer import AdapterTrainer


class LabelTrainer(AdapterTrainer):
    """Trains on labels of tokens or texts, by a mean over all labels of an optimizer step.

    Arguments as `AdapterTrainer`.
    """

    def __init__(self, model: Any, args: Any, *others: Any, **more: Any) -> None:
        self._eval_totals: Tensor | None = None
        super().__init__(model, args, *others, **more)
        # a compiled model would be compiled anew for each number of labels; DataParallel glues logits row by row
        possible = LabelLoss.is_possible(model) and not args.torch_compile and args.n_gpu <= 1
        self.label_loss: LabelLoss | HeadLoss | ForecastLoss | DecoderLoss | FrameLoss | None = None
        if possible:
            self.label_loss = LabelLoss(model, args.label_smoothing_factor)
        elif HeadLoss.is_possible(model):
            self.label_loss = HeadLoss(args.label_smoothing_factor)
        elif ForecastLoss.is_possible(model):
            self.label_loss = ForecastLoss(model)
        elif DecoderLoss.is_possible(model):
            self.label_loss = DecoderLoss(args.label_smoothing_factor)
        elif FrameLoss.is_possible(model):
            self.label_loss = FrameLoss(model)
        if self.label_loss is not None:
            # the Trainer then counts the labels of the whole accumulated batch and hands the number to compute_loss
            self.model_accepts_loss_kwargs = True
            self._loss_shifts_labels = self.label_loss.shifts_labels

    def unwrap(self) -> None:
        """Remove what training put around the model, and the hook of the loss."""
        if self.label_loss is not None:
            self.label_loss.remove()
        super().unwrap()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch, whose tokens are counted."""
        num_tokens = inputs["num_tokens"] if "num_tokens" in inputs else inputs["attention_mask"].sum()
        self.meter.add_tokens(self.accelerator.reduce(num_tokens, "sum"))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the labels of all accumulated batches."""
        inputs = {name: value for name, value in inputs.items() if name != "num_tokens"}
        if self.label_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._eval_totals is not None:
            inputs = self._without_repeats(inputs)
        loss, count = self.label_loss(model, inputs)
        if self._eval_totals is not None:
            self._eval_totals += torch.stack([loss.detach().double(), count.double()])
        loss = loss / (count if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the labels were counted over all devices, whose gradients are then averaged
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop, with the loss as a mean over labels, so that it does not depend on the batch size."""
        self._eval_totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            loss, count = self.accelerator.reduce(self._eval_totals, "sum").tolist()
        finally:
            self._eval_totals = None
        if count:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / count
        return output

    def _without_repeats(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch, with no labels in the rows that only fill up the last one so that every process has as many."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        labels = inputs["labels"].clone()
        labels[max(state.remainder - self.args.process_index * len(labels), 0) :] = IGNORED
        return {**inputs, "labels": labels}
