"""Text: rows become prompts and targets for a causal language model."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...checkpoints.models import Loaded, load_base
from ...data.batches import Collator
from ...data.columns import check_columns
from ...data.detect import describe_style, find_style, look_at
from ...data.encoding import check_ids, context_length, encode, leave_blanks, pad_token
from ...data.isolation import choose_layout
from ...data.packing import is_packed, pack_rows
from ...data.prepare import PreparedRows
from ...data.prompt_form import make_form
from ...data.prompts import STYLES, explain_glue
from ...data.rows import RawRows, read_sets
from ...data.survey import mark_learned, survey_rows
from ...data.tokenize import find_samples, join_prepared, tokenize_rows
from ...errors import DoraError, UsageError, collecting, raise_all
from ...evaluation.asking import encode_prompts
from ...evaluation.generation import GREEDY, answer_each, describe_ends, stop_at_turn_end
from ...evaluation.rows import read_examples
from ...evaluation.task import Task
from ...progress import Tick
from ...recipe import DataSettings, DataSource, ModelSettings
from ..modality import Collate, Prepared

log = logging.getLogger(__name__)

_SAMPLES = 5
_SAMPLE_TOKENS = 64


def check_rows(settings: DataSettings, seed: int) -> RawRows:
    """The rows of each set, with all columns that its style names."""
    problems: list[DoraError] = []
    found: list[RawRows] = []
    for each in read_sets(settings, seed):
        with collecting(problems):
            found.append(_find_style(each, settings))
    raise_all(problems)
    first, *others = found
    if not others:
        return first
    own = [each.settings for each in found]
    named = tuple(
        DataSource(path=source.path, weight=source.weight, split=source.split, **_name_style(each))
        for source, each in zip(settings.sources(), own, strict=True)
        if each is not None
    )
    style = _name_style(own[0]) if own[0] is not None else {}
    whole = settings.model_copy(update={**style, "train": named})
    return replace(first, settings=whole, others=tuple(others))


def _find_style(rows: RawRows, settings: DataSettings) -> RawRows:
    """The rows of one set with the settings that hold for them; what style auto found is logged."""
    asked = rows.settings or settings
    source = asked.train if isinstance(asked.train, str) else asked.sources()[0].path
    found = find_style(asked, rows.train.column_names, look_at(rows.train), source)
    check_columns(found, rows.train.column_names, source)
    if rows.validation is not None and isinstance(settings.validation, str):
        check_columns(found, rows.validation.column_names, settings.validation)
    if found is asked:
        return rows
    log.info(describe_style(found) if rows.settings is None else f"{source}: {describe_style(found)}")
    return replace(rows, settings=found)


def _name_style(settings: DataSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("style", "prompt", "target", "messages")}


def load(settings: ModelSettings, *, empty: bool = False) -> Loaded:
    """A causal language model and its tokenizer."""
    return load_base(settings, empty=empty)


def prepare(
    rows: RawRows, settings: DataSettings, model: nn.Module, processor: Any, tick: Tick | None = None
) -> Prepared:
    """Tokens and labels; several rows in one sequence where they are packed, but never those of validation."""
    made = tokenize(rows, settings, model, processor, tick)
    settings, train = made.settings, made.train
    told = {"an answer ends at": describe_ends(model, processor)}
    if is_packed(settings) and _can_pack(settings, model, processor):
        packed = pack_rows(train.rows, settings.max_length)
        full = train.report.tokens / (len(packed) * settings.max_length)
        told["packed"] = f"into {len(packed):,} sequences of at most {settings.max_length:,} tokens, {full:.0%} full"
        train = PreparedRows(packed, train.report)
    first_set, own = list_sets(rows, made.settings)[0]
    found = find_samples(first_set, own, processor, _SAMPLES)
    first = mark_learned(made.train.rows[0], processor)
    return Prepared(train, made.validation, found, told, first, survey(made, processor), make_form(own, joined=True))


@dataclass(frozen=True)
class TokenizedRows:
    """The rows as tokens, none packed."""

    settings: DataSettings
    """With no more tokens a row than the model takes."""
    train: PreparedRows
    validation: PreparedRows | None


def tokenize(
    rows: RawRows, settings: DataSettings, model: Any, processor: Any, tick: Tick | None = None
) -> TokenizedRows:
    """Tokens and labels of every usable row.

    Args:
        model: The model, or anything with its ``config``.

    Raises:
        UsageError: if no row is usable, or the model has no embedding for a token.
    """
    settings = within(rows.settings or settings, model)
    trained, held_out = [], []
    for i, (each, own) in enumerate(list_sets(rows, settings)):
        trained.append(tokenize_rows(each.train, each.train_numbers, own, processor, tick))
        if each.validation is not None:
            held_out.append(tokenize_rows(each.validation, each.validation_numbers, own, processor, tick))
        if glue := explain_glue(find_samples(each, own, processor, 1), own, i if rows.others else None):
            log.warning(glue)
    train, validation = join_prepared(trained), join_prepared(held_out) if held_out else None
    for part in (train, validation):
        if part is not None:
            check_ids(model, processor, part.rows["input_ids"], "the rows")
    return TokenizedRows(settings, train, validation)


def list_sets(rows: RawRows, settings: DataSettings) -> list[tuple[RawRows, DataSettings]]:
    """The sets of rows with the settings that hold for each."""
    sources = settings.sources()
    if not rows.others:
        return [(rows, settings)]
    return [(each, settings.of_source(source)) for each, source in zip((rows, *rows.others), sources, strict=True)]


def survey(made: TokenizedRows, processor: Any, shown: int = _SAMPLES, tasks: Sequence[Task] = ()) -> dict[str, Any]:
    """What the rows are like: see `survey_rows`; and which prompts of tasks stand among them."""
    prompts = {task.name: encode_prompts(task, read_examples(task), processor) for task in tasks}
    return survey_rows(made.train, made.validation, made.settings, processor, shown, prompts)


def _can_pack(settings: DataSettings, model: nn.Module, processor: Any) -> bool:
    """Whether the model keeps packed rows apart; if not, it is an error only where packing was asked for.

    A model without weights cannot be tried, and is trusted.
    """
    if next(model.parameters()).is_meta:
        return True
    try:
        choose_layout(model, Collator(pad_token(processor, model)))
    except UsageError as error:
        if settings.packing:
            raise
        log.info(f"rows are not packed, each is padded: {error}")
        return False
    return True


def collate(model: nn.Module, processor: Any, data: Prepared) -> Collate:
    """Rows padded with the tokenizer's own token; padding is masked, so any token would do."""
    collator = Collator(pad_token(processor, model), most=context_length(model))
    return choose_layout(model, collator) if "lengths" in data.train.rows.column_names else collator


def samples(model: nn.Module, processor: Any, settings: DataSettings, asked: list[dict[str, str]]) -> list[str]:
    """What the model writes after each prompt, about as long as the expected answers."""
    closed = STYLES[settings.style].closed
    longest = max(len(encode(processor, sample["expected"], chat=True)) for sample in asked)
    texts = [sample["prompt"] if closed else leave_blanks(processor, sample["prompt"]) for sample in asked]
    prompts = [encode(processor, text, chat=closed) for text in texts]
    room = (context_length(model) or math.inf) - max(map(len, prompts))
    answers = answer_each(
        model,
        processor,
        prompts,
        max_new_tokens=max(1, int(min(longest + 8, _SAMPLE_TOKENS, room))),
        batch_size=_SAMPLES,
        sampling=stop_at_turn_end(GREEDY, processor) if closed else GREEDY,
    )
    return [answer.text for answer in answers]


def within(settings: DataSettings, model: Any) -> DataSettings:
    """With no more tokens a row than the model takes: beyond, learned positions fail and turned ones mean nothing."""
    limit = context_length(model)
    if limit is None or settings.max_length <= limit:
        return settings
    log.info(f"data.max_length is {settings.max_length}, and the model takes {limit} tokens: {limit} is used")
    return settings.model_copy(update={"max_length": limit})
