"""MT-Bench's own files: questions, reference answers and the judge's prompts, as FastChat keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ...errors import DoraError
from ...files import find_file
from ..json_lines import JsonLine, read_done, read_json_lines

NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are judged against a reference answer."""


class _AskedLine(JsonLine):
    question_id: int
    category: str
    turns: list[str] = Field(min_length=1)


class _Choice(JsonLine):
    turns: list[str]


class _AnswerLine(JsonLine):
    question_id: int
    choices: list[_Choice] = Field(min_length=1)


class _PromptLine(JsonLine):
    name: str
    system_prompt: str
    prompt_template: str


class _JudgmentLine(JsonLine):
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
    found = read_json_lines(find_file(path), _AskedLine)
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
    lines = read_json_lines(find_file(path.parent / "judge_prompts.jsonl"), _PromptLine)
    return {line["name"]: JudgePrompt(line["name"], line["system_prompt"], line["prompt_template"]) for line in lines}


def read_answers(path: Path) -> dict[int, list[str]]:
    """The turns of each question in an answer file; none if there is no file."""
    return {line["question_id"]: line["choices"][0]["turns"] for line in read_done(path, _AnswerLine)}


def read_judgments(path: Path, *, pairs: bool = False) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines of a judgment file by question and turn; none if there is no file."""
    lines = read_done(path, _PairLine if pairs else _JudgmentLine)
    return {(line["question_id"], line["turn"]): line for line in lines}
