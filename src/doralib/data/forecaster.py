"""What transformers' models of series take and give: TimesFM, PatchTST and PatchTSMixer behind one call."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DoraError, UsageError
from .series import Values
from .windows import Scaling, find_unit, stack_pasts

_CONTEXT = 512
_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Forecaster:
    """What one model can be asked."""

    context: int
    """The most values that it looks back on."""
    horizon: int
    """The values that it forecasts at once."""
    levels: tuple[float, ...]
    """Of the quantiles that it gives besides its forecast; none of some models."""
    scaling: Scaling
    """How it scales a window itself."""
    whole: bool
    """Whether it is trained on its whole horizon alone."""
    fixed: bool
    """Whether its past is always as long as its context."""
    positive: bool
    """Whether the forecast of what was never negative is not either."""
    call: Callable[..., Any]
    """Of the model, past (B, C), lengths, frequencies and, where it is given, the future: the model's output."""
    read: Callable[[Any, Any], Tensor]
    """Of the model and its output: (B, H, 1 + Q)."""

    def choose_context(self, asked: int | None, longest: int) -> int:
        """So many values of the past as were asked for, or as the model and the longest series have, at most 512.

        Raises:
            UsageError: if the model does not take as many.
        """
        if asked is not None and (asked > self.context or (self.fixed and asked != self.context)):
            how = "always looks back on" if self.fixed else "looks back on at most"
            raise UsageError(f"series.context is {asked}, and the model {how} {self.context} values")
        if self.fixed:
            return self.context
        return asked or min(self.context, max(longest, 2), _CONTEXT)

    def choose_horizon(self, asked: int | None, *, training: bool = False) -> int:
        """So many values of the future as were asked for, or as the model forecasts at once.

        Raises:
            UsageError: if it does not forecast as many, or is not trained on so few.
        """
        if asked is not None and (asked > self.horizon or (training and self.whole and asked != self.horizon)):
            how = "is trained on no other than" if asked < self.horizon else "forecasts at most"
            raise UsageError(f"series.horizon is {asked}, and the model {how} {self.horizon} values")
        return asked or self.horizon

    def ask(self, model: nn.Module, batch: Mapping[str, Tensor], future: Tensor | None = None) -> Any:
        """The model's output on a batch of `stack_pasts`, with its own loss where the future is given.

        Args:
            model: The model, or what wraps it.
            future: (B, H), in the unit of the past.
        """
        past, dtype = batch["past_values"], next(model.parameters()).dtype
        more = {} if future is None else {"future": future.to(dtype)}
        return self.call(model, past.to(dtype), batch["lengths"].tolist(), batch["frequency"].tolist(), **more)


def describe_forecaster(model: nn.Module) -> Forecaster:
    """What a model of series can be asked.

    Raises:
        UsageError: if it is no such model.
    """
    make = _FAMILIES.get(type(model).__name__)
    if make is None:
        raise UsageError(f"a {type(model).__name__} does not forecast series; known: {', '.join(_FAMILIES)}")
    return make(model)


def is_forecaster(model: nn.Module) -> bool:
    """Whether a model forecasts series."""
    return type(model).__name__ in _FAMILIES


def find_frequency(season: int) -> int:
    """How coarse steps of time are, in TimesFM's numbers, by the values of a season: 1 weeks and months, 2 quarters."""
    return 1 if season in (12, 52) else 2 if season == 4 else 0


@torch.inference_mode()
def forecast(
    model: nn.Module,
    pasts: Sequence[Values],
    frequencies: Sequence[int],
    context: int,
    batch_size: int,
    tick: Callable[[float], None],
) -> list[Values]:
    """The forecast of each series: (H, 1 + Q), the forecast itself and the quantile of each level.

    Args:
        context: As many values as the model looks back on at most.

    Raises:
        DoraError: if the model gives NaN.
    """
    family, device = describe_forecaster(model), next(model.parameters()).device
    found: list[Values] = []
    for start in range(0, len(pasts), batch_size):
        cut = [past[-context:] for past in pasts[start : start + batch_size]]
        units = [find_unit(past, family.scaling) for past in cut]
        scaled = [unit.to(past) for unit, past in zip(units, cut, strict=True)]
        batch = stack_pasts(scaled, frequencies[start : start + batch_size], context)
        output = family.ask(model, {name: value.to(device) for name, value in batch.items()})
        values_BHQ = family.read(model, output).double().cpu().numpy()
        if not np.isfinite(values_BHQ).all():
            raise DoraError("the model gives NaN or infinite numbers; was it trained to its end?")
        for past, unit, values_HQ in zip(cut, units, values_BHQ, strict=True):
            back = unit.back(values_HQ)
            found.append(np.maximum(back, 0.0) if family.positive and past.min() >= 0 else back)
        tick(len(cut) / len(pasts))
    return found


def _describe_timesfm(model: Any, ask: Callable[..., Any], **more: Any) -> Forecaster:
    config = model.config
    levels = tuple(config.quantiles)
    read = lambda _, output: torch.cat([output.mean_predictions[..., None], output.full_predictions[..., 1:]], -1)
    return Forecaster(
        config.context_length, config.horizon_length, levels, "std", fixed=False, call=ask, read=read, **more
    )


def _describe_timesfm_1(model: Any) -> Forecaster:
    def ask(model: Any, past_BC: Tensor, lengths: list[int], frequency: list[int], future: Tensor | None = None) -> Any:
        return model(past_values=_without_padding(past_BC, lengths), freq=frequency, future_values=future)

    return _describe_timesfm(model, ask, whole=True, positive=False)


def _describe_timesfm_2_5(model: Any) -> Forecaster:
    patch = model.config.patch_length

    def ask(model: Any, past_BC: Tensor, lengths: list[int], _: list[int], future: Tensor | None = None) -> Any:
        return model(
            past_values=_without_padding(past_BC, lengths),
            forecast_context_len=math.ceil(past_BC.shape[1] / patch) * patch,
            # it looks at the whole batch for a negative value; `forecast` looks at each series
            truncate_negative=False,
            future_values=future,
        )

    return _describe_timesfm(model, ask, whole=False, positive=model.config.infer_is_positive)


def _without_padding(past_BC: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return [row[len(row) - length :] for row, length in zip(past_BC, lengths, strict=True)]


def _describe_patches(model: Any, mask: str) -> Forecaster:
    """PatchTST and PatchTSMixer, whose past is always as long as in their training.

    Args:
        mask: What they call the mask of values that are there.
    """
    config = model.config
    counts = model.distribution_output is not None and config.distribution_output == "negative_binomial"
    scaling = {"std": "std", "mean": "mean", True: "mean"}.get(config.scaling)

    def ask(model: Any, past_BC: Tensor, lengths: list[int], _: list[int], future: Tensor | None = None) -> Any:
        places = torch.arange(past_BC.shape[1], device=past_BC.device)
        there_BC = places >= past_BC.shape[1] - torch.tensor(lengths, device=past_BC.device)[:, None]
        asked = {"past_values": past_BC[..., None], mask: there_BC[..., None].to(past_BC.dtype)}
        return model(**asked, future_values=None if future is None else future[..., None])

    levels = () if model.distribution_output is None else _LEVELS
    return Forecaster(
        context=config.context_length,
        horizon=config.prediction_length,
        levels=levels,
        scaling=None if counts else scaling,  # type: ignore[arg-type]
        whole=True,
        fixed=True,
        positive=False,
        call=ask,
        read=_read_patches,
    )


def _read_patches(model: Any, output: Any) -> Tensor:
    """Forecast and quantiles; the forecast of a distribution is its median."""
    if model.distribution_output is None:
        point_BH: Tensor = output.prediction_outputs[..., 0]
        return point_BH[..., None]
    drawn = model.distribution_output.distribution(output.prediction_outputs, loc=output.loc, scale=output.scale)
    levels_HQ = [_quantile(drawn, level)[..., 0] for level in (0.5, *_LEVELS)]
    return torch.stack(levels_HQ, -1)


def _quantile(distribution: Any, level: float) -> Tensor:
    """The quantile of each of these distributions, by its closed form: torch has that of the normal one alone."""
    from scipy import special, stats  # noqa: PLC0415  a model without a distribution does not need it

    base, as_double = distribution, lambda tensor: tensor.detach().double().cpu()
    while isinstance(base, (torch.distributions.Independent, torch.distributions.TransformedDistribution)):
        base = base.base_dist
    if isinstance(base, torch.distributions.NegativeBinomial):
        successes, share = as_double(base.total_count), 1 - as_double(base.probs)
        return torch.from_numpy(stats.nbinom.ppf(level, successes.numpy(), share.numpy()))
    if isinstance(base, torch.distributions.StudentT):
        standard = torch.from_numpy(special.stdtrit(as_double(base.df).numpy(), level))
    else:
        standard = torch.full_like(as_double(base.loc), special.ndtri(level))
    found = as_double(base.loc) + as_double(base.scale) * standard
    # transformers' own, of an affine map
    is_mapped = isinstance(distribution, torch.distributions.TransformedDistribution)
    return as_double(distribution.loc) + as_double(distribution.scale) * found if is_mapped else found


_FAMILIES: dict[str, Callable[[Any], Forecaster]] = {
    "TimesFmModelForPrediction": _describe_timesfm_1,
    "TimesFm2_5ModelForPrediction": _describe_timesfm_2_5,
    "PatchTSTForPrediction": lambda model: _describe_patches(model, "past_observed_mask"),
    "PatchTSMixerForPrediction": lambda model: _describe_patches(model, "observed_mask"),
}
