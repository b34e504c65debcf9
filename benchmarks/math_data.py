"""Rows of word problems for the recipes orca-math/... and gsm/...: a question, and an answer that ends with a number.

    python benchmarks/math_data.py gsm --out gsm            needs `pip install reasoning-gym` (Apache-2.0)
    python benchmarks/math_data.py orca --out orca-math     needs the Hugging Face hub

gsm: train.jsonl; test.jsonl, of templates that are in no other file; seen.jsonl, other rows of the trained templates.
orca: microsoft/orca-math-word-problems-200k shuffled with seed 42: its first 100,000 rows, and 500 of its last 5,000.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from doralib.disk import replacing
from doralib.errors import UsageError
from doralib.evaluation.numbers import read_number

HELD_OUT = 0.2


def write_gsm(out: Path, *, train: int, test: int, seed: int) -> None:
    """GSM-like problems; a fifth of the templates is held out."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError(f"the problems are made by reasoning-gym: pip install reasoning-gym ({error})") from None
    made = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=8 * (train + 2 * test))
    templates = sorted(set(made.task_indices))
    held_out = set(Random(seed).sample(templates, round(HELD_OUT * len(templates))))
    rows = {name: [] for name in ("train", "seen", "test")}
    wanted = {"train": train, "seen": test, "test": test}
    for row in read_gsm(made):
        names = ("test",) if row["template"] in held_out else ("seen", "train")
        name = next((name for name in names if len(rows[name]) < wanted[name]), None)
        if name is not None:
            rows[name].append(row)
        if all(len(rows[name]) == wanted[name] for name in rows):
            break
    for name, found in rows.items():
        write_rows(out / f"{name}.jsonl", found)
        print(f"{out / name}.jsonl: {len(found)} rows of {len({row['template'] for row in found})} templates")


def read_gsm(made: Any) -> Iterator[dict[str, Any]]:
    """Problems with their worked answers and the number of their template; each question once."""
    seen: set[str] = set()
    for index, template in enumerate(made.task_indices):
        problem = made[index]
        question, answer = problem["question"], problem["metadata"].get("answer_cot") or ""
        # a worked answer that ends with another number teaches a mistake
        if question in seen or not answer or read_number(answer) != read_number(str(problem["answer"])):
            continue
        seen.add(question)
        yield {"question": question, "answer": answer, "template": template}


def write_orca(out: Path, *, train: int, test: int, seed: int) -> None:
    """Answer.AI's split: the first rows to train on, the first of the last 5,000 to test."""
    from datasets import load_dataset

    rows = load_dataset("microsoft/orca-math-word-problems-200k", split="train").shuffle(seed=seed)
    last = range(len(rows) - 5000, len(rows) - 5000 + test)
    for name, numbers in (("train", range(train)), ("test", last)):
        write_rows(out / f"{name}.jsonl", rows.select(numbers))
        print(f"{out / name}.jsonl: {len(numbers)} rows")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, all of them or none."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


WRITERS = {"gsm": (write_gsm, 4000, 500, 0), "orca": (write_orca, 100_000, 500, 42)}


def main() -> None:
    """Read the command line, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", choices=WRITERS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    for name in ("train", "test", "seed"):
        parser.add_argument(f"--{name}", type=int)
    given = vars(parser.parse_args())
    write, *usual = WRITERS[given["rows"]]
    counts = dict(zip(("train", "test", "seed"), usual, strict=True))
    counts |= {name: given[name] for name in counts if given[name] is not None}
    try:
        write(given["out"], **counts)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
