"""Answers that were judged: a pair of which one was preferred, or one that was liked or not; and prompts alone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError, did_you_mean
from ..recipe import DataSettings
from .conversations import Message, find_column, read_messages
from .encoding import chat_text, encode
from .labels import count_common, label_rows
from .prepare import IGNORED, BadRow, PreparedRows, Row, RowNumber, RowReport, Sample, check_length
from .prompts import fill_prompt, render_row
from .rows import as_written
from .templates import columns_in, value_text

SIDES = ("chosen", "rejected")
_PROMPTS = ("prompt", "question", "instruction", "query", "problem")
_LABELS = ("label", "kto_tag")
_WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# what belongs to a conversation and is neither a prompt nor an answer
_BESIDE = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")


@dataclass(frozen=True)
class AnswerForm:
    """How the rows of a data set are to be read."""

    style: str
    """chat, completion or alpaca."""
    prompt: str | None
    """The column of the prompt, or a template; None: the answers of a pair begin with it."""
    talk: bool = False
    """The prompt is a conversation; the last answer in it is the one that is judged, where no column has answers."""
    label: str | None = None

    def describe(self) -> str:
        """What was found, for a person."""
        where = f"prompts in {self.prompt!r}" if self.prompt else "prompts at the beginning of both answers"
        return f"data.style: {where}, style {self.style}"


def find_form(settings: DataSettings, kind: str, columns: Sequence[str], first: Row, source: str) -> AnswerForm:
    """How rows of these columns are read for an objective.

    Args:
        first: A row, which tells texts from messages.

    Raises:
        UsageError: with every column that is missing, the nearest names and those that there are.
    """
    problems = _find_missing(settings, kind, columns, source)
    talk = find_column(settings.messages, columns)
    prompt = settings.prompt or next((name for name in _PROMPTS if name in columns), None)
    as_talk = settings.prompt is None and talk is not None
    if prompt is None and talk is None and not (set(SIDES) <= set(columns) and kind != "grpo"):
        problems.append(
            f"{source} has no column of prompts ({', '.join(_PROMPTS)}), and none of conversations; name it by "
            "data.prompt, a column or a template with {column}"
        )
    if settings.style not in ("auto", "chat", "completion", "alpaca"):
        problems.append(f"data.style {settings.style} is not for objective.kind {kind}; use chat, completion or alpaca")
    if settings.target is not None:
        problems.append(f"data.target is not for objective.kind {kind}, whose answers are in columns of their own")
    if problems:
        raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(columns)}"]))
    label = next((name for name in _LABELS if name in columns), None) if kind == "kto" else None
    style = settings.style if settings.style != "auto" else _guess_style(settings, kind, columns, first, as_talk)
    return AnswerForm(style, talk if as_talk else prompt, as_talk, label)


def _find_missing(settings: DataSettings, kind: str, columns: Sequence[str], source: str) -> list[str]:
    needed = [name for name in columns_in(settings.prompt or "", "data.prompt") if name not in columns]
    problems = [f"data.prompt: {source} has no column {name!r}{did_you_mean(name, columns)}" for name in needed]
    has_pair = set(SIDES) <= set(columns)
    if kind in ("dpo", "orpo") or (kind == "kto" and set(SIDES) & set(columns)):
        wanted = [name for name in SIDES if name not in columns]
        return problems + [
            f"objective.kind {kind}: {source} has no column {name!r}{did_you_mean(name, columns)}" for name in wanted
        ]
    if kind == "kto" and not has_pair:
        has_talk = find_column(settings.messages, columns) is not None
        if "completion" not in columns and not has_talk:
            problems.append(
                f"objective.kind kto: {source} has no column 'completion'{did_you_mean('completion', columns)}"
            )
        if not set(_LABELS) & set(columns):
            problems.append(
                f"objective.kind kto: {source} has no column 'label'{did_you_mean('label', columns)}; it says of each "
                "completion whether it is good, true or false"
            )
    return problems


def _guess_style(settings: DataSettings, kind: str, columns: Sequence[str], first: Row, as_talk: bool) -> str:
    if as_talk:
        return "chat"
    given = [first.get(name) for name in (*SIDES, "completion", *(() if settings.prompt else _PROMPTS))]
    if any(isinstance(value, (list, dict)) or _spells_messages(value) for value in given):
        return "chat"
    # a prompt's template is the user's own form
    return "alpaca" if "instruction" in columns and not settings.prompt and kind != "grpo" else "completion"


def _spells_messages(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[{")


def read_prompt(row: Row, form: AnswerForm) -> str | list[Message]:
    """The prompt of a row, in style chat as messages.

    Raises:
        BadRow: if there is none, or it is malformed.
    """
    assert form.prompt is not None
    if form.style != "chat":
        return fill_prompt(form.prompt, row, "data.prompt")
    value = row.get(form.prompt)
    messages = (
        read_messages(value, form.prompt)
        if isinstance(value, list) or _spells_messages(value)
        else [{"role": "user", "content": fill_prompt(form.prompt, row, "data.prompt")}]
    )
    system = next((text for key in ("system", "system_prompt") if (text := value_text(row.get(key))).strip()), "")
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def split_pair(row: Row, form: AnswerForm) -> tuple[Row, Row]:
    """The chosen and the rejected answer, each with the prompt as a row for `render`.

    Raises:
        BadRow: if an answer is missing or malformed, or both are the same.
    """
    if row["chosen"] == row["rejected"]:
        raise BadRow("with two equal answers", "chosen and rejected are the same")
    prompt, answers = _split_prompt(row, form)
    return _join(row, prompt, answers[0], form), _join(row, prompt, answers[1], form)


def _split_prompt(row: Row, form: AnswerForm) -> tuple[Any, list[Any]]:
    sides = [_read_answer(row[name], name, form) for name in SIDES]
    whole = all(isinstance(side, list) and side[0]["role"] != "assistant" for side in sides)
    if form.prompt is not None and not whole:
        return (None if form.style == "alpaca" else read_prompt(row, form)), sides
    common = count_common(*sides)
    if not whole:
        # two answers may begin with the same letters
        common = sides[0].rfind(" ", 0, common)
    if common <= 0:
        raise BadRow("malformed", "chosen and rejected begin differently, and there is no column of the prompt")
    return sides[0][:common], [side[common:] for side in sides]


def _read_answer(value: Any, column: str, form: AnswerForm) -> Any:
    if form.style == "chat":
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list) or _spells_messages(value):
            return read_messages(value, column)
        value = value_text(value)
        if not value.strip():
            raise BadRow("empty", f"nothing in {column!r}")
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, str):
        raise BadRow("malformed", f"column {column!r} holds a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow("empty", f"nothing in {column!r}")
    return value


def _join(row: Row, prompt: Any, answer: Any, form: AnswerForm) -> Row:
    if form.style == "alpaca":
        return {**{key: value for key, value in row.items() if key not in SIDES}, "output": answer}
    beside = {key: row[key] for key in _BESIDE if key in row} if form.style == "chat" else {}
    return {"prompt": prompt, "completion": answer, **beside}


def split_judged(row: Row, form: AnswerForm) -> list[tuple[Row, bool]]:
    """Each answer of a row with its prompt, as a row for `render`, and whether it is good.

    Raises:
        BadRow: if the label says neither, or an answer is missing.
    """
    if form.label is None:
        chosen, rejected = split_pair(row, form)
        return [(chosen, True), (rejected, False)]
    said = value_text(row[form.label]).strip().lower()
    if said not in _WORDS:
        raise BadRow("malformed", f"column {form.label!r} holds {row[form.label]!r}, neither true nor false")
    if "completion" in row:
        prompt = None if form.style == "alpaca" else read_prompt(row, form)
        answer = _read_answer(row["completion"], "completion", form)
    else:
        messages = read_prompt(row, form)
        if not isinstance(messages, list) or messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise BadRow("malformed", f"the conversation in {form.prompt!r} does not end with an answer")
        prompt, answer = messages[:-1], messages[-1:]
    return [(_join(row, prompt, answer, form), _WORDS[said])]


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer to it, as tokens."""

    prompt_ids: list[int]
    answer_ids: list[int]
    """With what ends it."""
    prompt: str
    answer: str


def encode_answers(
    rows: Sequence[Row], form: AnswerForm, settings: DataSettings, tokenizer: Tokenizer
) -> list[Answered]:
    """Rows of prompt and completion as the model is trained on them by any objective.

    Raises:
        BadRow: if one is empty, malformed or longer than data.max_length.
    """
    plain = form.style == "completion"
    names = {"prompt": "prompt" if plain else None, "target": "completion" if plain else None}
    settings = settings.model_copy(
        update={"style": form.style, "messages": "messages", "loss_on": "completion", **names}
    )
    rendered = [render_row(row, settings, tokenizer) for row in rows]
    labeled = label_rows(tokenizer, rendered)
    starts = [next((i for i, label in enumerate(each.labels) if label != IGNORED), 0) for each in labeled]
    # a token may reach over the end of the prompt, in one answer and not in the other
    start = min([*starts, *(count_common(labeled[0].input_ids, each.input_ids) for each in labeled[1:])])
    made = []
    for text, each in zip(rendered, labeled, strict=True):
        end = max((i + 1 for i, label in enumerate(each.labels) if label != IGNORED), default=0)
        if each.lost or not 0 < start < end:
            raise BadRow("malformed", "no token of the answer can be told from the prompt")
        check_length(end, settings.max_length)
        first, last = text.learned[-1]
        ids = each.input_ids[:end]
        made.append(Answered(ids[:start], ids[start:], text.text[:first], text.text[first:last]))
    return made


@dataclass(frozen=True)
class _Encoded:
    """What a row became."""

    rows: list[Row]
    labels: list[list[int]]
    """Of each answer with its prompt, by which tokens are counted."""
    samples: list[Sample]


def prepare_answers(
    kind: str,
    rows: datasets.Dataset,
    numbers: Sequence[RowNumber],
    form: AnswerForm,
    settings: DataSettings,
    tokenizer: Tokenizer,
) -> tuple[PreparedRows, list[Sample]]:
    """The usable rows as the objective of this kind takes them, with a column length; and samples of them.

    Columns of dpo and orpo: prompt_ids, chosen_ids, rejected_ids; of kto: prompt_ids, completion_ids, label; of grpo:
    prompt, and the other columns as they are.

    Raises:
        UsageError: if no row is usable.
        DoraError: if a row is bad and bad rows are errors.
    """
    report, made, kept = RowReport(len(rows)), list[Row](), list[RowNumber]()
    samples: list[Sample] = []
    for number, row in zip(numbers, as_written(rows), strict=True):
        try:
            found = _ENCODE[kind](row, form, settings, tokenizer)
        except BadRow as bad:
            report.drop(number, bad)
            continue
        report.keep(*found.labels)
        made += found.rows
        kept += [number] * len(found.rows)
        samples += found.samples
    report.check(settings.bad_rows)
    return PreparedRows(_make_dataset(made), report, kept), samples


def _encode_pair(row: Row, form: AnswerForm, settings: DataSettings, tokenizer: Tokenizer) -> _Encoded:
    chosen, rejected = encode_answers(split_pair(row, form), form, settings, tokenizer)
    labels = [_labels(chosen), _labels(rejected)]
    ids = {"prompt_ids": chosen.prompt_ids, "chosen_ids": chosen.answer_ids, "rejected_ids": rejected.answer_ids}
    return _Encoded([{**ids, "length": max(map(len, labels))}], labels, [Sample(chosen.prompt, chosen.answer)])


def _encode_judged(row: Row, form: AnswerForm, settings: DataSettings, tokenizer: Tokenizer) -> _Encoded:
    found = [(encode_answers([one], form, settings, tokenizer)[0], good) for one, good in split_judged(row, form)]
    labels = [_labels(each) for each, _ in found]
    rows: list[Row] = [
        {"prompt_ids": each.prompt_ids, "completion_ids": each.answer_ids, "label": good, "length": len(all_ids)}
        for (each, good), all_ids in zip(found, labels, strict=True)
    ]
    return _Encoded(rows, labels, [Sample(each.prompt, each.answer) for each, good in found if good])


def _encode_prompt(row: Row, form: AnswerForm, settings: DataSettings, tokenizer: Tokenizer) -> _Encoded:
    prompt = read_prompt(row, form)
    text = prompt if isinstance(prompt, str) else chat_text(tokenizer, prompt)
    length = len(encode(tokenizer, text, chat=form.style == "chat"))
    check_length(length, settings.max_length)
    sample = Sample(text, value_text(row.get("answer", row.get("solution"))))
    return _Encoded([{**row, "prompt": prompt, "length": length}], [[IGNORED] * length], [sample])


_ENCODE: dict[str, Callable[[Row, AnswerForm, DataSettings, Tokenizer], _Encoded]] = {
    "dpo": _encode_pair,
    "orpo": _encode_pair,
    "kto": _encode_judged,
    "grpo": _encode_prompt,
}


def _labels(answered: Answered) -> list[int]:
    return [IGNORED] * len(answered.prompt_ids) + answered.answer_ids


def _make_dataset(rows: Sequence[Row]) -> datasets.Dataset:
    """The rows as a data set; a column of values of several kinds becomes texts, JSON where they were none."""
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    for name, values in columns.items():
        try:
            pa.array(values)
        except (pa.ArrowException, OverflowError):
            columns[name] = [each if each is None or isinstance(each, str) else json.dumps(each) for each in values]
    return datasets.Dataset.from_dict(columns)
