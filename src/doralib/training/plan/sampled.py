"""Models whose batches are more than rows of tokens: a few rows are made into a batch, without the model's values."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...adapters.adapt import adapt
from ...checkpoints.kind import is_pipeline
from ...checkpoints.models import load_config
from ...checkpoints.pipelines import list_modules
from ...data.rows import RawRows
from ...errors import UsageError
from ...recipe import Recipe
from ..configure import configure_adapter
from ..modality import Collate, Modality
from .skeleton import weigh
from .storage import find_storage_of, replace_quantized
from .trace import StepBytes, trace_loss, trace_most

_LOOKED_AT = 64
# what a model asks the values of: how large its pictures are
_SIZES = ("image_sizes", "image_grid_thw", "video_grid_thw", "spatial_shapes", "sizes_B6")


@dataclass(frozen=True)
class SampledRows:
    """The rows that a batch was made of."""

    shape: str
    """Of the largest of them as the model takes it, for a person."""
    told: str
    """Where this is known from."""

    def describe(self, rows: int) -> str:
        """So many rows, for a person."""
        return f"{rows} x ({self.shape})"

    def describe_logits(self, rows: int) -> str:  # noqa: ARG002
        """Where the head and the loss are counted."""
        return "with the activations"


@dataclass(frozen=True)
class Beside:
    """The parts of a pipeline that are not trained: they make pictures and captions into batches before training."""

    weights: int
    """Bytes."""
    most: int
    """The most bytes that they take of a device at once, what they compute included."""


class Sampled:
    """The model of a recipe on the meta device, and batches of its largest rows.

    Args:
        modality: It has read the rows.
        rows: All of the recipe; some are looked at.

    Raises:
        DoraError: if the rows or the model cannot be taken.
    """

    def __init__(self, recipe: Recipe, modality: Modality, rows: RawRows) -> None:
        self.recipe = recipe
        # what it learns of these rows is not what it will know of all
        modality = modality if isinstance(modality, ModuleType) else copy.copy(modality)
        model, processor = modality.load(recipe.model, empty=True)
        config = configure_adapter(modality, model, processor, recipe)
        _quantize(model, recipe)
        self._plain, self._config = model, config
        few = _choose(rows)
        data = modality.prepare(few, recipe.data, model, processor)
        collate = modality.collate(model, processor, data)
        if collate is None:
            raise UsageError(
                f"plan: the batches of objective {recipe.objective.kind} are made by its trainer, and not known"
            )
        self._collate: Collate = collate
        lengths = data.train.rows["length"]
        self._largest = data.train.rows[int(np.argmax(lengths))]
        self.beside = _weigh_beside(processor, model)
        told = f"the largest of {len(few.train):,} rows out of {len(rows.train):,}"
        self.rows = SampledRows(_describe(self._collate([self._largest])), told)

    def adapted(self) -> Any:
        """The adapted model in training mode, as the recipe checkpoints it."""
        model = adapt(copy.deepcopy(self._plain), self._config)
        if getattr(model.config, "apply_spec_augment", False):
            # it asks how long the sounds are, and hides some of each
            model.config.apply_spec_augment = False
        training = self.recipe.training
        if training.get("gradient_checkpointing") or training.get("activation_checkpointing"):
            model.activation_checkpointing_enable()
        return model.train()

    def trace(self, model: Any, rows: int) -> StepBytes:
        """The bytes of a step with so many rows, each like the largest.

        Raises:
            UsageError: if a step of the model asks for values.
        """
        batch = _to_meta(self._collate([self._largest] * rows))
        batch.pop("num_tokens", None)
        try:
            return trace_loss(model, lambda: model(**batch)["loss"])
        except Exception as error:
            # whatever a model does without values
            said = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UsageError(f"the memory of this model is not estimated: its step asks for values ({said})") from error


def _choose(rows: RawRows) -> RawRows:
    """Some of the rows for training, from all over; none are held out."""
    places = np.unique(np.linspace(0, len(rows.train) - 1, min(len(rows.train), _LOOKED_AT)).astype(int)).tolist()
    numbers = tuple(rows.train_numbers[i] for i in places)
    return replace(rows, train=rows.train.select(places), validation=None, train_numbers=numbers, validation_numbers=())


def _quantize(model: nn.Module, recipe: Recipe) -> None:
    if is_pipeline(recipe.model.path):
        replace_quantized(next(model.children()), find_storage_of(recipe.model, None))
    else:
        replace_quantized(model, find_storage_of(recipe.model, load_config(recipe.model)))


def _weigh_beside(processor: Any, model: nn.Module) -> Beside | None:
    """None of a model that has no such parts."""
    pipeline = getattr(processor, "pipeline", None)
    if pipeline is None:
        return None
    trained = set(model.children())
    parts = {name: part for name, part in list_modules(pipeline).items() if part not in trained}
    sizes = {name: weigh(part).frozen_bytes for name, part in parts.items()}
    captions = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    latents = max(processor.latents, key=Tensor.numel)
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    pixels = torch.empty(1, 3, *(scale * side for side in latents.shape[-2:]), device="meta")
    pictures = sizes["vae"] + trace_most(pipeline.vae, lambda: pipeline.vae.encode(pixels))
    return Beside(sum(sizes.values()), max(captions, pictures))


def _describe(batch: Mapping[str, Any]) -> str:
    """The sizes of what the batch of one row holds."""
    if isinstance(batch["labels"], list):
        return f"latents {' x '.join(map(str, batch['labels'][0].shape[1:]))}"
    large = {name: value[0] for name, value in batch.items() if _is_large(name, value)}
    return ", ".join(f"{name} {' x '.join(map(str, value.shape))}" for name, value in large.items() if value.dim())


def _is_large(name: str, value: Any) -> bool:
    return name == "labels" or (isinstance(value, Tensor) and value.dim() > 1 and name not in _SIZES)


def _to_meta(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as a device holds it; vectors and sizes keep their values."""
    move = lambda value: [each.to("meta") for each in value] if isinstance(value, list) else value.to("meta")
    made = {name: move(value) if _is_large(name, value) else value for name, value in batch.items()}
    if "conditions" in batch:
        made["conditions"] = {name: move(value) for name, value in batch["conditions"].items()}
    return made
