"""The kinds of data that a recipe can train on: one file with the same five functions each, see `Modality`."""

from ..modality import Modality
from . import text

MODALITIES: dict[str, Modality] = {"text": text}
