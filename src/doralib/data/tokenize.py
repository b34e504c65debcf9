"""From rows to tokens and labels; every row left out is counted."""

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import DoraError, UsageError
from ..progress import Tick
from ..recipe import DataSettings
from .detect import find_style, look_at
from .labels import label_rows
from .prepare import IGNORED, BadRow, PreparedRows, RenderedRow, RowNumber, RowReport, Sample, check_length
from .prompt_form import make_form
from .prompts import render_row
from .rows import RawRows, as_written
from .token_cache import find_kept_tokens, hash_job, keep_tokens

log = logging.getLogger(__name__)

_WORTH_KEEPING = 5000
"""Rows from which on tokens are kept on disk: fewer are tokenized in a second."""
_ROWS_AT_ONCE = 1000
_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features({"input_ids": _TOKENS, "labels": _TOKENS, "length": datasets.Value("int32")})


def tokenize_rows(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    tokenizer: Tokenizer,
    tick: Tick | None = None,
) -> PreparedRows:
    """The usable rows as tokens of their whole texts, and labels; see `label_rows`.

    Messages name a row by its number, which is its place in its file. The tokens of many rows are kept on disk, and
    taken from there when rows, settings and tokenizer are the same.

    Raises:
        UsageError: if no row is usable, or the tokenizer cannot do the style.
        DoraError: if the tokenizer has no token for a target, or a row is bad and bad rows are errors.
    """
    rows = as_written(rows)
    settings = find_style(settings, rows.column_names, look_at(rows), "the data")
    key = hash_job(rows, numbers, settings, tokenizer) if len(rows) >= _WORTH_KEEPING else ""
    if not key:
        made = _tokenize(rows, numbers, settings, tokenizer, tick)
    elif (found := find_kept_tokens(key)) is not None:
        made = found
    else:
        log.info(f"tokenizing {len(rows):,} rows, once; the next run takes them from the disk")
        made = _tokenize(rows, numbers, settings, tokenizer, tick)
        keep_tokens(key, made)
    made.report.check(settings.bad_rows)
    return made


def join_prepared(parts: Sequence[PreparedRows]) -> PreparedRows:
    """Several sets of rows as one."""
    if len(parts) == 1:
        return parts[0]
    report = RowReport(0)
    for part in parts:
        report.add(part.report)
    rows = datasets.concatenate_datasets([part.rows for part in parts])
    return PreparedRows(rows, report, [number for part in parts for number in part.numbers])


def find_samples(raw: RawRows, settings: DataSettings, tokenizer: Tokenizer, count: int) -> list[Sample]:
    """The first usable rows of validation (else of train) within max_length, as prompt and expected answer."""
    found: list[Sample] = []
    rows = as_written(raw.validation if raw.validation is not None else raw.train)
    settings = find_style(settings, rows.column_names, look_at(rows), "the data")
    form = make_form(settings)
    for row in rows:
        if len(found) == count:
            break
        try:
            whole = render_row(row, settings.model_copy(update={"loss_on": "completion"}), tokenizer)
        except BadRow:
            continue
        start, end = whole.learned[-1] if whole.learned else (0, 0)
        if start and len(tokenizer(whole.text, verbose=False)["input_ids"]) <= settings.max_length:
            found.append(Sample(whole.text[:start], whole.text[start:end], form.take(row) if form else {}))
    return found


def _tokenize(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    tokenizer: Tokenizer,
    tick: Tick | None,
) -> PreparedRows:
    report, kept, count = RowReport(len(rows)), list[RowNumber](), len(rows)
    parts: list[datasets.Dataset] = []
    for start in range(0, count, _ROWS_AT_ONCE):
        chunk = rows.select(range(start, min(start + _ROWS_AT_ONCE, count)))
        parts.append(_tokenize_chunk(chunk, numbers[start:], settings, tokenizer, report, kept))
        if tick is not None:
            tick("tokenizing", len(chunk), count)
    return PreparedRows(datasets.concatenate_datasets(parts), report, kept)


def _tokenize_chunk(
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    settings: DataSettings,
    tokenizer: Tokenizer,
    report: RowReport,
    kept: list[RowNumber],
) -> datasets.Dataset:
    """The usable rows of a chunk; their numbers are added to ``kept``."""
    whole: list[tuple[RowNumber, RenderedRow]] = []
    values = rows[:]
    for number, cells in zip(numbers, zip(*values.values(), strict=True), strict=False):
        try:
            whole.append((number, render_row(dict(zip(values, cells, strict=True)), settings, tokenizer)))
        except BadRow as bad:
            report.drop(number, bad)
        except UsageError as error:
            raise UsageError(f"row {number}: {error}") from None
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    labeled = label_rows(tokenizer, [row for _, row in whole])
    for (number, row), made in zip(whole, labeled, strict=True):
        if made.lost:
            raise DoraError(
                f"row {number}: the tokenizer maps the target {made.lost!r} to no token at all, so nothing could be "
                "learned from it; write the labels in characters that the model knows"
            )
        try:
            parts = _fit(made.input_ids, made.labels, number, settings, report)
        except BadRow as bad:
            report.drop(number, bad)
            continue
        report.keep(*(labels for _, labels in parts))
        for note in row.notes:
            report.note(number, note)
        for input_ids, labels in parts:
            kept.append(number)
            for column, value in zip(columns.values(), (input_ids, labels, len(input_ids)), strict=True):
                column.append(value)
    table = datasets.table.InMemoryTable(pa.table(columns, schema=_FEATURES.arrow_schema))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=_FEATURES))


def _fit(
    input_ids: list[int], labels: list[int], number: RowNumber, settings: DataSettings, report: RowReport
) -> list[tuple[list[int], list[int]]]:
    """The row within max_length, in several parts where it is to be divided."""
    length, limit = len(input_ids), settings.max_length
    way = settings.too_long or ("split" if settings.style == "text" else "skip")
    if way == "skip":
        check_length(length, limit)
    # a last token by itself could teach nothing: it takes the one before it along
    starts = [min(start, max(0, length - 2)) for start in range(0, length if way == "split" else 1, limit)]
    ends = [*starts[1:], length if way == "split" else limit]
    parts = [(input_ids[start:end], labels[start:end]) for start, end in zip(starts, ends, strict=True)]
    parts = [part for part in parts if any(label != IGNORED for label in part[1][1:])]
    if not parts:
        raise BadRow(f"no target within {limit} tokens", f"{length} tokens, the prompt alone fills data.max_length")
    if len(starts) > 1:
        report.divide(number, length, len(parts))
    elif length > limit:
        report.cut(number, length)
    return parts
