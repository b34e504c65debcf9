"""What the library logs and ticks, on the terminal: lines and tables everywhere, bars where they can move."""

import io
import logging
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.table import Table

from doralib.cli import console as terminal
from doralib.cli.console import SafeConsole, bars, print_log, show_controls


@pytest.fixture
def shown(monkeypatch):
    """The console as a terminal of which everything is kept."""
    kept = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=kept, force_terminal=True, width=100, markup=False))
    return kept


def drawn(shown):
    """The bars as they are drawn now, under a line."""
    time.sleep(0.25)  # drawn ten times a second
    shown.truncate(0)
    terminal.console.print("now:")
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue()).partition("now:")[2]


def test_a_line_is_printed_once_and_as_it_is(capsys):
    print_log()
    print_log()
    logging.getLogger("doralib.training.job").info("report: [b] 100% :dog:")
    assert capsys.readouterr().out == "report: [b] 100% :dog:\n"


def test_a_mapping_is_a_table(capsys):
    print_log()
    logging.getLogger("doralib.training.job").info({"model": "m", "trained": "3 parameters"})
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [" model    m", " trained  3 parameters"]


def test_no_bar_moves_in_a_file():
    with bars() as tick:
        assert tick is None


def test_a_bar_goes_when_it_is_full_and_comes_back_for_more(shown):
    with bars() as tick:
        tick("step", 0, 3)
        tick("step", 2, 3)
        tick("step", 0, 3, "loss 1.5")
        assert re.search(r"step .* 67% loss 1.5", drawn(shown))
        tick("step", 1, 3)
        # a note about the last step brings no empty bar back
        tick("step", 0, 3, "loss 1.4")
        assert "step" not in drawn(shown)
        for share in (0.5, 0.5, 1.0):
            tick("sentiment", share, 1.0)
        assert "sentiment" not in drawn(shown)
        tick("sentiment", 0.25, 1.0)
        assert re.search(r"sentiment .* 25%", drawn(shown))
    assert "sentiment" not in drawn(shown)


@pytest.mark.long
def test_the_library_by_itself_prints_nothing():
    code = "import logging, doralib.training.job as job; job.log.info('loud'); job.log.info({'a': 'b'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loud" not in done.stdout + done.stderr


def test_control_characters_of_others_are_shown_and_not_obeyed():
    text = "a\x1b[2J\x1b]0;title\x07b\u202ec\x9bd\r\te\nf"
    assert show_controls(text) == "a\\x1b[2J\\x1b]0;title\\x07b\\u202ec\\x9bd\\r\te\nf"
    assert show_controls("\ud800 é 😀") == "\\ud800 é 😀"
    out = io.StringIO()
    table = Table("column \x1b[31m")
    table.add_row("cell \u202e")
    SafeConsole(file=out, width=80, force_terminal=True, markup=False, highlight=False).print("x \x1b[2J", table)
    assert "\\x1b[2J" in out.getvalue()
    assert "\\u202e" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "\u202e" not in out.getvalue()
