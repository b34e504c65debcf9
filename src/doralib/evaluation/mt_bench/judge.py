"""The judge: FastChat's prompts to an OpenAI-compatible server, and the scores in what it says."""

import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from ...errors import DoraError
from ..json_lines import append_lines
from .questions import JudgePrompt, Question, read_judgments

Answers = Mapping[int, Sequence[str]]
_RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_WINNER = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_MAX_TOKENS = 2048
_TRIES = 6
_PATH = "/chat/completions"
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class Judge:
    """A model behind a server that speaks OpenAI's protocol."""

    url: str
    """Such as http://localhost:8000/v1."""
    model: str
    key: str = ""
    first_wait: float = 1.0
    """Seconds before the second try; they double with each."""

    def ask(self, prompt: JudgePrompt, text: str) -> str:
        """What the judge says; asked again after 429, 5xx and broken connections.

        Raises:
            DoraError: if the server refuses, or does not answer in six tries.
        """
        body: Any = {
            "model": self.model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        told = ""
        for tries in range(_TRIES):
            if tries:
                time.sleep(self.first_wait * 2 ** (tries - 1) * random.uniform(1, 1.2))
            try:
                reply = requests.post(self.url.rstrip("/") + _PATH, json=body, headers=headers, timeout=300)
                if reply.status_code == 200:
                    return str(reply.json()["choices"][0]["message"]["content"])
                told = f"status {reply.status_code}: {reply.text[:200]}"
                if reply.status_code != 429 and reply.status_code < 500:
                    break
            except (requests.RequestException, ValueError, LookupError, TypeError) as error:
                told = f"{type(error).__name__}: {error}"
        raise DoraError(
            f"the judge at {self.url} does not answer: {told}\n"
            "  what it said before is kept; the same command goes on from there"
        )


@dataclass(frozen=True)
class Verdict:
    """Of one answer, or of one pair of answers, to one turn."""

    question: int
    turn: int
    score: float | None
    """1 to 10; of a pair 1 for the model, 0 for the other, 0.5 for a tie; None where the judge gave none."""


def find_rating(text: str) -> float | None:
    """The score in a judgment, as FastChat finds it: [[8]], else [8]."""
    found = next((match for pattern in _RATING if (match := pattern.search(text))), None)
    return float(found[1]) if found else None


def find_winner(text: str) -> str | None:
    """A, B or tie, as FastChat finds it."""
    return next((winner for mark, winner in _WINNER.items() if mark in text), None)


@dataclass(frozen=True)
class _Question:
    """One thing to ask the judge."""

    question: Question
    turn: int
    prompt: JudgePrompt
    text: str


def estimate_tokens(asked: Sequence[_Question]) -> tuple[int, int]:
    """Tokens of all prompts, about, and the most that may come back."""
    letters = sum(len(each.prompt.system) + len(each.text) for each in asked)
    return math.ceil(letters / _CHARACTERS_A_TOKEN), len(asked) * _MAX_TOKENS


def make_single(questions: Sequence[Question], answers: Answers, prompts: Mapping[str, JudgePrompt]) -> list[_Question]:
    """What to ask about each answer alone."""
    made = []
    for question in questions:
        kind = "single-math-v1" if question.references else "single-v1"
        one, two = answers[question.id]
        known = {"question": question.turns[0], "answer": one} | _number("question", question.turns)
        known |= _number("answer", (one, two)) | _number("ref_answer", question.references)
        for turn, name in ((1, kind), (2, f"{kind}-multi-turn")):
            made.append(_Question(question, turn, prompts[name], _fill(prompts[name], known)))
    return made


def make_pairs(
    questions: Sequence[Question], first: Answers, second: Answers, prompts: Mapping[str, JudgePrompt]
) -> list[_Question]:
    """What to ask about two answers, the first of them called A."""
    made = []
    for question in questions:
        kind = "pair-math-v1" if question.references else "pair-v2"
        a, b = first[question.id], second[question.id]
        known = {"question": question.turns[0], "answer_a": a[0], "answer_b": b[0]} | _number(
            "question", question.turns
        )
        known |= _number("answer_a", a) | _number("answer_b", b) | _number("ref_answer", question.references)
        for turn, name in ((1, kind), (2, f"{kind}-multi-turn")):
            made.append(_Question(question, turn, prompts[name], _fill(prompts[name], known)))
    return made


def judge_single(
    judge: Judge, asked: Sequence[_Question], path: Path, *, name: str, tick: Callable[[], None] = lambda: None
) -> list[Verdict]:
    """The score of each answer; those that the file at ``path`` has are not asked for again."""
    done = read_judgments(path)
    for each in asked:
        key = (each.question.id, each.turn)
        if key not in done:
            said = judge.ask(each.prompt, each.text)
            line = {"question_id": key[0], "model": name, "judge": [judge.model, each.prompt.name]}
            line |= {"user_prompt": each.text, "judgment": said}
            score = find_rating(said)
            done[key] = {**line, "score": -1 if score is None else score, "turn": each.turn, "tstamp": time.time()}
            append_lines(path, [done[key]])
        tick()
    return [Verdict(*key, _find_score(done[key])) for key in ((each.question.id, each.turn) for each in asked)]


def judge_pairs(
    judge: Judge,
    asked: Sequence[_Question],
    swapped: Sequence[_Question],
    path: Path,
    *,
    names: tuple[str, str],
    tick: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """Who won each turn, asked in both orders: who wins in one and does not lose in the other; else a tie."""
    done = read_judgments(path, pairs=True)
    for each, other in zip(asked, swapped, strict=True):
        key = (each.question.id, each.turn)
        if key not in done:
            first, second = judge.ask(each.prompt, each.text), judge.ask(other.prompt, other.text)
            won = [_name_winner(find_winner(first), *names), _name_winner(find_winner(second), *reversed(names))]
            line = {"question_id": key[0], "model_1": names[0], "model_2": names[1], "g1_winner": won[0]}
            line |= {"g2_winner": won[1], "judge": [judge.model, each.prompt.name], "turn": each.turn}
            line |= {"g1_user_prompt": each.text, "g1_judgment": first}
            line |= {"g2_user_prompt": other.text, "g2_judgment": second, "tstamp": time.time()}
            done[key] = line
            append_lines(path, [line])
        tick()
    return [Verdict(each.question.id, each.turn, _score_pair(done[each.question.id, each.turn])) for each in asked]


def _find_score(line: Mapping[str, Any]) -> float | None:
    """FastChat's file says -1 where the judge gave none."""
    score = line["score"]
    return None if score is None or score < 0 else score


def _name_winner(winner: str | None, a: str, b: str) -> str:
    return {"A": a, "B": b, "tie": "tie", None: "error"}[winner]


def _score_pair(line: Mapping[str, Any]) -> float | None:
    won = {line["g1_winner"], line["g2_winner"]}
    if "error" in won:
        return None
    if len(won) == 2 and "tie" not in won:
        return 0.5  # the judge prefers a place, not an answer
    winners = won - {"tie"}
    return 0.5 if not winners else float(winners == {line["model_1"]})


def _number(name: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{i}": text for i, text in enumerate(texts, 1)}


def _fill(prompt: JudgePrompt, known: Mapping[str, str]) -> str:
    """The template with the texts in its braces; braces in the texts stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), prompt.template)
