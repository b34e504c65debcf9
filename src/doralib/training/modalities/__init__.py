"""The kinds of data that a recipe can train on: one file with the same five functions each, see `Modality`."""

from collections.abc import Callable

from ...checkpoints.kind import is_pipeline, read_kind
from ...checkpoints.pipelines import import_diffusers
from ...recipe import Recipe
from ..modality import Modality
from . import text
from .classify import Classification
from .forecast import Forecasting
from .image_text import ImageText
from .preference import Preference
from .vl_bart import VisualTasks

MODALITIES: dict[str, Modality] = {"text": text}

_BY_KIND: dict[str, Callable[[], Modality]] = {
    "classify": lambda: Classification("classify"),
    "tokens": lambda: Classification("tokens"),
    "image-text": ImageText,
    "forecast": Forecasting,
}
"""Those that know the data once they have seen them."""


def choose_modality(recipe: Recipe) -> Modality:
    """The modality of a recipe's model and objective; of kind auto a local model's config.json says which."""
    if recipe.objective.kind != "sft":
        return Preference(recipe.objective)
    settings = recipe.model
    kind = (read_kind(settings.path) or "causal") if settings.kind == "auto" else settings.kind
    if kind == "vl-bart":
        return VisualTasks(recipe)
    if settings.kind == "text-to-image" or (settings.kind == "auto" and is_pipeline(settings.path)):
        import_diffusers()
        # an extra, and seconds
        from .text_to_image import Pictures  # noqa: PLC0415

        return Pictures(recipe)
    return _BY_KIND[kind]() if kind in _BY_KIND else MODALITIES["text"]
