"""Whether a merged model answers as the base with its adapter does, by the logits of real text."""

import gc
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.load import load_adapter
from ..adapters.merge import dequantize, merge
from ..data.encoding import has_encoder
from ..data.forecaster import describe_forecaster, forecast
from ..data.series_form import SeriesForm
from ..errors import Note
from ..quantization.error import QuantizationCost
from ..recipe import ModelSettings
from .heads import find_head
from .load import load_model
from .merge import Ingredient
from .models import load_with_head
from .safetensors import DTYPES, Checkpoint
from .window import POSITIONS_A_SECOND, read_positions, shorten_window

TEXTS = (
    "The film opens on a quiet street in winter, and for twenty minutes almost nothing happens; then the door opens.",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Answer:",
    "def mean(values):\n    total = 0.0\n    for v in values:\n        total += v\n    return total / len(values)\n",
    "Water boils at a lower temperature in the mountains, because the pressure of the air is lower there.",
    "Review: I wanted to like it, but the jokes are tired and the ending makes no sense.\nSentiment:",
)
_LONGEST = 256
# float32 arithmetic in another order, through tens of layers
_FLOOR = 1e-4


@dataclass(frozen=True)
class Verification:
    """How far two models' logits are apart."""

    tokens: int
    max_abs: float
    """Largest difference of a logit."""
    relative: float
    """Root mean square of the differences over that of the logits about their mean."""
    effect: float
    """The same between the base and the adapted model: what the adapter does."""
    top1: float | None
    """Share of positions whose likeliest next token is the same; None of a model of series, whose forecasts they are
    that are compared."""
    rounding: float
    """What rounding the merged weights may do to ``relative``."""

    @property
    def allowed(self) -> float:
        """No more than rounding explains, nor than half of what the adapter does."""
        return max(_FLOOR, min(self.rounding, self.effect / 2))

    @property
    def passed(self) -> bool:
        """Whether the merged model stands for the adapted one."""
        return self.relative <= self.allowed

    def text(self) -> str:
        """For a person."""
        verdict = "the merged model answers as the adapted one" if self.passed else "NOT the adapted model"
        what = "logits" if self.top1 is not None else "forecasts"
        apart, allowed, moved = (f"{100 * share:.2g} %" for share in (self.relative, self.allowed, self.effect))
        lines = [
            f"{verdict}: {what} differ by {apart} (allowed {allowed}; the adapter moves them by {moved}), "
            f"at most {self.max_abs:.3g}"
        ]
        if self.top1 is not None:
            lines[0] += f"; same likeliest token at {100 * self.top1:.1f} % of {self.tokens} positions"
        if not self.passed and self.relative <= self.rounding:
            lines.append("rounding explains it, but it swallows what the adapter does; merge with --dtype float32")
        return "\n  ".join(lines)


def verify_merge(
    merged: Path,
    adapters: str | Path | Sequence[Ingredient],
    base: str | Path,
    costs: Sequence[QuantizationCost] = (),
) -> Verification:
    """Compare the logits of the merged folder with those of base and adapter, or of the sum of several adapters.

    Both compute in float32, one after the other, so that only the rounding of the stored weights sets them apart:
    independent errors of at most eps / 2 in each weight, which add up as the root of the number of matrices that
    the signal passes. Quantized models compute on their dense weights.

    Args:
        costs: what quantizing again cost, where the merged model is quantized.
    """
    ingredients = [Ingredient(Path(adapters))] if isinstance(adapters, str | Path) else adapters
    head = find_head(ingredients[0].path)
    settings = ModelSettings(path=str(base), dtype="float32")
    model, tokenizer = load_model(settings.path, dtype="float32") if head is None else load_with_head(settings, head)
    dequantize(model.eval(), torch.float32)
    if (positions := read_positions(ingredients[0].path)) is not None:
        shorten_window(model, getattr(tokenizer, "feature_extractor", tokenizer), positions // POSITIONS_A_SECOND)
    forecasts = isinstance(tokenizer, SeriesForm)
    compute = _compute_forecasts if forecasts else partial(compute_logits, inputs=_make_inputs(model, tokenizer))
    plain = compute(model)
    if len(ingredients) == 1 and ingredients[0].weight == 1:
        _load_quietly(model, ingredients[0]).eval()
    else:
        _add_adapters(model, ingredients)
    want = compute(model)
    del model
    gc.collect()  # modules are cycles; two models at once may be more than fits
    model, _ = load_model(str(merged), dtype="float32")
    dequantize(model, torch.float32)
    got = compute(model)
    del model
    gc.collect()  # a folder whose files are mapped cannot be renamed everywhere
    return Verification(
        tokens=len(want),
        max_abs=(got - want).abs().max().item(),
        relative=compute_logit_error(got, want),
        effect=compute_logit_error(plain, want),
        top1=None if forecasts else (got.argmax(1) == want.argmax(1)).double().mean().item(),
        rounding=math.hypot(*(layer.of_weight for layer in costs)) if costs else _estimate_rounding(merged),
    )


def _make_inputs(model: PreTrainedModel, processor: Any) -> list[dict[str, Tensor]]:
    """What both models are asked; a decoder that begins by itself gets the same text to write."""
    if model.main_input_name != "input_ids":
        return [_make_noise(model, processor, seed) for seed in range(len(TEXTS))]
    texts = [torch.tensor([processor(text)["input_ids"][:_LONGEST]]) for text in TEXTS]
    return [{"input_ids": ids, **({"labels": ids} if has_encoder(model) else {})} for ids in texts]


def _make_noise(model: PreTrainedModel, processor: Any, seed: int) -> dict[str, Tensor]:
    """A second of noise, to which a decoder writes the first of the texts."""
    extractor = getattr(processor, "feature_extractor", processor)
    sound = torch.randn(extractor.sampling_rate, generator=torch.Generator().manual_seed(seed)).numpy() / 10
    inputs = dict(extractor([sound], sampling_rate=extractor.sampling_rate, return_tensors="pt"))
    if not (has_encoder(model) and hasattr(processor, "tokenizer")):
        return inputs
    longest = min(_LONGEST, getattr(model.config, "max_target_positions", _LONGEST))
    ids = processor.tokenizer(TEXTS[seed])["input_ids"][:longest]
    return {**inputs, "labels": torch.tensor([ids])}


@torch.no_grad()
def _add_adapters(model: PreTrainedModel, ingredients: Sequence[Ingredient]) -> None:
    """Put ``W + Σ w (V - W)`` into a model, each V as the adapter's own layers make it."""
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    changes: dict[str, Tensor] = {}
    for each in ingredients:
        merge(_load_quietly(model, each))
        for name, p in model.named_parameters():
            if not torch.equal(p, plain[name]):
                changes[name] = changes.get(name, torch.zeros_like(p)) + each.weight * (p - plain[name])
                p.copy_(plain[name])
    for name, change in changes.items():
        model.get_parameter(name).add_(change)


def _load_quietly(model: PreTrainedModel, ingredient: Ingredient) -> PreTrainedModel:
    """Put the adapter on, without the notes that the merge has given already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return load_adapter(model, ingredient.path, given=ingredient.given)


@torch.inference_mode()
def compute_logits(model: PreTrainedModel, inputs: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """The logits of every text, (positions of all texts, vocabulary)."""
    found = [model(**each).logits[0] for each in inputs]
    # of a classifier one row for a whole text
    return torch.cat([logits[None] if logits.dim() == 1 else logits for logits in found])


def _compute_forecasts(model: PreTrainedModel) -> Tensor:
    """The forecasts of a few made series, all in one row (1, N)."""
    places = np.arange(min(describe_forecaster(model).context, _LONGEST))
    series = [np.sin(places / each) + places * each / 100 for each in (1, 2, 5, 12)]
    found = forecast(model, series, [0] * len(series), len(places), len(series), lambda _: None)
    return torch.from_numpy(np.concatenate(found).ravel())[None]


def compute_logit_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the differences over that of the wanted logits about their mean.

    A difference in the common level of a position's logits does not count: it changes no probability.
    """
    got, want = (each - each.mean(1, keepdim=True) for each in (got, want))
    return ((got - want).norm() / want.norm()).item()


def _estimate_rounding(folder: Path) -> float:
    """How far rounding every stored matrix may move the logits, relative to them."""
    matrices = [slot for slot in Checkpoint.open(folder).slots.values() if slot.plain and len(slot.shape) > 1]
    eps = max(torch.finfo(DTYPES[slot.code]).eps for slot in matrices)
    return eps / 2 * len(matrices) ** 0.5
