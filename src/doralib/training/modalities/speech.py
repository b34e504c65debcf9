"""Speech to text: Whisper and other encoder-decoders, and models like wav2vec2 that name a letter for each frame."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...checkpoints.models import Loaded, load_speech
from ...checkpoints.window import has_window, shorten_window
from ...data.clips import ClipCollator, Clips, check_clips, encode_clips
from ...data.encoding import has_encoder
from ...data.prepare import BadRow, Row, Sample
from ...data.rows import RawRows, read_both
from ...data.sounds import Clip, Hearing, encode_clip, name_clip
from ...data.survey import LEFT, RIGHT
from ...data.templates import value_text
from ...errors import UsageError
from ...evaluation.result import TaskResult
from ...evaluation.transcripts import Spoken, transcribe
from ...evaluation.validation import rate_transcripts
from ...progress import Tick, log_progress
from ...recipe import DataSettings, ModelSettings
from ...runs.charts import time_text
from ..modality import Collate, Prepared

_SAMPLES = 5


@dataclass
class Speech:
    """The functions of a modality; it knows the held-out sounds once it has prepared the rows."""

    held_out: list[tuple[Clip, str]] = field(default_factory=list)
    shown: list[Clip] = field(default_factory=list)

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows, with the columns of sounds and of what is said in them."""
        if settings.style not in ("auto", "completion", "text"):
            raise UsageError(f"data.style: speech reads data.audio and data.target, not style {settings.style}")
        if settings.prompt is not None:
            raise UsageError("data.prompt: what a model hears is its prompt; leave it out")
        if settings.too_long not in (None, "skip"):
            raise UsageError(f"data.too_long: {settings.too_long} would part a sound from its text; only skip can be")
        settings = settings.model_copy(update={"style": "text", "target": settings.target or "text"})
        rows = check_clips(read_both(settings, seed), settings)
        return RawRows(rows.train, rows.validation, rows.train_numbers, rows.validation_numbers, settings)

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """A model of speech and its processor."""
        return load_speech(settings, empty=empty)

    def prepare(
        self, rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any, tick: Tick | None = None
    ) -> Prepared:
        """The labels of usable rows, whose sounds are read when a batch needs them."""
        settings = rows.settings or settings
        hearing = Hearing(processor.feature_extractor)
        if settings.audio_seconds and has_window(hearing.extractor):
            shorten_window(model, hearing.extractor, settings.audio_seconds)
        said = _set_language(model, processor, settings)
        spell = _Spelling(model, processor, settings)
        train = encode_clips(rows.train, rows.train_numbers, settings, hearing, spell, tick)
        held = None
        if rows.validation is not None:
            held = encode_clips(rows.validation, rows.validation_numbers, settings, hearing, spell, tick)
            self.held_out = list(zip(held.prepared.rows["audio"][:], held.texts, strict=True))
        told = {"sound": describe_sounds(train, held, hearing), **({"language": said} if said else {})}
        few = train if held is None else held
        self.shown = few.prepared.rows["audio"][:_SAMPLES]
        samples = [make_sample(clip, text, hearing) for clip, text in zip(self.shown, few.texts, strict=False)]
        row = train.prepared.rows[0]
        first = f"{name_clip(row['audio'])}\n{LEFT}{processor.tokenizer.decode(row['labels'])}{RIGHT}"
        return Prepared(train.prepared, held.prepared if held else None, samples, told, first)

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Sounds read from their files, as features; labels padded with what does not count."""
        masked = bool(getattr(model.config, "apply_spec_augment", False)) and has_encoder(model)
        return ClipCollator(Hearing(processor.feature_extractor), masked=masked)

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,  # noqa: ARG002
        asked: list[dict[str, str]],
    ) -> list[str]:
        """What the model hears."""
        return transcribe(model, processor, self.shown[: len(asked)], batch_size=_SAMPLES)

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
        """Word and character error rates on the validation rows; nothing where there are none."""
        if not self.held_out:
            return {}
        tick = tick or log_progress()
        advance = lambda share: tick("validation", share, 1.0)
        return {
            "validation": rate_transcripts(
                "validation", Spoken(self.held_out), model, processor, batch_size, seed, advance
            )
        }


@dataclass(frozen=True)
class _Spelling:
    """The tokens that a model has to write for a row."""

    model: Any
    processor: Any
    settings: DataSettings

    def __call__(self, row: Row, seconds: float) -> list[int]:
        text = value_text(row[self.settings.target or ""]).strip()
        if not text:
            raise BadRow("empty", f"nothing in {self.settings.target!r}")
        ids: list[int] = self.processor.tokenizer(text)["input_ids"]
        return self._for_decoder(ids) if has_encoder(self.model) else self._for_frames(ids, seconds)

    def _for_decoder(self, ids: list[int]) -> list[int]:
        config, tokenizer = self.model.config, self.processor.tokenizer
        # the model puts the first token there itself
        ids = ids[1:] if ids[0] in (config.decoder_start_token_id, tokenizer.bos_token_id) else ids
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        limit = min(self.settings.max_length, getattr(config, "max_target_positions", None) or self.settings.max_length)
        if len(ids) > limit:
            raise BadRow(f"longer than {limit} tokens", f"{len(ids)} tokens, the most are {limit}")
        return ids

    def _for_frames(self, ids: list[int], seconds: float) -> list[int]:
        """A letter takes a frame, and a second one between it and its like."""
        if self.processor.tokenizer.unk_token_id in ids:
            raise BadRow("other letters", f"{self.processor.tokenizer.decode(ids)!r} has letters that the model lacks")
        samples = torch.tensor(round(seconds * self.processor.feature_extractor.sampling_rate))
        frames = int(self.model._get_feat_extract_output_lengths(samples))
        needed = len(ids) + sum(one == other for one, other in itertools.pairwise(ids))
        if needed > frames:
            raise BadRow("more letters than frames", f"{needed} letters in {frames} frames of {seconds:.1f} seconds")
        return ids


def make_sample(clip: Clip, text: str, hearing: Hearing) -> Sample:
    """A sound to play, with what is said in it."""
    name = name_clip(clip).rpartition("/")[2]
    return Sample(name, text, {"audio": name_clip(clip)}, sound=encode_clip(hearing.read(clip), hearing.rate))


def describe_sounds(train: Clips, held: Clips | None, hearing: Hearing) -> str:
    """How much sound there is, for a person."""
    window = f", each filled up to {hearing.window} s" if hearing.window else ""
    beside = f", {time_text(held.seconds)} held out" if held else ""
    return f"{time_text(train.seconds)}{beside}{window}"


def _set_language(model: Any, processor: Any, settings: DataSettings) -> str:
    """Make Whisper's tokenizer and its settings of generation say language and task; what they are, for a person.

    Raises:
        UsageError: if the model asks for a language and none is given, it has none of that name, or marks none.
    """
    tokenizer, generation = processor.tokenizer, model.generation_config if model.can_generate() else None
    marks = hasattr(tokenizer, "set_prefix_tokens") and getattr(generation, "is_multilingual", True) is not False
    if not marks:
        if given := [f"data.{name}" for name in ("language", "translate") if getattr(settings, name)]:
            raise UsageError(f"{', '.join(given)}: this model marks neither language nor task; leave it out")
        return ""
    if settings.language is None:
        raise UsageError("data.language: name the language that is spoken, such as ro; the model writes it first")
    task = "translate" if settings.translate else "transcribe"
    try:
        tokenizer.set_prefix_tokens(language=settings.language.lower(), task=task)
    except ValueError as error:
        raise UsageError(f"data.language: {str(error).splitlines()[0]}") from None
    # update() takes no word that is not there
    for name, value in {"language": tokenizer.language, "task": task, "forced_decoder_ids": None}.items():
        setattr(model.generation_config, name, value)
    tokenizer.init_kwargs.update(language=tokenizer.language, task=task)
    return f"{tokenizer.language}, {task}"
