"""How many seconds Whisper hears at once: its positions on one side, its feature extractor on the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..files import read_json
from .kind import PROCESSOR_FILES

POSITIONS = "encoder.embed_positions.weight"
"""The end of the name of the weight that is cut."""
POSITIONS_A_SECOND = 50


def shorten_window(model: Any, extractor: Any, seconds: int) -> None:
    """Let a model of Whisper's kind, and its feature extractor, hear so many seconds and no more.

    The positions that are left are those of the beginning. Nothing changes where it hears so many already.
    """
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * extractor.sampling_rate
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    fit_positions(model, extractor)


def fit_positions(model: Any, extractor: Any) -> None:
    """Cut a model's positions to what its feature extractor gives; longer ones there are none."""
    count = extractor.nb_max_frames // 2
    encoder = model.get_encoder()
    if count >= len(encoder.embed_positions.weight):
        return
    weight = encoder.embed_positions.weight.detach()[:count].clone()
    encoder.embed_positions.weight = nn.Parameter(weight, requires_grad=False)
    encoder.embed_positions.num_embeddings = count
    encoder.max_source_positions = model.config.max_source_positions = count


def has_window(extractor: Any) -> bool:
    """Whether every sound is filled up to the same length."""
    return hasattr(extractor, "nb_max_frames")


def read_positions(folder: Path) -> int | None:
    """How many positions the feature extractor in a folder needs; None if it has none with a window."""
    for name, inside in zip(PROCESSOR_FILES, ("feature_extractor", None), strict=True):
        if (folder / name).is_file():
            settings: Mapping[str, Any] = read_json(folder / name)
            settings = settings.get(inside, {}) if inside else settings
            if isinstance(settings.get("nb_max_frames"), int):
                return int(settings["nb_max_frames"]) // 2
    return None
