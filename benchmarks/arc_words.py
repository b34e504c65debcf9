"""ARC's questions with their answers in words, to compare methods on a small model: rows, a task and a recipe.

    python benchmarks/arc_words.py DATASET/ARC-Easy --out arc      LLM-Adapters' folder of train.json and test.json
    doralib compare arc/recipe.yaml --methods lora,dora --lrs 3e-4,1e-3,3e-3 --seeds 0,1,2 --tune-seeds 3 \\
                    --out arc-compared

LLM-Adapters asks for `answer3`. Here the answer is the choice's own text, and the likeliest of a row's choices counts,
as in lm-eval's task arc_easy.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from doralib.disk import replacing
from doralib.errors import UsageError

INSTRUCTION = re.compile(
    r"correct answer to the question: (?P<question>.*?)\s*(?P<choices>Answer1: .*?)\s*Answer format:", re.DOTALL
)
CHOICE = re.compile(r"\s*Answer\d+: ")

RECIPE = """\
# ARC's questions on SmolLM2-135M: the answer in its own words. Made by benchmarks/arc_words.py.
model: {{path: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: bfloat16}}
data:
  train: {out}/train.jsonl
  validation: 0.1
  style: completion
  prompt: "Question: {{question}}\\nAnswer:"
  target: " {{answer}}"
  max_length: 256
adapter: {{method: dora, r: 8, lora_alpha: 16, target_modules: all-linear}}
training:
  learning_rate: 1.0e-3
  max_steps: 120
  per_device_train_batch_size: 8
  lr_scheduler_type: cosine
  warmup_steps: 10
  weight_decay: 0.0
  train_sampling_strategy: group_by_length
  eval_strategy: steps
  eval_steps: 60
seed: 0
eval: {{tasks: [{out}/arc_words.yaml]}}
out: runs/arc
"""
TASK = """\
# Made by benchmarks/arc_words.py.
kind: choice
data: test.jsonl
prompt: "Question: {question}\\nAnswer:"
choices: choices
answer: answer
"""


def read_question(row: dict[str, Any]) -> dict[str, Any]:
    """A row of LLM-Adapters as its question, its choices and the text of the right one.

    Raises:
        UsageError: The row is not of this form.
    """
    match = INSTRUCTION.search(row["instruction"])
    if match is None:
        raise UsageError(f"no question with choices: {row['instruction']!r:.200}")
    choices = [choice.strip() for choice in CHOICE.split(match["choices"])[1:]]
    number = int(row["answer"].removeprefix("answer"))
    if not 1 <= number <= len(choices):
        raise UsageError(f"answer {number} of {len(choices)} choices: {row['instruction']!r:.200}")
    return {"question": match["question"], "choices": choices, "answer": choices[number - 1]}


def write_rows(source: Path, path: Path, count: int | None) -> int:
    """The first `count` rows of a file, all of them or none; return how many."""
    rows = [read_question(row) for row in json.loads(source.read_text(encoding="utf-8"))[:count]]
    with replacing(path) as part, part.open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return len(rows)


def main() -> None:
    """Read the command line, write rows, task and recipe."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with LLM-Adapters' train.json and test.json of ARC")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--test", type=int, default=500, help="rows of the test that are asked (500)")
    asked = parser.parse_args()
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        trained = write_rows(asked.data / "train.json", asked.out / "train.jsonl", None)
        tested = write_rows(asked.data / "test.json", asked.out / "test.jsonl", asked.test)
        (asked.out / "arc_words.yaml").write_text(TASK, encoding="utf-8")
        (asked.out / "recipe.yaml").write_text(RECIPE.format(out=asked.out), encoding="utf-8")
    except (UsageError, OSError) as error:
        parser.error(str(error))
    print(f"{trained} rows to train on, {tested} to test; the recipe is {asked.out / 'recipe.yaml'}")


if __name__ == "__main__":
    main()
