"""What the demos have in common: a folder that is free, and a step with the command that does the same."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

from .console import console


def find_free_folder(out: Path, method: str) -> Path:
    """The first of METHOD, METHOD-2, METHOD-3 ... that neither a run nor its merged model has taken."""
    names = itertools.chain([method], (f"{method}-{i}" for i in itertools.count(2)))
    return next(out / name for name in names if not (out / name).exists() and not (out / f"{name}-merged").exists())


def show_step(number: int, title: str, command: Sequence[str]) -> None:
    """Say what comes, and the command that does it."""
    console.rule(f"{number}. {title}", align="left")
    console.print(f"$ {shlex.join(command)}", style="dim", highlight=False, soft_wrap=True)
