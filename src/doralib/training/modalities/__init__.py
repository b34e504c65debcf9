"""The kinds of data that a recipe can train on: one file with the same five functions each, see `Modality`."""

from collections.abc import Callable

from ...checkpoints.kind import read_head_kind
from ...recipe import Recipe
from ..modality import Modality
from . import text
from .classify import Classification
from .preference import Preference

MODALITIES: dict[str, Modality] = {"text": text}

_WITH_A_HEAD: dict[str, Callable[[], Modality]] = {
    "classify": lambda: Classification("classify"),
    "tokens": lambda: Classification("tokens"),
}


def choose_modality(recipe: Recipe) -> Modality:
    """The modality of a recipe's model and objective; of kind auto a local model's config.json says which."""
    if recipe.objective.kind != "sft":
        return Preference(recipe.objective)
    settings = recipe.model
    kind = (read_head_kind(settings.path) or "causal") if settings.kind == "auto" else settings.kind
    return _WITH_A_HEAD[kind]() if kind in _WITH_A_HEAD else MODALITIES["text"]
