"""What each mechanism for speed is worth: a training step and generation with and without it, in turns.

    python benchmarks/ablation.py [--rounds 15] [--dtypes float32 bfloat16] [--sequences 1 4]

A ratio is the time without the mechanism over the time with it, both of the same round; above 1 it saves time. A
mechanism stays where it saves 3 % of a step or of generation (docs/bench.md).
"""

import argparse
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from doralib.experiments.bench.generate import Writer
from doralib.experiments.bench.measure import Neighbors, Turn, describe_machine, interleave
from doralib.experiments.bench.subjects import AdapterSettings, build, nudge
from doralib.experiments.bench.workload import TrainingStep, base_model, token_batch
from doralib.files import write_json
from doralib.kernels import copies, eager, reductions
from doralib.kernels.operands import Operands
from doralib.layers.linear import DoraLinear

WITH = "with all"


@contextmanager
def each_layer_alone(model):
    """Every cache renews itself when its own layer computes."""
    caches = [m.cache for m in model.modules() if isinstance(m, DoraLinear)]
    groups = [each.group for each in caches]
    for each in caches:
        each.group = None
    yield
    for each, group in zip(caches, groups, strict=True):
        each.group = group


MECHANISMS = {
    "all layers renewed together": each_layer_alone,
    "memcmp": lambda _: mock.patch.object(copies, "_memcmp", None),
    "factors by columns": lambda _: mock.patch.object(Operands, "with_columns", lambda self: self),
    "batch normalization's backward": lambda _: mock.patch.object(reductions, "_sweep", reductions.plain_sweep),
    "effective weight": lambda _: mock.patch.object(eager, "_ROWS_PER_FEATURE", float("inf")),
}
OF_A_STEP = ("all layers renewed together", "memcmp", "batch normalization's backward", "effective weight")
OF_GENERATION = ("memcmp", "factors by columns")


def without(name, model):
    """Take a mechanism away inside a with block."""
    return MECHANISMS[name](model) if name in MECHANISMS else nullcontext()


def measure_step(dtype, batch, options):
    """Ratios of a training step."""
    base, _ = base_model(None, options.layers, dtype)
    model = build("ours-dora", base, AdapterSettings(16))
    step = TrainingStep(model, token_batch(base.config.vocab_size, *batch))

    def run(name):
        with without(name, model):
            step()

    return ratios({name: Turn(lambda name=name: run(name)) for name in (WITH, *OF_A_STEP)}, options)


def measure_generation(dtype, options):
    """Ratios of 24 tokens, one by one; the factors are new in each turn."""
    base, _ = base_model(None, options.layers, dtype)
    model = build("ours-dora", base, AdapterSettings(16))
    writer = Writer(model, token_batch(base.config.vocab_size, 1, 32)["input_ids"], 24)

    def prepare(name):
        nudge(model)
        with without(name, model):
            writer.read_prompt()

    def run(name):
        with without(name, model):
            writer.write()

    names = (WITH, *OF_GENERATION)
    return ratios({name: Turn(lambda n=name: run(n), lambda n=name: prepare(n)) for name in names}, options)


def ratios(turns, options):
    """Of each turn to the one with all mechanisms."""
    rounds = interleave(turns, options.rounds, 2)
    found = rounds.summary([(name, WITH) for name in turns if name != WITH])["ratios"]
    return {pair.removesuffix(f" / {WITH}"): ratio for pair, ratio in found.items()}


def show(name, found):
    """A case in one line."""
    shares = [f"{what} {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for what, r in found.items()]
    print(f"{name}: {'; '.join(shares)}", flush=True)


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 4], help="of 256 tokens, in a step")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    neighbors, cases = Neighbors(), {}
    for dtype in options.dtypes:
        for sequences in options.sequences:
            cases[f"step, {dtype}, {sequences}x256 tokens"] = measure_step(dtype, (sequences, 256), options)
        cases[f"generation, {dtype}"] = measure_generation(dtype, options)
        for name in [name for name in cases if dtype in name]:
            show(name, cases[name])
    where = {**describe_machine(), "cores_busy_elsewhere": neighbors.cores()}
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    write_json(options.out / "ablation.json", {"settings": settings, "machine": where, "cases": cases})


main()
