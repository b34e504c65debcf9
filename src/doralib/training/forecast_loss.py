"""The loss of a model of series, as a mean over windows, so that it depends neither on batches nor on accumulation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..data.forecaster import describe_forecaster, is_forecaster
from ..data.prepare import IGNORED


class ForecastLoss:
    """The model's own loss, which is a mean over the windows of a batch.

    Args:
        model: A model of series.
    """

    shifts_labels = False

    def __init__(self, model: nn.Module) -> None:
        self.forecaster = describe_forecaster(model)

    @staticmethod
    def is_possible(model: nn.Module) -> bool:
        """Whether the model forecasts series."""
        return is_forecaster(model)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the windows, and their number; a window whose label is ignored does not count."""
        kept = inputs["labels"] != IGNORED
        count = kept.sum()
        # a batch of repeats alone is asked too: every process must take part
        kept = kept if count else torch.ones_like(kept)
        batch = {name: inputs[name][kept] for name in ("past_values", "lengths", "frequency", "future_values")}
        loss = self.forecaster.ask(model, batch, batch["future_values"]).loss
        return loss * count, count

    def remove(self) -> None:
        """Nothing was put on the model."""
