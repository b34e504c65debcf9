"""What large things take: a model of many layers, a large file, the start of a run of many rows, an analysis of wide
layers. Writes JSON.

    python benchmarks/bounds.py [--layers 10000] [--gib 2] [--rows 1000000] [--tokenizer FOLDER] [--wide 2]

Seconds are those of the processor, but for the start of a run, whose tokenizing is shared by all cores: these are the
clock's. FOLDER is a model's, of which the tokenizer is taken: by default that which `make demo` fetches.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from torch import nn

import doralib
from doralib.cli.demo_assets import DEFAULT_CACHE
from doralib.data.rows import read_dataset
from doralib.experiments.bench.llama_files import write_model
from doralib.experiments.bench.measure import describe_machine
from doralib.files import write_json
from doralib.recipe import Recipe
from doralib.training.job import look_ahead

WORDS = "a slow start but by the end I did not want it to stop " * 17


def measure_layers(count):
    """Seconds of the processor to adapt, save, load and merge a model of so many small layers."""
    make = lambda: nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)}) for _ in range(count))
    model, other, seconds = make(), make(), {}
    config = doralib.DoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "adapt": lambda: doralib.adapt(model, config),
            "save": lambda: doralib.save_adapter(model, folder),
            "load": lambda: doralib.load_adapter(other, folder),
            "merge": lambda: doralib.merge(other),
        }
        for name, step in steps.items():
            begun = time.process_time()
            step()
            seconds[name] = round(time.process_time() - begun, 2)
    return {"layers": count, "seconds": seconds}


def read_anonymous():
    """Bytes of this process's memory that no file stands behind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def measure_rows(gib):
    """Bytes of memory that reading a JSONL of so many GiB takes, and the processor's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path, number = Path(folder) / "rows.jsonl", 0
        with path.open("w") as file:
            while file.tell() < gib * 2**30:
                file.write(json.dumps({"prompt": f"{number} {WORDS}", "target": "yes"}) + "\n")
                number += 1
        before, begun, peak = read_anonymous(), time.process_time(), 0
        rows = read_dataset(str(path), "data.train")
        for i in range(0, len(rows), 1000):
            rows[i : i + 1000]
            peak = max(peak, read_anonymous() - before)
        return {"rows": number, "gib": gib, "more_bytes": peak, "seconds": round(time.process_time() - begun, 1)}


def measure_start(tokenizer, count):
    """Seconds until a run of so many rows would take its first step: at first, and with tokens that are kept."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        words = AutoTokenizer.from_pretrained(tokenizer)
        words.save_pretrained(folder)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
        rows, seconds = Path(folder) / "rows.jsonl", []
        with rows.open("w") as file:
            for i in range(count):
                row = {"text": f"{i} a slow start but by the end", "label": ("good", "bad")[i % 2]}
                file.write(json.dumps(row) + "\n")
        recipe = Recipe(
            model={"path": folder},
            data={"train": str(rows), "prompt": "{text}:", "target": " {label}"},
            adapter={"target_modules": ["q_proj"]},
            out=f"{folder}/run",
        )
        for _ in range(2):
            begun = time.perf_counter()
            ahead = look_ahead(recipe)
            seconds.append(round(time.perf_counter() - begun, 1))
        first, again = seconds
        return {"rows": count, "steps_an_epoch": ahead.steps_an_epoch, "seconds": {"first": first, "again": again}}


_ANALYZE = """
import atexit
from doralib.cli.main import main
from doralib.process import read_peak_memory
atexit.register(lambda: print(read_peak_memory()))
main()
"""


def measure_analysis(count):
    """Bytes of memory that the process of `doralib analyze` holds at most, for layers as wide as LLaMA-3-8B's."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = write_model(Path(folder), count)
        peaks, begun = {}, time.perf_counter()
        # how far they moved does not matter, so the base stands for its own fine-tune
        for name, tuned in {"adapter": adapter, "full": base}.items():
            command = [sys.executable, "-c", _ANALYZE, "analyze", base, tuned, "--out", f"{folder}/{name}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[name] = int(done.stdout.split()[-1])
        return {"layers": count, "peak_bytes": peaks, "seconds": round(time.perf_counter() - begun, 1)}


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10_000)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_CACHE.expanduser() / "SmolLM2-135M-Instruct")
    parser.add_argument("--wide", type=int, default=2)
    parser.add_argument("--only", choices=["layers", "rows", "start", "analysis"], nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    measures = {
        "layers": lambda: measure_layers(options.layers),
        "rows": lambda: measure_rows(options.gib),
        "start": lambda: measure_start(options.tokenizer, options.rows),
        "analysis": lambda: measure_analysis(options.wide),
    }
    path = options.out / "bounds.json"
    # what is not measured stays as it was measured before
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.only or measures:
        found[name] = {**measures[name](), "machine": describe_machine()}
    print(json.dumps(found, indent=1))
    write_json(path, found)


main()
