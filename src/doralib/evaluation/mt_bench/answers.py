"""A model's answers to both turns of each question, in its own chat template, as FastChat's answer file."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...data.encoding import chat_text, context_length, encode
from ...errors import UsageError
from ..generation import Sampling, answer_each
from ..json_lines import append_lines
from .questions import Question, read_answers

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""FastChat's, by category; 0 elsewhere."""


@dataclass(frozen=True)
class Answering:
    """The model that answers, and how."""

    model: nn.Module
    tokenizer: Tokenizer
    name: str
    """In FastChat's files."""
    max_new_tokens: int = 1024
    """Of one answer."""
    seed: int = 0


def answer_questions(
    answering: Answering, questions: Sequence[Question], path: Path, *, tick: Callable[[], None] = lambda: None
) -> dict[int, list[str]]:
    """Answer what the file at ``path`` has not, and return all answers by question, both turns.

    Raises:
        UsageError: if the tokenizer has no chat template, or the model too little room for an answer.
    """
    done = read_answers(path)
    for question in questions:
        if question.id not in done:
            turns = _answer(answering, question)
            line = {"question_id": question.id, "answer_id": uuid.uuid4().hex[:22], "model_id": answering.name}
            append_lines(path, [{**line, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}])
            done[question.id] = turns
        tick()
    return done


def _answer(answering: Answering, question: Question) -> list[str]:
    model, tokenizer = answering.model, answering.tokenizer
    sampling = Sampling(temperature=TEMPERATURES.get(question.category, 0.0), seed=answering.seed)
    messages: list[dict[str, str]] = []
    answers = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        prompt = encode(tokenizer, chat_text(tokenizer, messages), chat=True)
        limit = context_length(model)
        room = answering.max_new_tokens if limit is None else min(answering.max_new_tokens, limit - len(prompt))
        if room < 1:
            raise UsageError(
                f"question {question.id}: its conversation has {len(prompt)} tokens and the model takes {limit}; "
                "set a smaller --max-new-tokens"
            )
        (answer,) = answer_each(model, tokenizer, [prompt], max_new_tokens=room, batch_size=1, sampling=sampling)
        answers.append(answer.text.strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers
