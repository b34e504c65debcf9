"""From rows to tokens and labels; every row left out is counted."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import DoraError, UsageError
from ..recipe import DataSettings
from .prepare import IGNORED, BadRow, PreparedRows, RowReport, Sample
from .prompts import STYLES, Piece
from .rows import RawRows

_ROWS_AT_ONCE = 1000
_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features({"input_ids": _TOKENS, "labels": _TOKENS, "length": datasets.Value("int32")})


def tokenize_rows(
    rows: datasets.Dataset, numbers: Sequence[int], settings: DataSettings, tokenizer: Tokenizer
) -> PreparedRows:
    """The usable rows as tokens and labels; the target's end is marked by the tokenizer's end token.

    Messages name a row by its number, which is its place in its file.

    Raises:
        UsageError: if no row is usable, or the tokenizer cannot do the style.
        DoraError: if the tokenizer has no token for a target, or a row is bad and bad rows are errors.
    """
    report = RowReport(len(rows))
    parts: list[datasets.Dataset] = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
        parts += _tokenize_chunk(chunk, numbers[start:], settings, tokenizer, report)
    told = "\n".join(report.lines())
    if report.dropped and settings.bad_rows == "error":
        raise DoraError(f"data.bad_rows is 'error', and there are bad rows:\n{told}")
    if not report.kept:
        raise UsageError(f"no row can be used, the data set is empty:\n{told}")
    return PreparedRows(datasets.concatenate_datasets(parts), report)


def find_samples(raw: RawRows, settings: DataSettings, tokenizer: Tokenizer, count: int) -> list[Sample]:
    """The first usable rows of validation (else of train) within max_length, as prompt and expected answer."""
    found: list[Sample] = []
    for row in raw.validation if raw.validation is not None else raw.train:
        if len(found) == count:
            break
        try:
            pieces = STYLES[settings.style].pieces(row, settings, tokenizer)
        except BadRow:
            continue
        last = max(i for i, piece in enumerate(pieces) if piece.learned)
        prompt = "".join(piece.text for piece in pieces[:last])
        whole = "".join(piece.text for piece in pieces)
        if prompt and len(tokenizer(whole)["input_ids"]) <= settings.max_length:
            found.append(Sample(prompt, pieces[last].text))
    return found


def _tokenize_chunk(
    rows: datasets.Dataset, numbers: Sequence[int], settings: DataSettings, tokenizer: Tokenizer, report: RowReport
) -> Iterator[datasets.Dataset]:
    style, whole = STYLES[settings.style], []
    for number, row in zip(numbers, rows, strict=False):
        try:
            whole.append((number, style.pieces(row, settings, tokenizer)))
        except BadRow as bad:
            report.drop(number, bad)
        except UsageError as error:
            raise UsageError(f"row {number}: {error}") from None
    texts = [piece.text for _, pieces in whole for piece in pieces]
    tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
    start = [] if style.closed else _start_tokens(tokenizer)
    end = [] if style.closed or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for number, pieces in whole:
        coded = [(next(tokens), piece) for piece in pieces]
        try:
            input_ids, labels = _fit(*_join(coded, start, end, settings, number), number, settings, report)
        except BadRow as bad:
            report.drop(number, bad)
            continue
        report.keep(labels)
        for column, value in zip(columns.values(), (input_ids, labels, len(input_ids)), strict=True):
            column.append(value)
    yield datasets.Dataset.from_dict(columns, features=_FEATURES)


def _join(
    coded: Sequence[tuple[list[int], Piece]], start: list[int], end: list[int], settings: DataSettings, number: int
) -> tuple[list[int], list[int]]:
    """Input and labels of one row, both whole."""
    input_ids, labels = list(start), [IGNORED] * len(start)
    for tokens, piece in coded:
        if piece.learned and not tokens:
            raise DoraError(
                f"row {number}: the tokenizer maps the target {piece.text!r} to no token at all, so nothing could be "
                "learned from it; write the labels in characters that the model knows"
            )
        input_ids += tokens
        labels += tokens if piece.learned or settings.loss_on == "all" else [IGNORED] * len(tokens)
    return input_ids + end, labels + end


def _fit(
    input_ids: list[int], labels: list[int], number: int, settings: DataSettings, report: RowReport
) -> tuple[list[int], list[int]]:
    """The row within max_length."""
    length, limit = len(input_ids), settings.max_length
    if length > limit and settings.too_long == "skip":
        raise BadRow(f"longer than {limit} tokens", f"{length} tokens, data.max_length is {limit}")
    if all(label == IGNORED for label in labels[1:limit]):
        raise BadRow(f"no target within {limit} tokens", f"{length} tokens, the prompt alone fills data.max_length")
    if length > limit:
        report.cut(number, length)
    return input_ids[:limit], labels[:limit]


def _start_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return list(whole[: next(places, 0)])
