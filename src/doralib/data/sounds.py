"""Sounds: read from files, mixed to one channel, resampled to what a model hears, and made into its features."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..extras import import_extra
from .prepare import BadRow

if TYPE_CHECKING:
    # a task is checked without torch
    from torch import Tensor

Clip = str | Mapping[str, Any]
"""The path of a file, or its ``bytes`` with the ``path`` it had, as data sets hold it."""
Sound = NDArray[np.float32]

_SILENT = 1e-4
"""Below this no sample of a sound is heard: -80 dB."""
_SHORTEST = 0.1
"""Seconds, below which convolutions have no frame."""


@dataclass(frozen=True)
class Hearing:
    """What a model hears: one channel at so many samples a second, and no sound longer than its window."""

    extractor: Any
    """The feature extractor of its processor."""

    @property
    def rate(self) -> int:
        return int(self.extractor.sampling_rate)

    @property
    def window(self) -> int | None:
        """Seconds to which every sound is filled up; None: sounds are as long as they are."""
        return int(self.extractor.chunk_length) if hasattr(self.extractor, "nb_max_frames") else None

    def read(self, clip: Clip) -> Sound:
        """The samples of a sound, (T,).

        Raises:
            BadRow: if it is not there, broken, silent, or too short to hear.
            UsageError: if soundfile or soxr is not installed.
        """
        sound, rate = hear_clip(clip)
        return sound if rate == self.rate else _resample(sound, rate, self.rate)

    def make_features(self, sounds: Sequence[Sound], *, masked: bool = False) -> "dict[str, Tensor]":
        """The model's inputs for some sounds, filled up to its window or to the longest.

        Args:
            masked: With the mask of what is sound, which SpecAugment looks at.
        """
        more: dict[str, Any] = {"return_attention_mask": True} if masked else {}
        more |= {} if self.window else {"padding": True}
        return dict(self.extractor(list(sounds), sampling_rate=self.rate, return_tensors="pt", **more))


def hear_clip(clip: Clip) -> tuple[Sound, int]:
    """The samples of a sound, (T,), at the rate that it was recorded with.

    Raises:
        BadRow: if it is not there, broken, silent, or too short to hear.
        UsageError: if soundfile is not installed.
    """
    samples_TC, rate = _read_file(clip)
    sound: Sound = samples_TC.mean(axis=1, dtype=np.float32)
    if not np.isfinite(sound).all():
        raise BadRow("broken", f"{name_clip(clip)} holds numbers that are not finite")
    if len(sound) < _SHORTEST * rate:
        raise BadRow("too short", f"{name_clip(clip)} has {len(sound) / rate:.2f} seconds")
    if np.abs(sound).max() < _SILENT:
        raise BadRow("silent", f"{name_clip(clip)} is silent: {len(sound) / rate:.1f} seconds of nothing")
    return sound, rate


def name_clip(clip: Clip) -> str:
    """How a sound is called in messages."""
    return clip if isinstance(clip, str) else str(clip.get("path") or "a sound")


def encode_clip(sound: Sound, rate: int) -> str:
    """A sound as a data URI that a browser plays, the same for the same sound, which OGG is not."""
    buffer = io.BytesIO()
    import_extra("soundfile", "a sound").write(buffer, sound, rate, format="MP3", subtype="MPEG_LAYER_III")
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read_file(clip: Clip) -> tuple[NDArray[np.float32], int]:
    """Samples by channel, (T, C), and how many there are a second."""
    soundfile = import_extra("soundfile", "a sound")
    data = clip if isinstance(clip, str) else clip.get("bytes")
    if isinstance(data, bytes):
        source: Any = io.BytesIO(data)
    else:
        path = Path(data or name_clip(clip))
        if not path.is_file():
            raise BadRow("missing", f"there is no sound {path}")
        source = str(path)
    try:
        samples_TC, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise BadRow("broken", f"{name_clip(clip)} cannot be read: {str(error).strip()}") from None
    return samples_TC, int(rate)


def _resample(sound: Sound, rate: int, wanted: int) -> Sound:
    return import_extra("soxr", "a sound of another rate").resample(sound, rate, wanted, quality="HQ")
