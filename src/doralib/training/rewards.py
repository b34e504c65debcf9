"""Reward functions of grpo: a number that is right, a form that is kept, or functions of the user's own, by name."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import Any

from ..errors import UsageError, did_you_mean

Reward = Callable[..., Sequence[float | None]]
"""Called with prompts, completions and every column of the rows by name; a reward for each completion."""

_GIVEN = frozenset(("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"))
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def number(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the last number (within <answer>, if the completion has it) is the answer's last number, else 0."""
    found = [_find_number(_answer_text(_as_text(each))) for each in completions]
    wanted = [_find_number(str(each)) for each in answer]
    return [float(one is not None and one == other) for one, other in zip(found, wanted, strict=True)]


def format(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion ends with one <answer>...</answer> and has no other, else 0."""
    texts = [_as_text(each).strip() for each in completions]
    return [float(len(_ANSWER.findall(text)) == 1 and text.endswith("</answer>")) for text in texts]


PACKAGED: Mapping[str, Reward] = {"number": number, "format": format}
"""Reward functions by the names that recipes use."""


def find_rewards(names: Sequence[str]) -> list[Reward]:
    """The functions of these names: packaged ones, or ``module.function`` from an installed module or the folder here.

    Raises:
        UsageError: naming every one that cannot be found, and why.
    """
    found, problems = [], []
    for name in names:
        try:
            found.append(PACKAGED[name] if name in PACKAGED else _import(name))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    return found


def check_reward_columns(names: Sequence[str], columns: Sequence[str], source: str) -> None:
    """Check that the rows have every column that the reward functions ask for.

    Raises:
        UsageError: as `find_rewards`, and naming every column that is missing.
    """
    problems = [
        f"objective.rewards: {name} reads the column {column!r}, which {source} lacks{did_you_mean(column, columns)}"
        for name, reward in zip(names, find_rewards(names), strict=True)
        for column in _needs(reward)
        if column not in columns
    ]
    if problems:
        raise UsageError("\n".join([*problems, f"columns of {source}: {', '.join(columns)}"]))


def _needs(reward: Reward) -> list[str]:
    parameters = inspect.signature(reward).parameters.values()
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in fixed and p.name not in _GIVEN]


def _import(name: str) -> Reward:
    module, _, function = name.rpartition(".")
    if not module:
        hint = did_you_mean(name, PACKAGED)
        raise UsageError(
            f"objective.rewards: there is no reward {name!r}{hint}; packaged are {', '.join(PACKAGED)}, and one of "
            "your own is written module.function"
        )
    try:
        with _from_here():
            found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UsageError(f"objective.rewards: {name}: {error}; looked in {sys.prefix} and in this folder") from None
    except AttributeError:
        raise UsageError(f"objective.rewards: the module {module} has no function {function!r}") from None
    if not callable(found):
        raise UsageError(f"objective.rewards: {name} is a {type(found).__name__}, not a function")
    return found


@contextmanager
def _from_here() -> Any:
    """Let modules be imported from the current folder inside the block, as `python -m` does."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _as_text(completion: Any) -> str:
    """A completion's text; in a conversation it is a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def _answer_text(text: str) -> str:
    return found[-1] if (found := _ANSWER.findall(text)) else text


def _find_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
