"""What a user can do wrong, and what the message must carry.

    DoraError          something failed: a file is truncated, a loss is NaN          exit status 1
    └── UsageError     the request itself is wrong: a misspelt key, a missing file   exit status 2

A message says what was asked, what was found and what to do, for all problems at once.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class DoraError(Exception):
    """Something the user can mend; the message says how."""

    exit_status = 1


class UsageError(DoraError):
    """The request cannot be right, whatever the files hold."""

    exit_status = 2


class Note(UserWarning):
    """What had to be assumed, and no error; the command line prints it as a note."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most like a misspelt one, best first."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'r'?"``, or nothing when no known word is near."""
    near = nearest(word, known, count=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def list_some(items: Sequence[str], most: int = 20, between: str = "\n  ") -> str:
    """The first ``most`` items as one text, and how many more there are: ``"a, b, ... and 3 more"``."""
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return between.join([*items[:most], *more])


def check_given_once(given: Sequence[str]) -> None:
    """Check that no key of ``key=value`` texts is given again, nor a part of a group beside the whole group.

    Raises:
        UsageError: naming both of each such pair.
    """
    keys = [text.partition("=")[0].strip() for text in given]
    twice = [
        f"  {first} and {second}"
        for i, (first, one) in enumerate(zip(given, keys, strict=True))
        for second, other in zip(given[i + 1 :], keys[i + 1 :], strict=True)
        if one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
    ]
    if twice:
        raise UsageError("\n".join(["a setting is given twice, and only one of the two can hold:", *twice]))


@contextmanager
def collecting(problems: list[DoraError]) -> Iterator[None]:
    """Keep what goes wrong inside the block for `raise_all`, and go on after it."""
    try:
        yield
    except DoraError as problem:
        problems.append(problem)


def raise_all(problems: Sequence[DoraError]) -> None:
    """Raise one error that says all of these, if there are any.

    Raises:
        DoraError: with all of them; a UsageError if one of them is.
    """
    if problems:
        kind = UsageError if any(isinstance(problem, UsageError) for problem in problems) else DoraError
        raise kind("\n".join(str(problem) for problem in problems))


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise one error with a line for each problem, if there are any.

    Raises:
        DoraError: ``"WHAT: 2 problems"`` and the first twenty of them.
    """
    if problems:
        raise DoraError(f"{what}: {len(problems)} problem{'s' * (len(problems) > 1)}\n  {list_some(problems)}")
