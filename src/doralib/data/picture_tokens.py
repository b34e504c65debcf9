"""Rows with pictures as a processor of transformers takes them: tokens, labels, and batches that read the pictures."""

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from ..errors import DoraError, UsageError
from ..progress import Tick
from ..recipe import DataSettings
from .answers import invert_spans, merge_spans
from .chat import render_conversation
from .encoding import chat_text
from .labels import label_rows
from .picture_rows import PictureRow, read_picture_row
from .pictures import Picture, Size, make_blank, measure_pictures, open_picture, shrink
from .prepare import IGNORED, BadRow, PreparedRows, RenderedRow, Row, RowNumber, RowReport, check_length
from .turns import find_turn_end

_ROWS_AT_ONCE = 1000
_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "suffix": datasets.Value("string"),
        "pictures": datasets.List({"path": datasets.Value("string"), "data": datasets.Value("binary")}),
        "num_pictures": datasets.Value("int32"),
        "pictures_hash": datasets.Value("int64"),
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "length": datasets.Value("int32"),
    }
)


@dataclass(frozen=True)
class PictureText:
    """What a processor is given for a row."""

    text: str
    """With the processor's own token in the place of each picture."""
    pictures: tuple[Picture, ...] = ()
    suffix: str | None = None
    """The answer, for processors that take it by itself."""

    @classmethod
    def of_row(cls, row: Row) -> "PictureText":
        """What a prepared row is made of."""
        pictures = tuple(Picture(each["path"] or "", each["data"]) for each in row["pictures"])
        return cls(row["text"], pictures, row["suffix"])


@dataclass
class PictureEncoder:
    """A processor, and how it writes conversations with pictures.

    Raises:
        UsageError: if it has no chat template, and no other form either.
    """

    processor: Any
    longest: int | None = None
    """Pictures are made smaller first where a side has more pixels."""
    _tokens: dict[Size, str] = field(default_factory=dict)
    """What the processor writes in the place of a picture of a size."""

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
        self._special = {each for each in self.processor.image_token_ids if each is not None}

    def write(self, row: PictureRow, *, learn_all: bool = False) -> tuple[PictureText, RenderedRow]:
        """A conversation as the processor takes it, and its text with what of it is learned.

        Raises:
            BadRow: if the processor cannot be given it.
        """
        if self.has_suffix:
            return self._write_suffix(row)
        made = render_conversation(row.talk, self.tokenizer, learn_all=learn_all)
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
            BadRow: as `write`.
        """
        if self.has_suffix:
            return PictureText(self._join_prompt(row.talk.messages, row), row.pictures)
        text = chat_text(self.tokenizer, row.talk.messages)
        self._check_places(text, row)
        return PictureText(text, row.pictures)

    def encode(
        self, given: PictureText, rendered: RenderedRow, sizes: Sequence[Size]
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
        """The arguments of the model for some texts, all with pictures or all without; padded on the right or left.

        Raises:
            DoraError: if a picture can no longer be read.
        """
        pictures = [[self._open(picture) for picture in each.pictures] for each in given]
        options: dict[str, Any] = {"padding": True, "padding_side": "left" if left else "right"}
        if not self.has_suffix:
            options["add_special_tokens"] = self._begins_bare(given[0].text)
        elif given[0].suffix is not None:
            options["suffix"] = [each.suffix for each in given]
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
        for size in map(measure_pictures(given.pictures).__getitem__, given.pictures):
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

    def _begins_bare(self, text: str) -> bool:
        """Whether the tokenizer puts its start token before a text: as processors do, where none is spelled."""
        bos = self.tokenizer.bos_token
        return bos is not None and not text.startswith(bos)

    def _check_places(self, text: str, row: PictureRow) -> None:
        if (found := text.count(self.place)) != len(row.pictures):
            raise BadRow(
                "malformed",
                f"the chat template writes {found} places ({self.place}) for {len(row.pictures)} pictures",
            )

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

    def _expand(self, text: str, sizes: Sequence[Size]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text with what stands for each picture; of each the old end, the new start and the new end."""
        first, *others = text.split(self.place)
        made, spans, old = first, [], len(first)
        for size, piece in zip(sizes, others, strict=True):
            tokens = self._write_picture(self.shrink(size))
            old += len(self.place)
            spans.append((old, len(made), len(made) + len(tokens)))
            made += tokens + piece
            old += len(piece)
        return made, spans

    def _write_picture(self, size: Size) -> str:
        """What the processor writes for a picture of this size: it tells of a blank one."""
        if size not in self._tokens:
            made = self.processor(text=[self.place], images=[[make_blank(size)]], return_text_replacement_offsets=True)
            self._tokens[size] = str(made["text_replacement_offsets"][0][0]["replacement"])
        return self._tokens[size]


def _shift(place: int, spans: Sequence[tuple[int, int, int]]) -> int:
    """Where a place in a text is once its pictures are written out."""
    before = [(old, new) for old, _, new in spans if old <= place]
    return place if not before else place + before[-1][1] - before[-1][0]


def tokenize_pictures(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    encoder: PictureEncoder,
    root: Path,
    tick: Tick | None = None,
) -> PreparedRows:
    """The usable rows as tokens and labels, with the names of their pictures, each of which was opened once.

    Raises:
        UsageError: if no row is usable.
        DoraError: if a row is bad and bad rows are errors.
    """
    report, kept = RowReport(len(rows)), list[RowNumber]()
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        read: list[tuple[RowNumber, PictureRow]] = []
        for number, row in zip(numbers[start:], chunk, strict=False):
            try:
                read.append((number, read_picture_row(row, settings, root)))
            except BadRow as bad:
                report.drop(number, bad)
        sizes = measure_pictures(picture for _, row in read for picture in row.pictures)
        for number, row in read:
            try:
                made = _encode_row(row, sizes, settings, encoder, number, report)
            except BadRow as bad:
                report.drop(number, bad)
                continue
            kept.append(number)
            for name, value in made.items():
                columns[name].append(value)
        parts.append(datasets.Dataset.from_dict(columns, features=_FEATURES))
        if tick is not None:
            tick("reading pictures", len(chunk), len(rows))
    report.check(settings.bad_rows)
    return PreparedRows(datasets.concatenate_datasets(parts), report, kept)


def _encode_row(
    row: PictureRow,
    sizes: Mapping[Picture, Size | BadRow],
    settings: DataSettings,
    encoder: PictureEncoder,
    number: RowNumber,
    report: RowReport,
) -> dict[str, Any]:
    found: list[Size] = []
    for picture in row.pictures:
        size = sizes[picture]
        if isinstance(size, BadRow):
            raise size
        found.append(size)
    given, rendered = encoder.write(row, learn_all=settings.loss_on == "all")
    ids, labels, lost = encoder.encode(given, rendered, found)
    if lost:
        raise BadRow("malformed", f"the tokenizer has no token for {lost!r}")
    length = len(ids)
    if settings.too_long != "truncate":
        check_length(length, settings.max_length)
    elif length > settings.max_length:
        if encoder.holds_picture(ids[settings.max_length :]):
            raise BadRow(f"whose pictures do not end within {settings.max_length} tokens", f"{length} tokens")
        ids, labels = ids[: settings.max_length], labels[: settings.max_length]
        report.cut(number, length)
    if all(label == IGNORED for label in labels[1:]):
        raise BadRow(f"no answer within {settings.max_length} tokens", f"{length} tokens")
    report.keep(labels)
    for note in rendered.notes:
        report.note(number, note)
    pictures = [{"path": each.path, "data": each.data} for each in row.pictures]
    values = (given.text, given.suffix, pictures, len(pictures), _hash(row.pictures), ids, labels, len(ids))
    return dict(zip(_FEATURES, values, strict=True))


def _hash(pictures: Sequence[Picture]) -> int:
    """Tells rows with other pictures apart."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.data or picture.path.encode())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


@dataclass(frozen=True)
class PictureCollator:
    """Rows of one batch as the arguments of the model: pictures are read now.

    Rows with and without pictures may stand in one batch; each kind is a call of the processor.
    """

    encoder: PictureEncoder
    pad_id: int
    dtype: torch.dtype = torch.float32
    """Of the model, and so of its pictures."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Keys input_ids, attention_mask, labels, (rows, longest), and what else this model takes.

        Raises:
            DoraError: if the processor makes other tokens of a row than were foreseen.
        """
        kinds = [[i for i, row in enumerate(rows) if bool(row["pictures"]) == seen] for seen in (True, False)]
        parts = [
            (places, self.encoder.call([PictureText.of_row(rows[i]) for i in places])) for places in kinds if places
        ]
        batch = parts[0][1] if len(parts) == 1 else self._join(parts)
        longest = max(len(row["input_ids"]) for row in rows)
        width = batch["input_ids"].shape[1]
        batch = {
            name: value[:, :longest] if value.shape[:2] == (len(rows), width) and value.dim() == 2 else value
            for name, value in batch.items()
        }
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            if batch["input_ids"][i, :count].tolist() != row["input_ids"]:
                raise DoraError(
                    f"{type(self.encoder.processor).__name__} makes other tokens of a row than its own template says; "
                    f"the row begins {row['text'][:200]!r}"
                )
            batch["attention_mask"][i, count:] = 0
        fill = lambda labels: [*labels, *[IGNORED] * (longest - len(labels))]
        placed = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        return {**placed, "labels": torch.tensor([fill(row["labels"]) for row in rows])}

    def _join(self, parts: Sequence[tuple[list[int], dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Rows with and without pictures in their order; what is no number of a token stays as it is."""
        made: dict[str, Tensor] = {}
        count, width = sum(len(places) for places, _ in parts), max(part["input_ids"].shape[1] for _, part in parts)
        for places, part in parts:
            shape = part["input_ids"].shape
            for name, value in part.items():
                if value.shape != shape:
                    made[name] = value
                    continue
                fill = self.pad_id if name == "input_ids" else 0
                whole = made.setdefault(name, torch.full((count, width), fill, dtype=value.dtype))
                whole[torch.tensor(places), : shape[1]] = value
        return made
