"""Conversations with pictures and videos as a processor takes them, and the tokens that it makes of each picture."""

import copy
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DoraError, UsageError
from .answers import invert_spans, merge_spans
from .chat import render_conversation
from .encoding import chat_text
from .labels import label_rows
from .picture_rows import PictureRow, Seen
from .pictures import Picture, Size, make_blank, measure_pictures, open_picture, shrink
from .prepare import IGNORED, BadRow, RenderedRow
from .turns import find_turn_end
from .videos import Film, Video, measure_video, open_video


@dataclass(frozen=True)
class PictureText:
    """What a processor is given for a row."""

    text: str
    """With the processor's own token in the place of each picture and video."""
    pictures: tuple[Seen, ...] = ()
    suffix: str | None = None
    """The answer, for processors that take it by itself."""

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether there are pictures, and videos: processors are given texts of one kind at a time."""
        videos = sum(isinstance(each, Video) for each in self.pictures)
        return len(self.pictures) > videos, videos > 0


@dataclass
class PictureEncoder:
    """A processor, and how it writes conversations with pictures.

    Raises:
        UsageError: if it has no chat template, and no other form either.
    """

    processor: Any
    longest: int | None = None
    """Pictures and frames are made smaller first where a side has more pixels."""
    frames: int = 8
    """So many frames of a video are seen."""
    _tokens: dict[Size | Film, str] = field(default_factory=dict)
    """What the processor writes in the place of a picture of a size, or of a video."""
    _with_videos: Any = None
    """The tokenizer with a template that knows videos, once one was asked for."""

    def __post_init__(self) -> None:
        self.tokenizer = self.processor.tokenizer
        self.place: str = self.processor.image_token
        self.has_suffix = "suffix" in inspect.signature(type(self.processor).__call__).parameters
        if not self.has_suffix and not self.tokenizer.chat_template:
            raise UsageError(
                f"model: its {type(self.processor).__name__} has no chat template, so doralib cannot write a "
                "conversation for it; take the model that is tuned for chat, or put a chat_template.jinja beside it"
            )
        end = "" if self.has_suffix or find_turn_end(self.tokenizer).tokens else self.tokenizer.eos_token or ""
        self._end: str = end
        """What a template that never ends an answer by a token lacks."""
        self.video_place: str | None = self._find_video_place()
        self._special = {each for each in self.processor.image_token_ids if each is not None}
        if self.video_place is not None:
            self._special |= {each for each in self.processor.video_token_ids if each is not None}

    def write(self, row: PictureRow, *, learn_all: bool = False) -> tuple[PictureText, RenderedRow]:
        """A conversation as the processor takes it, and its text with what of it is learned.

        Raises:
            UsageError: if there are videos, and the processor takes none.
            BadRow: if the processor cannot be given it.
        """
        self._check_kinds(row)
        if self.has_suffix:
            return self._write_suffix(row)
        made = render_conversation(row.talk, self._choose_tokenizer(row), learn_all=learn_all)
        self._check_places(made.text, row)
        text, learned = made.text, list(made.learned)
        if self._end and not text.rstrip().endswith(self._end):
            if learned and learned[-1][1] == len(text):
                learned[-1] = (learned[-1][0], len(text) + len(self._end))
            text += self._end
        made = replace(made, text=text, learned=tuple(learned), begins_bare=self._begins_bare(text))
        return PictureText(text, row.pictures), made

    def ask(self, row: PictureRow) -> PictureText:
        """A conversation up to where the next answer begins.

        Raises:
            UsageError: as `write`.
            BadRow: as `write`.
        """
        self._check_kinds(row)
        if self.has_suffix:
            return PictureText(self._join_prompt(row.talk.messages, row), row.pictures)
        text = chat_text(self._choose_tokenizer(row), row.talk.messages)
        self._check_places(text, row)
        return PictureText(text, row.pictures)

    def encode(
        self, given: PictureText, rendered: RenderedRow, sizes: Sequence[Size | Film]
    ) -> tuple[list[int], list[int], str]:
        """Tokens and labels with each picture as so many tokens as it takes, and a learned text without any token."""
        text, spans = self._expand(given.text, sizes)
        if given.suffix is not None:
            bos, last = self.tokenizer.bos_token, spans[-1][2] if spans else 0
            asked = self._tokenize(f"{text[:last]}{bos}{text[last:]}\n")
            answer = self._tokenize(given.suffix + self.tokenizer.eos_token)
            return [*asked, *answer], [*[IGNORED] * len(asked), *answer], ""
        learned = [(_shift(start, spans), _shift(end, spans)) for start, end in rendered.learned]
        pictures = [(start, end) for _, start, end in spans]
        outside = merge_spans([*invert_spans(learned, len(text)), *pictures])
        row = replace(rendered, text=text, learned=invert_spans(outside, len(text)), closed=True)
        (made,) = label_rows(self.tokenizer, [row])
        labels = [
            IGNORED if token in self._special else label
            for token, label in zip(made.input_ids, made.labels, strict=True)
        ]
        return made.input_ids, labels, made.lost

    def call(self, given: Sequence[PictureText], *, left: bool = False) -> dict[str, Tensor]:
        """The arguments of the model for some texts, all of one `kind`; padded on the right or left.

        Raises:
            DoraError: if a picture can no longer be read.
        """
        pictures = [[self._open(each) for each in text.pictures if isinstance(each, Picture)] for text in given]
        videos = [self._open_video(each) for text in given for each in text.pictures if isinstance(each, Video)]
        options: dict[str, Any] = {"padding": True, "padding_side": "left" if left else "right"}
        if not self.has_suffix:
            options["add_special_tokens"] = self._begins_bare(given[0].text)
        elif given[0].suffix is not None:
            options["suffix"] = [each.suffix for each in given]
        if videos:
            options |= self._give_videos(videos)
        images = {"images": pictures} if any(pictures) else {}
        made = self.processor(text=[each.text for each in given], return_tensors="pt", **images, **options)
        made.pop("labels", None)
        return {name: torch.as_tensor(value) for name, value in made.items()}

    def count(self, given: PictureText) -> int:
        """The tokens of a text, with those of its pictures.

        Raises:
            BadRow: if a picture cannot be read.
        """
        sizes = []
        found = measure_seen(given.pictures, self.frames)
        for size in map(found.__getitem__, given.pictures):
            if isinstance(size, BadRow):
                raise size
            sizes.append(size)
        text = self._expand(given.text, sizes)[0]
        start = not self.has_suffix and self._begins_bare(given.text)
        return len(self.tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"])

    def holds_picture(self, ids: Sequence[int]) -> bool:
        """Whether some of these tokens stand for a part of a picture."""
        return not self._special.isdisjoint(ids)

    def shorten(self, text: str) -> str:
        """A text in which the tokens of a picture stand as one, with their number."""
        for token in map(str, self.tokenizer.convert_ids_to_tokens(sorted(self._special))):
            runs = sorted(set(re.findall(f"((?:{re.escape(token)}){{2,}})", text)), key=len, reverse=True)
            for run in runs:
                text = text.replace(run, f"{token} x {len(run) // len(token)}")
        return text

    def shrink(self, size: Size) -> Size:
        """The size that a picture is read at."""
        return shrink(size, self.longest)

    def _open(self, picture: Picture) -> Any:
        try:
            return open_picture(picture, self.longest)
        except BadRow as bad:
            raise DoraError(f"a picture can no longer be read, since the run began: {bad}") from None

    def _open_video(self, video: Video) -> tuple[list[Any], dict[str, Any]]:
        """The frames of a video, and what the processor is told of them."""
        try:
            film = measure_video(video, self.frames)
            if isinstance(film, BadRow):
                raise film
            frames = open_video(video, film, self.longest)
        except BadRow as bad:
            raise DoraError(f"a video can no longer be read, since the run began: {bad}") from None
        return frames, film.describe(frames[0].size)

    def _give_videos(self, videos: Sequence[tuple[list[Any], dict[str, Any]]]) -> dict[str, Any]:
        """The arguments of the processor for frames that are chosen already."""
        frames, told = [list(each) for each in zip(*videos, strict=True)]
        return {"videos": frames, "video_metadata": told, "do_sample_frames": False}

    def _find_video_place(self) -> str | None:
        """What stands for a video in a text; None: the processor takes none."""
        if getattr(self.processor, "video_processor", None) is None:
            return None
        place: str | None = getattr(self.processor, "video_token", None)
        return place

    def _choose_tokenizer(self, row: PictureRow) -> Any:
        """The tokenizer, for a row with videos with the template that transformers itself takes for those."""
        if not any(isinstance(each, Video) for each in row.pictures):
            return self.tokenizer
        if self._with_videos is None:
            self._with_videos = self.tokenizer
            own = getattr(sys.modules[type(self.processor).__module__], "DEFAULT_CHAT_TEMPLATE", None)
            asked: list[dict[str, Any]] = [
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}
            ]
            if own and str(self.video_place) not in chat_text(self.tokenizer, asked):
                self._with_videos = copy.copy(self.tokenizer)
                self._with_videos.chat_template = own
        return self._with_videos

    def _check_kinds(self, row: PictureRow) -> None:
        count = sum(isinstance(each, Video) for each in row.pictures)
        name = type(self.processor).__name__
        if count and self.video_place is None:
            raise UsageError(
                f"{name} takes pictures and no videos; models that take both are Qwen-VL, SmolVLM, InternVL, "
                "LLaVA-NeXT-Video and LLaVA-OneVision"
            )
        if 0 < count < len(row.pictures):
            looks = (self.processor.image_processor, self.processor.video_processor)
            shared = set.intersection(*(set(each.model_input_names) for each in looks))
            if shared:
                raise BadRow("with pictures and videos", f"{name} takes either in a row, not both")

    def _begins_bare(self, text: str) -> bool:
        """Whether the tokenizer puts its start token before a text: as processors do, where none is spelled."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos)

    def _check_places(self, text: str, row: PictureRow) -> None:
        videos = sum(isinstance(each, Video) for each in row.pictures)
        for what, place, count in (
            ("pictures", self.place, len(row.pictures) - videos),
            ("videos", self.video_place, videos),
        ):
            found = text.count(place) if place else 0
            if found != count:
                raise BadRow("malformed", f"the chat template writes {found} places ({place}) for {count} {what}")

    def _write_suffix(self, row: PictureRow) -> tuple[PictureText, RenderedRow]:
        *asked, answer = row.talk.messages
        if answer["role"] != "assistant" or any(message["role"] == "assistant" for message in asked):
            raise BadRow("malformed", f"{type(self.processor).__name__} takes one question and one answer")
        prompt, said = self._join_prompt(asked, row), str(answer["content"])
        text = f"{prompt}\n{said}"
        return PictureText(prompt, row.pictures, said), RenderedRow(text, ((len(text) - len(said), len(text)),))

    def _join_prompt(self, messages: Sequence[Mapping[str, Any]], row: PictureRow) -> str:
        if not row.pictures:
            raise BadRow("without its picture", f"{type(self.processor).__name__} takes no text without a picture")
        contents = [message["content"] for message in messages]
        parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
        texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
        return self.place * len(row.pictures) + "\n".join(text for text in texts if text)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _expand(self, text: str, sizes: Sequence[Size | Film]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text with what stands for each picture; of each the old end, the new start and the new end."""
        places = "|".join(re.escape(place) for place in (self.place, self.video_place) if place)
        first, *others = re.split(f"({places})", text)
        made, spans, old = first, [], len(first)
        for size, place, piece in zip(sizes, others[::2], others[1::2], strict=True):
            tokens = self._write_video(size) if isinstance(size, Film) else self._write_picture(self.shrink(size))
            old += len(place)
            spans.append((old, len(made), len(made) + len(tokens)))
            made += tokens + piece
            old += len(piece)
        return made, spans

    def _write_picture(self, size: Size) -> str:
        """What the processor writes for a picture of this size: it tells of a blank one."""
        if size not in self._tokens:
            self._tokens[size] = self._ask_processor(self.place, images=[[make_blank(size)]])
        return self._tokens[size]

    def _write_video(self, film: Film) -> str:
        """What the processor writes for a video that looks so, with the times of its frames."""
        if film not in self._tokens:
            size = self.shrink(film.size)
            blank = ([make_blank(size)] * len(film.places), film.describe(size))
            given = self._give_videos([blank])
            self._tokens[film] = self._ask_processor(str(self.video_place), return_tensors="pt", **given)
        return self._tokens[film]

    def _ask_processor(self, place: str, **given: Any) -> str:
        made = self.processor(text=[place], return_text_replacement_offsets=True, **given)
        return str(made["text_replacement_offsets"][0][0]["replacement"])


def make_encoder(model: Any, processor: Any) -> PictureEncoder:
    """The encoder with which a loaded model's rows were written, by what the model knows of its training."""
    pixels, frames = getattr(model, "doralib_image_pixels", None), getattr(model, "doralib_video_frames", None)
    return PictureEncoder(processor, pixels, frames or PictureEncoder.frames)


def _shift(place: int, spans: Sequence[tuple[int, int, int]]) -> int:
    """Where a place in a text is once its pictures are written out."""
    before = [(old, new) for old, _, new in spans if old <= place]
    return place if not before else place + before[-1][1] - before[-1][0]


def measure_seen(seen: Iterable[Seen], frames: int) -> dict[Seen, Size | Film | BadRow]:
    """The size of each picture and the look of each video, of which so many frames are seen, or why it cannot be used.

    Each is opened once, in threads, and none is kept.
    """
    each = list(dict.fromkeys(seen))
    videos = [one for one in each if isinstance(one, Video)]
    found: dict[Seen, Size | Film | BadRow] = {}
    found.update(measure_pictures(one for one in each if isinstance(one, Picture)).items())
    with ThreadPoolExecutor() as pool:
        found |= dict(zip(videos, pool.map(lambda video: measure_video(video, frames), videos), strict=True))
    return found
