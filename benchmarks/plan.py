"""What `doralib plan` says beside what `doralib train` takes, each in a process of its own; Linux only.

    python benchmarks/plan.py MODEL [--out benchmarks/results/busy/plan.json] [--only NAME ...]
    python benchmarks/plan.py --recipe RECIPE [KEY=VALUE ...]

MODEL is a folder, such as that of SmolLM2-135M-Instruct which `make demo` fetches: a few sizes of batch are tried.
With --recipe a job of any kind is tried; give it a few steps (training.max_steps=4).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from doralib.experiments.bench.measure import describe_machine
from doralib.files import write_json

CASES = {
    "float32, 1 x 64": {"rows": 1, "words": 50},
    "float32, 4 x 128": {"rows": 4, "words": 110},
    "checkpointing, 4 x 128": {"rows": 4, "words": 110, "training.gradient_checkpointing": "true"},
    "bfloat16, 4 x 128": {"rows": 4, "words": 110, "model.dtype": "bfloat16"},
}
# run in a process of its own: the highest mark of its memory, and seconds of each step
_MEASURE = """
import json, sys
from doralib.process import read_peak_memory
from doralib.training.job import fine_tune
from doralib.training.recipe_file import read_recipe
run = fine_tune(read_recipe(sys.argv[1], sys.argv[2:]), overwrite=True)
seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
print(json.dumps({"peak_bytes": read_peak_memory(), "seconds": [b - a for a, b in zip(seconds, seconds[1:])]}))
"""


def measure(model: str, case: dict) -> dict:
    """One case, planned and measured."""
    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = Path(folder) / "rows.jsonl", Path(folder) / "recipe.json.yaml"
        rows.write_text('{"text": "%s", "label": "good"}\n' % ("a word " * (case["words"] // 2)) * 32)
        values = {
            "model": {"path": model},
            "data": {"train": str(rows), "prompt": "{text}:", "target": " {label}"},
            "adapter": {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]},
            "training": {"max_steps": 4, "per_device_train_batch_size": case["rows"]},
        }
        recipe.write_text(json.dumps(values))
        return measure_recipe(str(recipe), [f"{key}={value}" for key, value in case.items() if "." in key])


def measure_recipe(recipe: str, changes: list[str]) -> dict:
    """A job, planned and measured."""
    with tempfile.TemporaryDirectory() as folder:
        changes = ["training.logging_steps=1", "eval.before=false", f"out={folder}/run", *changes]
        planned = run("-m", "doralib", "plan", recipe, *changes, "--json")
        measured = run("-c", _MEASURE, recipe, *changes)
    found = {
        "planned_bytes": planned["peak_bytes"],
        "measured_bytes": measured["peak_bytes"],
        "bytes_ratio": planned["peak_bytes"] / measured["peak_bytes"],
    }
    if planned["seconds_per_step"] is None:
        return found
    seconds = statistics.median(measured["seconds"])
    return found | {
        "planned_seconds": planned["seconds_per_step"],
        "measured_seconds": seconds,
        "seconds_ratio": planned["seconds_per_step"] / seconds,
    }


def run(*arguments: str) -> dict:
    """The JSON object at the end of what a Python process prints."""
    out = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout
    return json.loads(out[out.index("{\n") if "{\n" in out else out.rindex('{"') :])


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", help="MODEL, or KEY=VALUE after --recipe")
    parser.add_argument("--recipe")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/busy/plan.json"))
    options = parser.parse_args()
    if options.recipe:
        print(json.dumps(measure_recipe(options.recipe, options.given)))
        return
    found = {"machine": describe_machine(), "cases": {}}
    for name in options.only:
        found["cases"][name] = measure(*options.given, CASES[name])
        print(name, json.dumps(found["cases"][name]), flush=True)
        write_json(options.out, found)


if __name__ == "__main__":
    main()
