"""Kill a verb, or fill its disk, at each call that changes a file; do it again; see that nothing was lost.

`python tests/kills/harness.py [--tries N] [--seed S] [--minutes M] [--only PATTERN] [--page docs/reliability.md]`
prints a line for each failure and a table of what was tried; the page's table sums all seeds. It needs Linux and a C
compiler. Each try is a fork of one process that has torch and all else in memory.
"""

import argparse
import ctypes
import errno
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
KILL, FULL, QUOTA = 0, errno.ENOSPC, errno.EDQUOT
WORDS = {KILL: "killed", FULL: "disk full", QUOTA: "disk full"}
UNEXPECTED = 99
_LONGEST = 300  # seconds; a child that takes longer hangs


def compile_trap(folder: Path) -> Path:
    """The library that strikes, made by the machine's C compiler."""
    library = folder / "trap.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "trap.c", "-ldl"], check=True)
    return library


def start(arguments: Sequence[str]) -> int:
    """Run this file again with the trap loaded; its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LD_PRELOAD": str(compile_trap(Path(folder))), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
        return subprocess.run([sys.executable, __file__, *arguments], env=environment, check=False).returncode


def run_tries(tries: int, seed: int, only: str = "", minutes: float = math.inf) -> tuple[Counter, list[str]]:
    """Try each scenario at some of its places, each try with a kill or a full disk; counts and failures.

    Args:
        tries: Of each scenario and each kind of harm; 0: at every place.
        seed: Of the choice of places.
        only: A regular expression, found in the names of the scenarios to try.
        minutes: No try begins later; scenarios take turns.
    """
    import worlds  # the models and all of transformers: only where the trap is loaded

    counts: Counter = Counter()
    failures: list[str] = []
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="doralib-kills-") as name:
        os.environ["HF_DATASETS_CACHE"] = name
        root = Path(name)
        (root / "world").mkdir()
        worlds.build(root / "world")
        found = [each for each in worlds.list_scenarios(root / "world") if re.search(only, f"{each.verb} {each.what}")]
        turns = [(each, _try_scenario(each, root / f"of-{i}", tries, seed, counts)) for i, each in enumerate(found)]
        while turns and time.monotonic() < end:
            scenario, places = turns.pop(0)
            if (tried := next(places, None)) is None:
                continue
            turns.append((scenario, places))
            harm, place, wrong = tried
            counts[scenario.verb, scenario.what, WORDS[harm], "tried"] += 1
            counts[scenario.verb, scenario.what, WORDS[harm], "failed"] += bool(wrong)
            if wrong:
                failures.append(f"{scenario.verb} {scenario.what}: {WORDS[harm]} at call {place}: {wrong}")
                print(failures[-1], flush=True)  # noqa: T201
    return counts, failures


def _try_scenario(scenario, root: Path, tries: int, seed: int, counts: Counter) -> Iterator[tuple[int, int, str]]:
    first, place = root / "start", root / "work"
    first.mkdir(parents=True)
    _must(_in_child(lambda: scenario.prepare(first)))
    before = scenario.outcome(first) if any(first.iterdir()) else {"files": {}}
    _copy(first, place)
    status, total = _in_child(lambda: scenario.act(place), place)
    _must((status, total))
    counts[scenario.verb, scenario.what, "places"] = total
    reference = scenario.outcome(place)
    draw = random.Random(f"{seed} {scenario.verb} {scenario.what}")
    orders = [draw.sample(range(total), min(tries or total, total)) for _ in range(2)]
    for places in zip(*orders, strict=True):
        for harm, at in zip((KILL, draw.choice([FULL, QUOTA])), places, strict=True):
            _copy(first, place)
            yield harm, at, _harm(scenario, place, harm, at, before, reference)


def _harm(scenario, place: Path, harm: int, at: int, before: object, reference: object) -> str:
    """What is wrong after one try; empty if nothing is."""
    status, said = _in_child(lambda: scenario.act(place), place, at, harm)
    if harm == KILL and status == -9:
        wrong = scenario.check(place, before, reference)
    elif harm != KILL and status == 1:
        wrong = ""
    elif harm != KILL and status == 0:
        # no write was left to be done
        wrong = "" if scenario.outcome(place) == reference else "it says nothing of the full disk"
    else:
        wrong = f"ended with status {status}: {said}"
    if wrong:
        return wrong
    status, said = _in_child(lambda: scenario.again(place), place)
    if status:
        return f"cannot be done again (status {status}): {said}"
    found = scenario.outcome(place)
    return "" if found == reference else f"another outcome: {_name_difference(found, reference)}"


def _in_child(
    act: Callable[[], None], folder: Path | None = None, at: int = -1, harm: int = KILL
) -> tuple[int, object]:
    """Run in a fork, with the trap armed; the exit status, and the number of calls or the error's text."""
    read, write = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(_act(act, folder, at, harm, write))
    write.close()
    said = _wait_for_words(read, child)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said


def _act(act: Callable[[], None], folder: Path | None, at: int, harm: int, write) -> int:
    from doralib.errors import DoraError

    trap = ctypes.CDLL(None)
    try:
        if folder is not None:
            trap.trap_arm(os.fsencode(folder), ctypes.c_long(at), harm)
        act()
        write.send(int(trap.trap_count()))
        return 0
    except (DoraError, OSError) as error:
        # the command line prints both as one message
        write.send(f"{type(error).__name__}: {error}")
        return getattr(error, "exit_status", 1)
    except SystemExit as stop:
        write.send(str(stop))
        return int(stop.code or 0)
    except BaseException:  # noqa: BLE001  # what a user would see as a traceback
        write.send(traceback.format_exc()[-1500:])
        return UNEXPECTED


def _wait_for_words(read, child: int) -> object:
    if not read.poll(_LONGEST):
        os.kill(child, 9)
        return "it hangs"
    try:
        return read.recv()
    except EOFError:
        return ""


def _must(done: tuple[int, object]) -> None:
    if done[0]:
        raise SystemExit(f"without any harm it fails: {done[1]}")


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def _name_difference(found: object, reference: object) -> str:
    if isinstance(found, dict) and isinstance(reference, dict):
        keys = [key for key in {**reference, **found} if found.get(key) != reference.get(key)]
        return ", ".join(f"{key} ({_name_difference(found.get(key), reference.get(key))})" for key in keys)
    return f"{str(found)[:150]} for {str(reference)[:150]}"


def write_table(counts: Counter) -> str:
    """The counts as Markdown, a line for each scenario and one of their sums."""
    kinds = [("places",), *((harm, kind) for harm in ("killed", "disk full") for kind in ("tried", "failed"))]
    lines = ["| verb | what | places | killed | failed | disk full | failed |", "|---|---|---|---|---|---|---|"]
    for verb, what in dict.fromkeys(key[:2] for key in counts):
        lines.append(f"| {verb} | {what} | {' | '.join(str(counts[verb, what, *kind]) for kind in kinds)} |")
    sums = [sum(n for key, n in counts.items() if key[2:] == kind) for kind in kinds]
    return "\n".join([*lines, f"| all | | {' | '.join(map(str, sums))} |"])


def main() -> int:
    """Read the command line, run, print and write; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=0, help="of each scenario and kind of harm; 0: at every place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression, found in a scenario's name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no try begins later")
    parser.add_argument("--page", type=Path, help="keep the counts, and write those of all seeds into this page")
    asked = parser.parse_args()
    if "trap.so" not in os.environ.get("LD_PRELOAD", ""):
        return start(sys.argv[1:])
    from tally import Tally

    tally = Tally(HERE / "counts.jsonl", asked.page, "kills") if asked.page else None
    if tally:
        tally.refuse_again(asked.seed)
    counts, failures = run_tries(asked.tries, asked.seed, asked.only, asked.minutes)
    print(write_table(counts))  # noqa: T201
    if tally:
        tally.write(write_table(tally.add(asked.seed, counts)), "as many places as there was time for")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
