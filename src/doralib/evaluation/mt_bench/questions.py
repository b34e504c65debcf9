"""MT-Bench's own files: questions, reference answers and the judge's prompts, as FastChat keeps them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...documents import decode_json
from ...errors import DoraError, UsageError
from ...files import find_file, read_text

NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are judged against a reference answer."""


class _Line(BaseModel):
    """What is read of a line; it may hold more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _AskedLine(_Line):
    question_id: int
    category: str
    turns: list[str] = Field(min_length=1)


class _Choice(_Line):
    turns: list[str]


class _AnswerLine(_Line):
    question_id: int
    choices: list[_Choice] = Field(min_length=1)


class _PromptLine(_Line):
    name: str
    system_prompt: str
    prompt_template: str


class _JudgmentLine(_Line):
    question_id: int
    turn: int
    score: float | None = None


class _PairLine(_JudgmentLine):
    g1_winner: str
    g2_winner: str


@dataclass(frozen=True)
class Question:
    """Two turns of one user."""

    id: int
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]
    """An answer to each turn; empty where the judge needs none."""


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is told and asked."""

    name: str
    system: str
    template: str


def read_questions(path: Path) -> list[Question]:
    """The questions, with the reference answers of ``reference_answer.jsonl`` beside them.

    Raises:
        UsageError: if the file or the one beside it is not there.
        DoraError: if one is damaged, or a reference is missing that the judge needs.
    """
    found = _read_lines(find_file(path), _AskedLine)
    references = read_answers(find_file(path.parent / "reference_answer.jsonl"))
    made, missing = [], []
    for line in found:
        needed = line["category"] in NEED_REFERENCE
        if needed and line["question_id"] not in references:
            missing.append(str(line["question_id"]))
        known = tuple(references.get(line["question_id"], ())) if needed else ()
        made.append(Question(line["question_id"], line["category"], tuple(line["turns"]), known))
    if missing:
        raise DoraError(f"{path.parent / 'reference_answer.jsonl'} has no answer to question {', '.join(missing)}")
    return made


def read_judge_prompts(path: Path) -> Mapping[str, JudgePrompt]:
    """The prompts by name, of ``judge_prompts.jsonl`` beside the questions."""
    lines = _read_lines(find_file(path.parent / "judge_prompts.jsonl"), _PromptLine)
    return {line["name"]: JudgePrompt(line["name"], line["system_prompt"], line["prompt_template"]) for line in lines}


def read_answers(path: Path) -> dict[int, list[str]]:
    """The turns of each question in an answer file; none if there is no file."""
    return {line["question_id"]: line["choices"][0]["turns"] for line in _read_done(path, _AnswerLine)}


def read_judgments(path: Path, *, pairs: bool = False) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines of a judgment file by question and turn; none if there is no file."""
    lines = _read_done(path, _PairLine if pairs else _JudgmentLine)
    return {(line["question_id"], line["turn"]): line for line in lines}


def _read_lines(path: Path, form: type[_Line]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line that was cut short is left out.

    Raises:
        UsageError: if there is no object in it.
        DoraError: if another line is not of the form.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(form.model_validate(decode_json(line)).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"])
            raise DoraError(f"{path}, line {number}: {at + ': ' if at else ''}{first['msg']}") from None
        except ValueError as error:
            if number < len(lines):
                raise DoraError(f"{path}, line {number} is not JSON: {error}") from None
    if not found:
        raise UsageError(f"{path} holds no lines of JSON")
    return found


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Write one more line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text and not text.endswith("\n"):
        # a session that was killed left half a line
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _read_done(path: Path, form: type[_Line]) -> list[dict[str, Any]]:
    """The lines of an earlier session; none if there is no file."""
    return _read_lines(path, form) if path.is_file() and path.stat().st_size else []
