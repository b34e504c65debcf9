"""Counts of a harness's runs, kept a line a run, and their sum as a table of a page.

A seed is counted once. When a fault is mended the file is begun anew: what older code did says nothing of the new.
"""

import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from doralib.runs.machine import cpu_name


class Tally(NamedTuple):
    """Where a harness keeps its counts, and the page that shows them.

    Args:
        kept: a file of JSON lines, one for each run.
        page: Markdown with ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
        name: of the two marks.
    """

    kept: Path
    page: Path
    name: str

    def read(self) -> list[dict]:
        """The runs counted so far."""
        return [json.loads(line) for line in self.kept.read_text().splitlines()] if self.kept.exists() else []

    def refuse_again(self, seed: int) -> None:
        """End the program if the seed is counted already: its cases would be counted twice."""
        if seed in (seeds := [run["seed"] for run in self.read()]):
            raise SystemExit(f"{self.kept} has seed {seed} already; take another, such as SEED={max(seeds) + 1}")

    def add(self, seed: int, counts: Counter) -> Counter:
        """Keep a run's counts, whose keys are tuples of words; the sum over all runs.

        Of a count named "places", which is the same for every run, the newest stands in place of a sum.
        """
        run = {"date": time.strftime("%Y-%m-%d"), "commit": _commit(), "machine": cpu_name(), "cores": os.cpu_count()}
        run |= {"seed": seed, "counts": [[*key, n] for key, n in counts.items()]}
        with self.kept.open("a") as file:
            file.write(json.dumps(run) + "\n")
        total: Counter = Counter()
        for run in self.read():
            for *key, n in run["counts"]:
                total[tuple(key)] = n if key[-1] == "places" else total[tuple(key)] + n
        return total

    def write(self, table: str, how: str) -> None:
        """Put the table, under a line that says what it sums, between the page's two marks."""
        runs = self.read()
        days = sorted({run["date"] for run in runs})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        machines = "; ".join(sorted({f"{run['machine']}, {run['cores']} cores" for run in runs}))
        seeds = ", ".join(str(run["seed"]) for run in runs)
        begin, end = f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"
        head, _, rest = self.page.read_text(encoding="utf-8").partition(begin)
        text = f"{when}, {machines}, {'seed' if len(runs) == 1 else 'seeds'} {seeds}, {how}:\n\n{table}"
        self.page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _commit() -> str:
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    # a copy without its history has no commit
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
