"""Labels of sounds: a model with a head says one for each."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...checkpoints.heads import Head
from ...checkpoints.models import Loaded, load_sound_classifier
from ...checkpoints.window import has_window, shorten_window
from ...data.classes import find_labels, number_labels, read_labels
from ...data.clips import ClipCollator, check_clips, encode_clips
from ...data.prepare import BadRow, Row
from ...data.rows import RawRows, read_both
from ...data.sounds import Clip, Hearing
from ...errors import UsageError
from ...evaluation.classifier import list_labels, predict_sounds
from ...evaluation.result import TaskResult
from ...evaluation.validation import rate_sounds
from ...progress import Tick, log_progress
from ...recipe import DataSettings, ModelSettings
from ..modality import Collate, Prepared
from .speech import describe_sounds, make_sample

_SAMPLES = 5


@dataclass
class SoundLabels:
    """The functions of a modality; it knows the labels once it has seen the rows, and the sounds that are held out."""

    head: Head | None = None
    held_out: list[tuple[Clip, str]] = field(default_factory=list)
    shown: list[Clip] = field(default_factory=list)

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows, with the columns of sounds and of their labels; the labels are those of all rows."""
        if settings.style not in ("auto", "completion") or settings.prompt is not None:
            raise UsageError("data: a classifier of sounds reads data.audio and data.target, no prompt and no style")
        if settings.too_long == "split":
            raise UsageError("data.too_long: a sound with a label cannot be divided; skip or truncate it")
        settings = settings.model_copy(update={"style": "completion", "target": settings.target or "label"})
        rows = check_clips(read_both(settings, seed), settings)
        self.head = Head("audio-class", find_labels(rows, settings, by_word=False))
        return RawRows(rows.train, rows.validation, rows.train_numbers, rows.validation_numbers, settings)

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """The model with a head for these labels, and its feature extractor."""
        return load_sound_classifier(settings, self.head, empty=empty)

    def prepare(
        self, rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any, tick: Tick | None = None
    ) -> Prepared:
        """The numbers of the labels of usable rows, whose sounds are read when a batch needs them."""
        settings, hearing = rows.settings or settings, Hearing(processor)
        if settings.audio_seconds and has_window(processor):
            shorten_window(model, processor, settings.audio_seconds)
        labels = list_labels(model)
        ids = number_labels(rows.train, settings, labels)

        def label(row: Row, _: float) -> int:
            (said,) = read_labels(row, settings, by_word=False)
            if said not in ids:
                raise BadRow("unknown label", f"{said!r} is none of the labels of train")
            return ids[said]

        train = encode_clips(rows.train, rows.train_numbers, settings, hearing, label, tick)
        held = None
        if rows.validation is not None:
            held = encode_clips(rows.validation, rows.validation_numbers, settings, hearing, label, tick)
            numbers = held.prepared.rows["labels"][:]
            clips = held.prepared.rows["audio"][:]
            self.held_out = [(clip, labels[i]) for clip, i in zip(clips, numbers, strict=True)]
        few = (train if held is None else held).prepared.rows[:_SAMPLES]
        self.shown = few["audio"]
        samples = [make_sample(clip, labels[i], hearing) for clip, i in zip(self.shown, few["labels"], strict=True)]
        told = {"sound": describe_sounds(train, held, hearing), "labels": ", ".join(labels)}
        return Prepared(train.prepared, held.prepared if held else None, samples, told)

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Sounds read from their files, as features."""
        return ClipCollator(Hearing(processor))

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        asked: list[dict[str, str]],
    ) -> list[str]:
        """The labels that the model gives."""
        labels = list_labels(model)
        found = predict_sounds(model, processor, self.shown[: len(asked)], _SAMPLES, lambda _: None)
        return [labels[i] for i in found]

    def score(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        *,
        batch_size: int,
        seed: int,
        tick: Tick | None,
    ) -> dict[str, TaskResult]:
        """Accuracy and F1 on the validation rows; nothing where there are none."""
        if not self.held_out:
            return {}
        tick = tick or log_progress()
        advance = lambda share: tick("validation", share, 1.0)
        return {"validation": rate_sounds("validation", self.held_out, model, processor, batch_size, seed, advance)}
