"""Pairs of texts for an encoder-decoder: a source whole, and a target with the tokens that its decoder writes."""

import re
from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError, did_you_mean
from ..recipe import DataSettings
from .prepare import BadRow, PreparedRows, Row, RowNumber, RowReport, check_length
from .prompts import render_row
from .rows import as_written

_LANGUAGE = re.compile(r"_{0,2}[a-z]{2,3}_([A-Z]{2}|[A-Z][a-z]{3})|__[a-z]{2,3}__")
_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features({"input_ids": _TOKENS, "labels": _TOKENS, "length": datasets.Value("int32")})


def encode_pairs(
    rows: datasets.Dataset, numbers: Sequence[RowNumber], settings: DataSettings, tokenizer: Tokenizer
) -> PreparedRows:
    """The usable rows as tokens of their sources and targets, neither longer than max_length.

    Raises:
        UsageError: if no row is usable.
        DoraError: if a row is bad and bad rows are errors.
    """
    report, kept = RowReport(len(rows)), list[RowNumber]()
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    for number, row in zip(numbers, as_written(rows), strict=True):
        try:
            source, target = _encode_pair(row, settings, tokenizer)
            longest = max(len(source), len(target))
            if settings.too_long != "truncate":
                check_length(longest, settings.max_length)
        except BadRow as bad:
            report.drop(number, bad)
            continue
        if longest > settings.max_length:
            report.cut(number, longest)
            source, target = source[: settings.max_length], target[: settings.max_length]
        length = len(source) + len(target)
        report.kept, report.tokens = report.kept + 1, report.tokens + length
        report.label_tokens += len(target)
        kept.append(number)
        for column, value in zip(columns.values(), (source, target, length), strict=True):
            column.append(value)
    report.check(settings.bad_rows)
    return PreparedRows(datasets.Dataset.from_dict(columns, features=_FEATURES), report, kept)


def _encode_pair(row: Row, settings: DataSettings, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    made = render_row(row, settings, tokenizer)
    start, end = made.learned[-1]
    if not made.text[start:end].strip():
        raise BadRow("empty", "nothing in its target")
    source = tokenizer(made.text[:start], verbose=False)["input_ids"]
    return source, tokenizer(text_target=made.text[start:end], verbose=False)["input_ids"]


def set_languages(tokenizer: Any, settings: DataSettings) -> None:
    """Let the tokenizer mark sources and targets with the languages of the data, where it marks any.

    Raises:
        UsageError: if a language is missing or unknown, or is given to a tokenizer that marks none.
    """
    asked = {"source_language": settings.source_language, "language": settings.language}
    if not hasattr(tokenizer, "tgt_lang"):
        if given := [name for name, language in asked.items() if language]:
            raise UsageError(
                f"data.{given[0]}: this model's tokenizer marks no language; write into data.prompt what the model was "
                "taught, such as 'translate English to German: {text}'"
            )
        return
    names = [name for name in tokenizer.get_vocab() if _LANGUAGE.fullmatch(name)]
    problems = []
    for name, language in asked.items():
        if language is None:
            problems.append(f"data.{name}: this model's tokenizer marks the language; name it, as in {names[0]}")
        elif find_language(tokenizer, language) is None:
            problems.append(f"data.{name}: the tokenizer knows no language {language!r}{did_you_mean(language, names)}")
    if problems:
        raise UsageError("\n".join(problems))
    tokenizer.src_lang, tokenizer.tgt_lang = asked.values()
    # what its files will say
    tokenizer.init_kwargs.update(src_lang=tokenizer.src_lang, tgt_lang=tokenizer.tgt_lang)


def find_language(tokenizer: Any, language: str) -> int | None:
    """The token that marks a language; None if there is none."""
    token = language if language in tokenizer.get_vocab() else f"__{language}__"
    number = tokenizer.convert_tokens_to_ids(token)
    return None if number in (None, tokenizer.unk_token_id) else int(number)


def find_start(tokenizer: Any) -> dict[str, int]:
    """What the model's settings of generation have to say so that a target begins as its tokens do.

    mBART-25 begins with the language's token, others write it as their first; none where no language is marked.
    """
    language = getattr(tokenizer, "tgt_lang", None)
    token = find_language(tokenizer, language) if language else None
    if token is None:
        return {}
    ids = tokenizer(text_target="a")["input_ids"]
    return {"forced_bos_token_id" if ids[0] == token else "decoder_start_token_id": token}
