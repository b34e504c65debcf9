"""Text about pictures: conversations, captions and questions for a model that takes both, by its own processor."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import torch
from torch import nn

from ...adapters.towers import choose_language_layers, describe_parts
from ...checkpoints.models import Loaded, load_image_text
from ...config import DoraConfig
from ...data.detect import look_at
from ...data.encoding import check_ids, context_length, encode, pad_token
from ...data.layouts import make_questions
from ...data.picture_encoder import PictureEncoder, PictureText, make_encoder
from ...data.picture_rows import Seen, describe_layout, find_layout, list_captioned, read_picture_row
from ...data.picture_tokens import PictureCollator, tokenize_pictures
from ...data.pictures import Picture, encode_thumbnail, find_root, make_thumbnail
from ...data.prepare import BadRow, PreparedRows, Row, Sample
from ...data.prompt_form import PromptForm
from ...data.rows import RawRows, as_written, keep_undecoded, read_both, read_sets
from ...data.survey import LEFT, RIGHT, shorten, split_learned, survey_rows
from ...data.templates import columns_in
from ...data.tokenize import join_prepared
from ...data.videos import measure_video, open_video
from ...errors import DoraError, UsageError, collecting, raise_all
from ...evaluation.generation import answer_pictures, describe_ends
from ...progress import Tick
from ...recipe import DataSettings, ModelSettings
from ..modality import Collate, Prepared

log = logging.getLogger(__name__)

_SAMPLES = 24
_SAMPLE_TOKENS = 64
_AT_ONCE = 8
_FRAMES_SHOWN = 3
_PAGE_BYTES = 3_000_000
"""So much of pictures stands in a report at most."""


@dataclass
class ImageText:
    """The functions of a modality; it knows the layout of each set, and what the samples ask, once it has read them."""

    settings: DataSettings | None = None
    asked: list[PictureText] = field(default_factory=list)

    def check_rows(self, settings: DataSettings, seed: int) -> RawRows:
        """The rows of each set, with the columns of pictures and texts."""
        wrong = {
            "data.packing": bool(settings.packing),
            "data.too_long: split": settings.too_long == "split",
            f"data.style: {settings.style}": settings.style not in ("auto", "chat"),
        }
        if refused := [name for name, asked in wrong.items() if asked]:
            raise UsageError(
                f"{', '.join(refused)}: not for a model that takes pictures; data.layout says what a row is"
            )
        if settings.layout == "auto" and any(list_captioned(each.path) is not None for each in settings.sources()):
            settings = settings.model_copy(update={"layout": "caption"})
        if settings.layout == "value":
            rows = read_both(settings, seed)
            names = {"layout": "vqa", "videos": "video", "prompt": "question", "target": "answer"}
            self.settings = asked = settings.model_copy(update={**names, "style": "chat"})
            held = None if rows.validation is None else make_questions(rows.validation, settings.root)
            return replace(rows, train=make_questions(rows.train, settings.root), validation=held, settings=asked)
        self.settings = settings
        problems: list[DoraError] = []
        found: list[RawRows] = []
        sources = [source.path for source in settings.sources()]
        for each, source in zip(read_sets(settings, seed), sources, strict=True):
            with collecting(problems):
                found.append(_find_layout(each, settings, source))
        raise_all(problems)
        first, *others = found
        return replace(first, others=tuple(others))

    def load(self, settings: ModelSettings, *, empty: bool = False) -> Loaded:
        """The model and its processor."""
        model, processor = load_image_text(settings, empty=empty)
        if self.settings is not None:
            model.doralib_image_pixels = self.settings.image_pixels
            model.doralib_video_frames = self.settings.video_frames
        return model, processor

    def choose_targets(self, model: nn.Module, adapter: DoraConfig) -> DoraConfig:
        """The linear layers of the language model, where the settings name none."""
        return choose_language_layers(model, adapter)

    def prepare(
        self, rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any, tick: Tick | None = None
    ) -> Prepared:
        """Tokens and labels, and where the pictures are, which are read for each batch."""
        limit = context_length(model)
        if limit is not None and settings.max_length > limit:
            settings = settings.model_copy(update={"max_length": limit})
        encoder = PictureEncoder(processor, settings.image_pixels, settings.video_frames)
        trained, held_out = [], []
        for each in (rows, *rows.others):
            own = _limit(each, settings)
            trained.append(_tokenize(each.train, each.train_numbers, own, own.train, encoder, tick))
            if each.validation is not None:
                place = settings.validation if isinstance(settings.validation, str) else own.train
                held_out.append(_tokenize(each.validation, each.validation_numbers, own, place, encoder, tick))
        train = join_prepared(trained)
        validation = join_prepared(held_out) if held_out else None
        for part in (train, validation):
            if part is not None:
                check_ids(model, processor.tokenizer, part.rows["input_ids"], "the rows")
        own = _limit(rows, settings)
        layouts = [describe_layout(_limit(each, settings)) for each in (rows, *rows.others)]
        samples = self._find_samples(rows, own, encoder)
        counts = zip(train.rows["num_pictures"], train.rows["num_videos"], strict=True)
        kinds = [(pictures > 0) + 2 * (videos > 0) for pictures, videos in counts]
        return Prepared(
            train,
            validation,
            samples,
            {
                "rows are read as": "; ".join(dict.fromkeys(layouts)),
                "pictures": _describe_pictures(train, settings),
                **describe_parts(model),
                "an answer ends at": describe_ends(model, processor.tokenizer),
            },
            _mark_first(train.rows[0], encoder),
            _survey(train, validation, own, encoder),
            _make_form(own),
            kinds,
        )

    def collate(self, model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG002
        """Rows padded on the right, with what the processor makes of their pictures."""
        dtype = getattr(model, "dtype", torch.float32)
        return PictureCollator(make_encoder(model, processor), pad_token(processor.tokenizer, model), dtype)

    def samples(
        self,
        model: nn.Module,
        processor: Any,
        settings: DataSettings,
        asked: list[dict[str, str]],
    ) -> list[str]:
        """What the model says to each question, about as long as the expected answers."""
        longest = max(len(encode(processor.tokenizer, each["expected"], chat=True)) for each in asked)
        answers = answer_pictures(
            model,
            PictureEncoder(processor, settings.image_pixels, settings.video_frames),
            self.asked[: len(asked)],
            max_new_tokens=min(longest + 8, _SAMPLE_TOKENS),
            batch_size=_AT_ONCE,
        )
        return [answer.text.strip() for answer in answers]

    def _find_samples(self, rows: RawRows, settings: DataSettings, encoder: PictureEncoder) -> list[Sample]:
        """The first usable rows of validation, else of train: each a question with its pictures, small."""
        part = rows.train if rows.validation is None else rows.validation
        self.asked, found, room = [], list[Sample](), _PAGE_BYTES
        given = settings.validation if rows.validation is not None and isinstance(settings.validation, str) else None
        root = find_root(settings.root, given or str(settings.train))
        for asked, sample in _iterate_samples(part, settings, root, encoder):
            room -= sum(map(len, sample.pictures))
            if len(found) == _SAMPLES or room < 0:
                break
            self.asked.append(asked)
            found.append(sample)
        return found


def _find_layout(rows: RawRows, settings: DataSettings, source: str) -> RawRows:
    """The rows of one set with the settings that hold for them; pictures in them stay files."""
    asked = rows.settings or settings
    rows = replace(
        rows, train=keep_undecoded(rows.train), validation=rows.validation and keep_undecoded(rows.validation)
    )
    found = find_layout(asked, rows.train.column_names, look_at(rows.train), source)
    if rows.validation is not None and isinstance(settings.validation, str):
        find_layout(found, rows.validation.column_names, look_at(rows.validation), settings.validation)
    if asked.layout == "auto":
        log.info(f"data.layout: auto found {describe_layout(found)}")
    return replace(rows, settings=found.model_copy(update={"train": source}))


def _limit(rows: RawRows, settings: DataSettings) -> DataSettings:
    """The settings of a set, with the length that the model takes."""
    own = rows.settings or settings
    return own.model_copy(update={"max_length": settings.max_length})


def _tokenize(
    rows: datasets.Dataset,
    numbers: Sequence[Any],
    settings: DataSettings,
    source: Any,
    encoder: PictureEncoder,
    tick: Tick | None,
) -> PreparedRows:
    return tokenize_pictures(as_written(rows), numbers, settings, encoder, find_root(settings.root, str(source)), tick)


def _describe_pictures(train: PreparedRows, settings: DataSettings) -> str:
    counts = {what: train.rows[f"num_{what}"][:] for what in ("pictures", "videos")}
    told = [
        f"{sum(each):,} {what if what == 'videos' else ''}".strip()
        + f" in {sum(map(bool, each)):,} of {len(each):,} rows"
        for what, each in counts.items()
        if what == "pictures" or any(each)
    ]
    said = ", ".join(told)
    if any(counts["videos"]):
        said += f", {settings.video_frames} frames of each (data.video_frames)"
    if settings.image_pixels is None:
        return said
    return f"{said}, none with a side above {settings.image_pixels} pixels (data.image_pixels)"


def _iterate_samples(
    rows: datasets.Dataset, settings: DataSettings, root: Any, encoder: PictureEncoder
) -> Iterator[tuple[PictureText, Sample]]:
    for row in as_written(rows):
        try:
            read = read_picture_row(row, settings, root)
            encoder.write(read)
            *before, last = read.talk.messages
            while before and last["role"] != "assistant":
                *before, last = before
            count = sum(_count_pictures(message["content"]) for message in before)
            asked = encoder.ask(replace(read, talk=replace(read.talk, messages=before), pictures=read.pictures[:count]))
            thumbnails = tuple(small for seen in asked.pictures for small in _make_small(seen))
        except BadRow:
            continue
        question = " ".join(part for part in _list_words(before[-1]["content"]) if part)
        yield asked, Sample(question, str(last["content"]), _take_fields(row, settings), thumbnails)


def _make_small(seen: Seen) -> list[str]:
    """What a report shows of a picture, or of a video: its beginning, middle and end.

    Raises:
        BadRow: if it cannot be read.
    """
    if isinstance(seen, Picture):
        return [make_thumbnail(seen)]
    film = measure_video(seen, _FRAMES_SHOWN)
    if isinstance(film, BadRow):
        raise film
    return [encode_thumbnail(frame) for frame in open_video(seen, film)]


def _take_fields(row: Row, settings: DataSettings) -> dict[str, str]:
    names = _make_form(settings).fields if settings.layout == "vqa" else ()
    return {name: str(row[name]) for name in names if row.get(name) is not None}


def _list_words(content: Any) -> list[str]:
    return [part.get("text", "") for part in content] if isinstance(content, list) else [str(content)]


def _count_pictures(content: Any) -> int:
    return sum(part["type"] in ("image", "video") for part in content) if isinstance(content, list) else 0


def _make_form(settings: DataSettings) -> PromptForm:
    """How a run is asked: about pictures, in the words of its training."""
    about = {"style": "chat", "pictures": True}
    about |= {"image_pixels": settings.image_pixels, "video_frames": settings.video_frames}
    if settings.layout == "messages":
        return PromptForm(**about, fields=("prompt",))
    fields = tuple(dict.fromkeys(columns_in(settings.prompt or "", "data.prompt")))
    if settings.layout == "caption" and fields == (settings.prompt,):
        fields = ()
    return PromptForm(**about, prompt=settings.prompt, fields=fields)


def _survey(
    train: PreparedRows, validation: PreparedRows | None, settings: DataSettings, encoder: PictureEncoder
) -> dict[str, Any]:
    """As of text, with the tokens of a picture told by their number."""
    made = survey_rows(train, validation, settings, encoder.tokenizer)
    for row in made["shown"]:
        row["pieces"] = [(encoder.shorten(text), learned) for text, learned in row["pieces"]]
    return made


def _mark_first(row: Row, encoder: PictureEncoder) -> str:
    """The first row for a person."""
    pieces = split_learned(row["input_ids"], row["labels"], encoder.tokenizer)
    told = [(shorten(encoder.shorten(text)), learned) for text, learned in pieces]
    return "".join(f"{LEFT}{text}{RIGHT}" if learned else text for text, learned in told)
