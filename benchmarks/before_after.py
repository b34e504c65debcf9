"""Another commit's code against this one's, in turns, in one process: a training step, generation, a merge.

    python benchmarks/before_after.py COMMIT [--rounds 15] [--dtypes float32 bfloat16] [--merge-layers 30]

The other commit's package is unpacked under the name `doralib_before`. A ratio is this tree's time over its time, both
of the same round: above 1 this tree is slower. Exit status 1 where a median is above 1.02.
"""

import argparse
import importlib
import io
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import doralib
from doralib.experiments.bench.generate import Writer
from doralib.experiments.bench.measure import Neighbors, Turn, describe_machine, interleave
from doralib.experiments.bench.subjects import AdapterSettings, nudge, share_weights
from doralib.experiments.bench.workload import TrainingStep, base_model, token_batch
from doralib.files import write_json

STEPS = {"1x256": ((1, 256), {}), "4x256": ((4, 256), {})}
STEPS["1x256, exact dropout"] = (1, 256), {"lora_dropout": 0.05, "dropout_mode": "exact"}
ALLOWED = 1.02


def unpack(commit, folder):
    """The package as that commit has it, importable under another name."""
    archive = subprocess.run(["git", "archive", commit, "src/doralib"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    (folder / "src" / "doralib").rename(folder / "doralib_before")
    sys.path.insert(0, str(folder))
    return importlib.import_module("doralib_before")


def adapted(package, base, **changes):
    """The base's weights, shared, adapted by one of the packages from one seed."""
    torch.manual_seed(0)
    targets = AdapterSettings(16).targets
    config = package.DoraConfig(r=16, lora_alpha=32, target_modules=targets, **changes)
    return package.adapt(share_weights(base), config)


def find_merge(package):
    """`merge_checkpoint`, also where it was not public yet."""
    return (
        getattr(package, "merge_checkpoint", None)
        or importlib.import_module(f"{package.__name__}.merging").merge_checkpoint
    )


def ratio(turns, rounds):
    """Of this tree to the other."""
    return interleave(turns, rounds, 2).summary([("after", "before")])["ratios"]["after / before"]


def measure_dtype(packages, dtype, options):
    """Ratios of steps and of generation, with and without `unchanged`."""
    base, _ = base_model(None, options.layers, dtype)
    for name, (batch, changes) in STEPS.items():
        data = token_batch(base.config.vocab_size, *batch)
        steps = {key: TrainingStep(adapted(each, base, **changes), data) for key, each in packages.items()}
        yield f"step, {dtype}, {name}", ratio({key: Turn(step) for key, step in steps.items()}, options.rounds)
    prompt = token_batch(base.config.vocab_size, 1, 32)["input_ids"]
    for inside in ("", ", unchanged"):
        writers = {}
        for key, package in packages.items():
            model = adapted(package, base)
            nudge(model)
            writers[key] = Writer(model, prompt, 24, *([partial(package.unchanged, model)] if inside else []))
        turns = {key: Turn(each.write, each.read_prompt) for key, each in writers.items()}
        yield f"generation, {dtype}{inside}", ratio(turns, options.rounds)


def measure_merge(packages, folder, options):
    """The ratio of a merge of one adapter file into one checkpoint."""
    base, _ = base_model(None, options.merge_layers, "float32")
    base.save_pretrained(folder / "base")
    # the older code does not know what the newer may write
    model = adapted(packages["before"], base)
    nudge(model)
    packages["before"].save_adapter(model, folder / "adapter")
    del model, base

    def run(key):
        find_merge(packages[key])(folder / "adapter", folder / "base", folder / key)

    def clear(key):
        shutil.rmtree(folder / key, ignore_errors=True)

    return ratio({key: Turn(partial(run, key), partial(clear, key)) for key in packages}, options.rounds)


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--merge-layers", type=int, default=30, help="0: no merge")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    neighbors, cases = Neighbors(), {}

    def keep(name, found):
        cases[name] = found
        print(f"{name}: {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})", flush=True)

    with TemporaryDirectory() as temporary:
        packages = {"before": unpack(options.commit, Path(temporary)), "after": doralib}
        for dtype in options.dtypes:
            for name, found in measure_dtype(packages, dtype, options):
                keep(name, found)
        if options.merge_layers:
            keep("merge", measure_merge(packages, Path(temporary), options))
    where = {**describe_machine(), "cores_busy_elsewhere": neighbors.cores()}
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    write_json(options.out / "before_after.json", {"settings": settings, "machine": where, "after / before": cases})
    return int(any(found["median"] > ALLOWED for found in cases.values()))


sys.exit(main())
