"""The kinds of data that a recipe can train on: one file with the same five functions each, see `Modality`."""

from collections.abc import Callable

from ...checkpoints.kind import read_kind
from ...recipe import ModelSettings
from ..modality import Modality
from . import text
from .classify import Classification

MODALITIES: dict[str, Modality] = {"text": text}

_WITH_A_HEAD: dict[str, Callable[[], Modality]] = {
    "classify": lambda: Classification("classify"),
    "tokens": lambda: Classification("tokens"),
}


def choose_modality(settings: ModelSettings) -> Modality:
    """The modality of a recipe's model; of kind auto a local model's config.json says which."""
    kind = (read_kind(settings.path) or "causal") if settings.kind == "auto" else settings.kind
    return _WITH_A_HEAD[kind]() if kind in _WITH_A_HEAD else MODALITIES["text"]
