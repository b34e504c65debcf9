"""Everything that needs a GPU in one run: correctness against float64, tile sizes, the norm, layers, whole blocks.

    python benchmarks/gpu.py --out results [--part checks,ceilings,...] [--seconds 540] [--dry-run]

Each row is written to gpu.json the moment it is measured, so a run that is cut off loses nothing; gpu.md holds the
tables. ``--dry-run`` goes the same way on the CPU, with tiny sizes under Triton's interpreter.
"""

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

PARTS = {
    "checks": "kernels.checks",
    "ceilings": "kernels.ceilings",
    "tune": "kernels.tune",
    "norm": "kernels.norm",
    "layers": "layers.layers",
    "blocks": "blocks.blocks",
    "graphs": "layers.graphs",
    "compile": "kernels.compiled",
    "nf4": "layers.nf4",
}


def main() -> int:
    """Run the parts asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--part", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=540, help="start no row after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    parser.add_argument("--share", default="", help="internal: K/N compiles every N-th tile for the tuning part")
    args = parser.parse_args()
    parts = args.part.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]
    from gpu_parts import kernels

    if args.share:
        kernels.compile_share(*map(int, args.share.split("/")))
        return 0
    from gpu_parts import tables
    from gpu_parts.bench import Bench

    bench = Bench(Path(args.out), args.dry_run, args.seconds)
    failed = []
    for part in parts:
        bench.say(f"== {part}")
        try:
            module, name = PARTS[part].split(".")
            getattr(importlib.import_module(f"gpu_parts.{module}"), name)(bench)
        except Exception as error:  # noqa: BLE001 - the other parts still count; the failure is recorded
            failed.append(part)
            bench.record("failures", part=part, error=repr(error), trace=traceback.format_exc()[-3000:])
            bench.say(traceback.format_exc())
        bench.flush()
        tables.write(bench.data, bench.out / "gpu.md")
    print((bench.out / "gpu.md").read_text())
    bench.say(f"parts that failed: {failed or 'none'}; {bench.elapsed():.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
