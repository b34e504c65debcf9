"""Text: rows become prompts and targets for a causal language model."""

import contextlib
import logging
import math
from dataclasses import replace
from typing import Any

from torch import nn

from ...checkpoints.load import Loaded, load_base
from ...data.detect import describe_style, find_style, look_at
from ...data.encoding import context_length, encode, pad_token
from ...data.prepare import BadRow
from ...data.prompts import STYLES, check_columns, render_row
from ...data.rows import RawRows, as_written, read_both
from ...data.tokenize import Collator, find_samples, tokenize_rows
from ...evaluation.generation import continuations
from ...recipe import DataSettings, ModelSettings
from ..modality import Collate, Prepared

log = logging.getLogger(__name__)

_SAMPLES = 5
_SAMPLE_TOKENS = 64
_SHOWN = 400
"""Characters of each end of a row that is shown."""


def check_rows(settings: DataSettings, seed: int) -> RawRows:
    """The rows, with all columns that the style names."""
    rows = read_both(settings, seed)
    found = find_style(settings, rows.train.column_names, look_at(rows.train), settings.train)
    check_columns(found, rows.train.column_names, settings.train)
    if rows.validation is not None:
        check_columns(found, rows.validation.column_names, str(settings.validation))
    if found is settings:
        return rows
    log.info(describe_style(found))
    return replace(rows, settings=found)


def load(settings: ModelSettings) -> Loaded:
    """A causal language model and its tokenizer."""
    return load_base(settings)


def prepare(rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any) -> Prepared:
    """Tokens and labels."""
    settings = _within(settings, model)
    if rows.settings is not None:
        _show_first(rows, settings, processor)
    train = tokenize_rows(rows.train, rows.train_numbers, settings, processor)
    validation = None
    if rows.validation is not None:
        validation = tokenize_rows(rows.validation, rows.validation_numbers, settings, processor)
    return Prepared(train, validation, find_samples(rows, settings, processor, _SAMPLES))


def collate(model: nn.Module, processor: Any) -> Collate:
    """Rows padded with the tokenizer's own token; padding is masked, so any token would do."""
    return Collator(pad_token(processor), most=context_length(model))


def samples(model: nn.Module, processor: Any, settings: DataSettings, asked: list[dict[str, str]]) -> list[str]:
    """What the model writes after each prompt, about as long as the expected answers."""
    closed = STYLES[settings.style].closed
    longest = max(len(encode(processor, sample["expected"], chat=True)) for sample in asked)
    prompts = [encode(processor, sample["prompt"], chat=closed) for sample in asked]
    room = (context_length(model) or math.inf) - max(map(len, prompts))
    return continuations(
        model,
        processor,
        prompts,
        max_new_tokens=max(1, int(min(longest + 8, _SAMPLE_TOKENS, room))),
        batch_size=_SAMPLES,
    )


def _show_first(rows: RawRows, settings: DataSettings, processor: Any) -> None:
    """Log the first row that can be used, so that what auto found can be checked."""
    for row in as_written(rows.train):
        with contextlib.suppress(BadRow):
            text = render_row(row, settings, processor).mark()
            cut = text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
            log.info(f"a row, with what is learned between ⟦ and ⟧:\n{cut}")
            return


def _within(settings: DataSettings, model: nn.Module) -> DataSettings:
    """With no more tokens a row than the model takes: beyond, learned positions fail and turned ones mean nothing."""
    limit = context_length(model)
    if limit is None or settings.max_length <= limit:
        return settings
    log.info(f"data.max_length is {settings.max_length}, and the model takes {limit} tokens: {limit} is used")
    return settings.model_copy(update={"max_length": limit})
