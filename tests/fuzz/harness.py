"""Damage files of each kind, and read them: no traceback, no hang, no crash.

SEED=7 make fuzz                            the whole; the counts of all seeds are the table in docs/reliability.md
python tests/fuzz/harness.py --only JSON    some kinds
"""

import argparse
import contextlib
import faulthandler
import io
import logging
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1])]

from tally import Tally  # noqa: E402

from doralib.errors import DoraError  # noqa: E402
from fuzz import media, readers  # noqa: E402
from fuzz.readers import Kind  # noqa: E402

HERE = Path(__file__).parent
SECONDS = 20
"""Of the processor that one case may take."""


class _Hang(BaseException):
    """The time of a case is over."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """So many seconds of the processor, which other programs do not take away, and ten times as many by the clock."""

    def stop(*_: object) -> None:
        raise _Hang

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 10 * seconds)}
    before = {}
    for timer, (kind, limit) in timers.items():
        before[kind] = signal.signal(kind, stop)
        signal.setitimer(timer, limit)
    # code that never returns to Python ends the process, with the place
    faulthandler.dump_traceback_later(30 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        for timer, (kind, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(kind, before[kind])
        faulthandler.cancel_dump_traceback_later()


def try_once(kind: Kind, world: Path, seed: str) -> tuple[str, str]:
    """Damage one file and read it: read, refused, traceback or hang; and what a developer needs of the last two."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = kind.make(world, Path(folder), draw)
        kind.harm(path, draw)
        quiet = io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(quiet))
        stack.enter_context(contextlib.redirect_stderr(quiet))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        try:
            with _limited(SECONDS):
                kind.read(path, world)
        except DoraError as error:
            str(error).encode()
            return "refused", ""
        except OSError as error:
            # the command line tells these by name
            return ("refused", "") if error.filename else ("traceback", traceback.format_exc())
        except _Hang:
            return "hang", traceback.format_exc()
        except Exception:  # noqa: BLE001  whatever it is, it is a fault
            return "traceback", traceback.format_exc()
    return "read", ""


def run_cases(
    count: int, seed: int, only: str = "", minutes: float = math.inf, tell: Callable[[str], None] = str
) -> tuple[Counter, list[str]]:
    """Try cases of each kind by its share; how each ended, and a line for each failure.

    Args:
        count: cases of a kind whose share is 1.
        tell: called with each failure at once.
    """
    logging.disable(logging.CRITICAL)
    end = time.monotonic() + 60 * minutes
    counts: Counter = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        readers.build(world)
        media.build(world)
        kinds = [kind for kind in (*readers.KINDS, *media.KINDS) if only.lower() in kind.name.lower()]
        for i in range(count):
            for kind in kinds:
                for j in range(kind.share):
                    if time.monotonic() > end:
                        break
                    case = f"{seed}-{kind.name}-{i * kind.share + j}"
                    how, why = try_once(kind, world, case)
                    counts[kind.name, how] += 1
                    if why:
                        failures.append(f"{case}: {how}\n{why}")
                        tell(failures[-1])
    logging.disable(logging.NOTSET)
    return counts, failures


def write_table(counts: Counter) -> str:
    """The counts as Markdown, a line for each kind."""
    ends = ("read", "refused", "traceback", "hang")
    lines = ["| files | tried | read all the same | refused | traceback | hang |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in counts):
        found = [counts[name, how] for how in ends]
        lines.append(f"| {name} | {sum(found):,} | {' | '.join(f'{n:,}' for n in found)} |")
    sums = [sum(n for (_, how), n in counts.items() if how == end) for end in ends]
    lines.append(f"| all | {sum(sums):,} | {' | '.join(f'{n:,}' for n in sums)} |")
    return "\n".join(lines)


def main() -> int:
    """Read the command line, run, print and write; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=250, help="cases of the rarest kind; of others up to 24 times as many"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the kinds' names")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no case begins later")
    parser.add_argument("--page", type=Path, help="keep the counts, and write those of all seeds into this page")
    asked = parser.parse_args()
    tally = Tally(HERE / "counts.jsonl", asked.page, "fuzz") if asked.page else None
    if tally:
        tally.refuse_again(asked.seed)
    tell = partial(print, flush=True)
    counts, failures = run_cases(asked.count, asked.seed, asked.only, asked.minutes, tell)
    tell(write_table(counts))
    if tally:
        tally.write(write_table(tally.add(asked.seed, counts)), f"at most {SECONDS} seconds a case")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
