"""Text to text by an encoder and a decoder: translation, summaries, and what else T5 and BART were made for."""

from typing import Any

from torch import nn

from ...checkpoints.models import Loaded, load_seq2seq
from ...data.batches import PairCollator
from ...data.encoding import check_ids, context_length, encode, pad_token
from ...data.pairs import encode_pairs, find_start, set_languages
from ...data.prepare import PreparedRows
from ...data.prompt_form import make_form
from ...data.rows import RawRows
from ...data.survey import LEFT, RIGHT
from ...data.tokenize import find_samples, join_prepared
from ...errors import UsageError
from ...evaluation.generation import answer_each
from ...progress import Tick
from ...recipe import DataSettings, ModelSettings
from ..modality import Collate, Prepared
from . import text

_SAMPLES = 5
_SAMPLE_TOKENS = 128


def check_rows(settings: DataSettings, seed: int) -> RawRows:
    """The rows of each set, of a style that has a prompt and an answer."""
    problems = {
        "data.packing: an encoder-decoder takes one source a row": bool(settings.packing),
        "data.loss_on: an encoder-decoder learns its targets alone": settings.loss_on == "all",
        "data.too_long: a source cannot be divided; skip or truncate it": settings.too_long == "split",
    }
    if wrong := [problem for problem, is_so in problems.items() if is_so]:
        raise UsageError("\n".join(wrong))
    rows = text.check_rows(settings, seed)
    for _, own in text.list_sets(rows, rows.settings or settings):
        if own.style not in ("completion", "alpaca") or (own.style == "completion" and own.prompt is None):
            raise UsageError(
                f"data.style: an encoder-decoder reads a source and writes a target, which style {own.style} without a "
                "prompt does not tell apart; set data.prompt and data.target"
            )
    return rows


def load(settings: ModelSettings, *, empty: bool = False) -> Loaded:
    """An encoder-decoder and its tokenizer."""
    return load_seq2seq(settings, empty=empty)


def prepare(
    rows: RawRows,
    settings: DataSettings,
    model: nn.Module,
    processor: Any,
    tick: Tick | None = None,  # noqa: ARG001
) -> Prepared:
    """Tokens of sources and targets; the model's own settings of generation begin a target as the data do."""
    settings = text.within(rows.settings or settings, model)
    set_languages(processor, settings)
    model.generation_config.update(**find_start(processor))  # type: ignore[union-attr, operator]
    sets = text.list_sets(rows, settings)
    train = join_prepared([encode_pairs(each.train, each.train_numbers, own, processor) for each, own in sets])
    held_out = [
        encode_pairs(each.validation, each.validation_numbers, own, processor)
        for each, own in sets
        if each.validation is not None
    ]
    validation = join_prepared(held_out) if held_out else None
    for part in (train, validation):
        if part is not None:
            _check_ids(model, processor, part)
    named = settings.source_language and settings.language
    told = {"languages": f"{settings.source_language} to {settings.language}"} if named else {}
    row = train.rows[0]
    first = f"{processor.decode(row['input_ids'])}\n{LEFT}{processor.decode(row['labels'])}{RIGHT}"
    found = find_samples(*sets[0], processor, _SAMPLES)
    return Prepared(train, validation, found, told, first, form=make_form(sets[0][1]))


def _check_ids(model: nn.Module, processor: Any, part: PreparedRows) -> None:
    for column in ("input_ids", "labels"):
        check_ids(model, processor, part.rows[column], "the rows")


def collate(model: nn.Module, processor: Any, data: Prepared) -> Collate:  # noqa: ARG001
    """Rows padded on the right; the model shifts the labels for its decoder itself."""
    return PairCollator(pad_token(processor, model), most=context_length(model))


def samples(
    model: nn.Module,
    processor: Any,
    settings: DataSettings,  # noqa: ARG001
    asked: list[dict[str, str]],
) -> list[str]:
    """What the model writes to each source, about as long as the expected answers."""
    longest = max(len(encode(processor, sample["expected"], whole=True)) for sample in asked)
    sources = [encode(processor, sample["prompt"], whole=True) for sample in asked]
    answers = answer_each(
        model, processor, sources, max_new_tokens=min(longest + 16, _SAMPLE_TOKENS), batch_size=_SAMPLES
    )
    return [answer.text for answer in answers]
