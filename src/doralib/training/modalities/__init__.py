"""The kinds of data that a recipe can train on: one file with the same five functions each, see `Modality`."""

from collections.abc import Callable

from ...checkpoints.kind import is_pipeline, read_kind
from ...checkpoints.pipelines import import_diffusers
from ...errors import UsageError
from ...recipe import DataSettings, Recipe
from ..modality import Modality
from . import seq2seq, text
from .audio_class import SoundLabels
from .classify import Classification
from .forecast import Forecasting
from .image_text import ImageText
from .preference import Preference
from .speech import Speech
from .vl_bart import VisualTasks

MODALITIES: dict[str, Modality] = {"text": text, "seq2seq": seq2seq}

_BY_KIND: dict[str, Callable[[], Modality]] = {
    "classify": lambda: Classification("classify"),
    "tokens": lambda: Classification("tokens"),
    "image-text": ImageText,
    "speech": Speech,
    "audio-class": SoundLabels,
    "forecast": Forecasting,
}
"""Those that know the data once they have seen them."""


def choose_modality(recipe: Recipe) -> Modality:
    """The modality of a recipe's model and objective; of kind auto a local model's config.json says which."""
    if recipe.objective.kind != "sft":
        return Preference(recipe.objective)
    settings = recipe.model
    kind = (read_kind(settings.path) or "causal") if settings.kind == "auto" else settings.kind
    _check_read(recipe.data, kind)
    if kind == "vl-bart":
        return VisualTasks(recipe)
    if settings.kind == "text-to-image" or (settings.kind == "auto" and is_pipeline(settings.path)):
        import_diffusers()
        # an extra, and seconds
        from .text_to_image import Pictures  # noqa: PLC0415

        return Pictures(recipe)
    return _BY_KIND[kind]() if kind in _BY_KIND else MODALITIES.get(kind, MODALITIES["text"])


_READ_BY = {
    **dict.fromkeys(("audio", "audio_seconds"), ("speech", "audio-class")),
    "root": ("image-text", "speech", "audio-class"),
    **dict.fromkeys(("videos", "video_frames"), ("image-text",)),
    "translate": ("speech",),
    "language": ("seq2seq", "speech"),
    "source_language": ("seq2seq",),
}
"""Settings of data that are for some kinds of model alone."""


def _check_read(data: DataSettings, kind: str) -> None:
    """Check that nothing is set that this kind of model would not read.

    Raises:
        UsageError: naming what is set, and who reads it.
    """
    problems = [
        f"data.{name}: read for model.kind {' or '.join(kinds)}, and this model is of kind {kind}; leave it out"
        for name, kinds in _READ_BY.items()
        if kind not in kinds and getattr(data, name) != DataSettings.model_fields[name].default
    ]
    if problems:
        raise UsageError("\n".join(problems))
