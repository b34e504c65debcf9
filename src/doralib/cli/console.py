"""The terminal: where messages for a person go, how many of them, and bars where they can move."""

import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from ..progress import Tick

# in a file or a pipe a line may be long: rich would fold names at 80 columns there, where nothing scrolls
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160

# what moves the cursor, sets a title, or turns the direction of text: C0 and C1 but for tab and newline, bidirectional
# marks, and halves of surrogates, which no terminal takes
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def show_controls(text: str) -> str:
    """Other people's text as a terminal may print it: control and direction characters as escapes, ``\\x1b``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class SafeConsole(Console):
    """A console that shows control characters in whatever it is given instead of obeying them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces to be printed; those that rich itself makes to move the cursor stay."""
        for segment in super().render(renderable, options):
            clean = segment.control or not _CONTROLS.search(segment.text)
            yield segment if clean else Segment(show_controls(segment.text), segment.style)


# paths and data are printed as they are: "[b]" and ":dog:" in them are no commands
console: Console = SafeConsole(width=_WIDTH, markup=False, emoji=False)
errors: Console = SafeConsole(width=_WIDTH, markup=False, emoji=False, stderr=True)


class ConsoleHandler(logging.Handler):
    """Prints what the library logs; a mapping becomes a table of names and what they are."""

    where = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if not isinstance(record.msg, dict):
            self.where.print(record.getMessage())
            return
        table = Table(show_header=False, box=None)
        for name, text in record.msg.items():
            table.add_row(name, text)
        self.where.print(table)


def print_log(where: Console = console) -> None:
    """From now on print what the library logs, or print it elsewhere than before."""
    logger = logging.getLogger("doralib")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    handlers = [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]
    if not handlers:
        handlers = [ConsoleHandler()]
        logger.addHandler(handlers[0])
    handlers[0].where = where


def set_volume(*, quiet: bool = False, verbose: bool = False, aside: bool = False) -> None:
    """Print warnings alone, or what is for developers too; aside: all of it on the standard error."""
    console.stderr = aside
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("doralib").setLevel(level)
    if verbose and not logging.getLogger().handlers:
        others = logging.StreamHandler()
        others.addFilter(lambda record: not record.name.startswith("doralib"))
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", handlers=[others])


def print_json(value: Any) -> None:
    """Print a value as JSON, for another program."""
    print(json.dumps(_without_nan(value), indent=2, default=str))


def _without_nan(value: Any) -> Any:
    """JSON has no word for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: end the programs that were started, and take scratch folders away."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def bars() -> Iterator[Tick | None]:
    """What draws a bar for each thing that is under way; None where no bar can move, in a file or a pipe."""
    if not console.is_terminal or not logging.getLogger("doralib").isEnabledFor(logging.INFO):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, Task] = {}

    def tick(what: str, amount: float, total: float, note: str = "") -> None:
        if what not in tasks:
            # not before: bars of transformers show while a model is loaded
            progress.start()
            progress.add_task(what, total=total, note="")
            tasks[what] = progress.tasks[-1]
        task = tasks[what]
        if task.finished and amount:
            # scored again after training
            progress.reset(task.id)
        progress.update(task.id, advance=amount, note=note or task.fields["note"])
        progress.update(task.id, visible=not task.finished)

    try:
        yield tick
    finally:
        progress.stop()
