"""Rows with labels, for a whole text or for each of its words, as a classifier takes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError, list_some
from ..recipe import DataSettings
from .prepare import IGNORED, BadRow, PreparedRows, Row, RowNumber, RowReport, check_length
from .rows import RawRows
from .templates import columns_in, fill_template, value_text

_MOST_LABELS = 1000


def find_labels(rows: RawRows, settings: DataSettings, *, by_word: bool) -> tuple[str, ...]:
    """The labels of the data: in the order that a data set gives them, numbers by size, else by the alphabet.

    Raises:
        UsageError: if there are fewer than two, or as many as rows.
    """
    parts = [rows.train] if rows.validation is None else [rows.train, rows.validation]
    if (named := _find_named(rows.train, settings.target or "")) is not None:
        return named
    found: set[str] = set()
    for part in parts:
        for row in part:
            try:
                said = read_labels(row, settings, by_word=by_word)
            except BadRow:
                continue
            found.update(said)
    if len(found) < 2:
        raise UsageError(f"data.target: a classifier needs two labels at least, found {', '.join(found) or 'none'}")
    if len(found) > _MOST_LABELS:
        shown = list_some(sorted(found), 5, ", ")
        raise UsageError(
            f"data.target: {len(found)} different labels ({shown}) are no classes; is it the right column?"
        )
    return tuple(sorted(found, key=_sort_key))


def _find_named(rows: datasets.Dataset, target: str) -> tuple[str, ...] | None:
    """The names of a column of classes."""
    feature = rows.features.get(target)
    inner = getattr(feature, "feature", feature)
    return tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _sort_key(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.lstrip("-").isdecimal() else (1, 0, label)


def read_labels(row: Row, settings: DataSettings, *, by_word: bool) -> list[str]:
    """The labels of a row as text: one, or one for each word.

    Raises:
        BadRow: if there are none.
    """
    target = settings.target or ""
    if by_word:
        said = row[target]
        if not isinstance(said, list) or not said or any(each is None for each in said):
            raise BadRow("malformed", f"column {target!r} holds no list of labels")
        return [_as_text(each) for each in said]
    value = row[target] if target in row else _fill(target, row)
    if value is None or not _as_text(value):
        raise BadRow("empty", f"no label in {target!r}")
    return [_as_text(value)]


def _as_text(value: Any) -> str:
    """A label as text: a column of numbers with a gap in it holds 1.0 where the file says 1."""
    return value_text(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _fill(template: str, row: Row) -> str:
    """The template with the row's values as text."""
    values = {column: value_text(row[column]) for column in columns_in(template)}
    if not any(value.strip() for value in values.values()):
        raise BadRow("empty", f"nothing in {', '.join(values)}")
    return fill_template(template, values)


def read_text(row: Row, settings: DataSettings) -> str:
    """The text of a row.

    Raises:
        BadRow: if there is none.
    """
    return _fill(settings.prompt or "", row)


def read_words(row: Row, settings: DataSettings) -> list[str]:
    """The words of a row.

    Raises:
        BadRow: if they are no list.
    """
    words = row[settings.prompt or ""]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise BadRow("malformed", f"column {settings.prompt!r} holds no list of words")
    return words


def label_texts(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    *,
    by_word: bool,
) -> PreparedRows:
    """The usable rows as tokens and the numbers of their labels.

    A word's label is that of its first token.

    Raises:
        UsageError: if no row is usable.
        DoraError: if a row is bad and bad rows are errors.
    """
    report, ids = RowReport(len(rows)), number_labels(rows, settings, labels)
    encode: Callable[..., tuple[list[int], Any]] = _encode_words if by_word else _encode_text
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    for number, row in zip(numbers, rows, strict=False):
        try:
            tokens, said = encode(row, settings, tokenizer, ids)
            length = len(tokens)
            if settings.too_long == "skip":
                check_length(length, settings.max_length)
        except BadRow as bad:
            report.drop(number, bad)
            continue
        if length > settings.max_length:
            report.cut(number, length)
            tokens, said = tokens[: settings.max_length], said[: settings.max_length] if by_word else said
        report.kept += 1
        report.tokens += len(tokens)
        report.label_tokens += sum(each != IGNORED for each in said) if by_word else 1
        for column, value in zip(columns.values(), (tokens, said, len(tokens)), strict=True):
            column.append(value)
    report.check(settings.bad_rows)
    return PreparedRows(datasets.Dataset.from_dict(columns), report)


def number_labels(rows: datasets.Dataset, settings: DataSettings, labels: Sequence[str]) -> dict[str, int]:
    """The number of each label, by how the rows say it: a column of classes says numbers."""
    if _find_named(rows, settings.target or "") is not None:
        return {str(i): i for i in range(len(labels))}
    return {label: i for i, label in enumerate(labels)}


def _find_number(label: str, ids: Mapping[str, int]) -> int:
    if label not in ids:
        raise BadRow("unknown label", f"{label!r} is none of the labels {list_some(list(ids), 8, ', ')}")
    return ids[label]


def _encode_text(
    row: Row, settings: DataSettings, tokenizer: Tokenizer, ids: Mapping[str, int]
) -> tuple[list[int], int]:
    (label,) = read_labels(row, settings, by_word=False)
    tokens = tokenizer(read_text(row, settings), verbose=False)["input_ids"]
    if not tokens:
        raise BadRow("empty", "the tokenizer makes no token of its text")
    return tokens, _find_number(label, ids)


def _encode_words(
    row: Row, settings: DataSettings, tokenizer: Tokenizer, ids: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    words, said = read_words(row, settings), read_labels(row, settings, by_word=True)
    if len(words) != len(said):
        raise BadRow("malformed", f"{len(words)} words and {len(said)} labels")
    tokens, firsts = encode_words(tokenizer, words)
    labels = [IGNORED] * len(tokens)
    for first, label in zip(firsts, said, strict=True):
        if first is not None:
            labels[first] = _find_number(label, ids)
    return tokens, labels


def encode_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
    """The tokens of a text given by its words, and the place of each word's first one; None: it has none."""
    pieces = [
        tokenizer(f" {word}" if i else word, add_special_tokens=False, verbose=False)["input_ids"]
        for i, word in enumerate(words)
    ]
    inner = [token for piece in pieces for token in piece]
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    cut = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:cut], whole[cut + len(plain) :]
    firsts: list[int | None] = []
    place = len(before)
    for piece in pieces:
        firsts.append(place if piece else None)
        place += len(piece)
    return [*before, *inner, *after], firsts
