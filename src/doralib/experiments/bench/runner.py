"""`doralib bench NAME`: run a measurement, write its JSON, its tables and its figure, show the tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...disk import replacing
from ...errors import UsageError, did_you_mean
from ...files import write_json
from ...runs.plots import new_figure
from . import options as settings
from .accelerate import bench_accelerate
from .adapt import bench_adapt
from .figures import write_bars
from .generate import bench_generate
from .layer import bench_layer
from .measure import Neighbors, describe_machine
from .memory import bench_memory
from .merge import bench_merge
from .profile import bench_profile
from .qdora import bench_qdora
from .rank import bench_rank
from .step import bench_step
from .subjects import import_peft
from .tables import Report, markdown

EVERYTHING = "all"


class Bench(NamedTuple):
    """A measurement and its settings."""

    options: type[settings.Options]
    measure: Callable[[Any], Report]


BENCHES = {
    "step": Bench(settings.StepOptions, bench_step),
    "layer": Bench(settings.LayerOptions, bench_layer),
    "memory": Bench(settings.MemoryOptions, bench_memory),
    "qdora": Bench(settings.QDoraOptions, bench_qdora),
    "rank": Bench(settings.RankOptions, bench_rank),
    "generate": Bench(settings.GenerateOptions, bench_generate),
    "adapt": Bench(settings.AdaptOptions, bench_adapt),
    "accelerate": Bench(settings.AccelerateOptions, bench_accelerate),
    "profile": Bench(settings.ProfileOptions, bench_profile),
    "merge": Bench(settings.MergeOptions, bench_merge),
}


def run_bench(
    name: str, out: str | Path, *, quick: bool = False, done: Callable[[Report], None] | None = None, **options: Any
) -> dict[str, Any]:
    """Measure; OUT/NAME.json, OUT/NAME.md and OUT/NAME.png are written, and what is in the JSON is returned.

    Args:
        name: A row of `BENCHES`, or "all": each takes those of the options that it knows; by name then.
        quick: Sizes for a look at the command, not for figures to quote; the options go before them.
        done: Gets each report once its files are written.

    Raises:
        UsageError: if there is no such measurement or option, before anything is run.
    """
    if name != EVERYTHING and name not in BENCHES:
        names = [*BENCHES, EVERYTHING]
        raise UsageError(f"bench: there is no {name!r}{did_you_mean(name, names)}; known: {', '.join(names)}")
    # without matplotlib or PEFT, say so now and not in half an hour
    new_figure()
    import_peft()
    chosen = {name: BENCHES[name]} if name != EVERYTHING else BENCHES
    _refuse_unknown(chosen, options)
    checked = {}
    for key, bench in chosen.items():
        own = {field: value for field, value in options.items() if field in bench.options.model_fields}
        checked[key] = bench.options(**({**bench.options.QUICK, **own} if quick else own))
    values = {}
    for key, bench in chosen.items():
        report, values[key] = _run(bench, checked[key], Path(out))
        if done is not None:
            done(report)
    return values if name == EVERYTHING else values[name]


def _refuse_unknown(chosen: dict[str, Bench], options: dict[str, Any]) -> None:
    known = {field for bench in chosen.values() for field in bench.options.model_fields}
    wrong = [f"{key!r}{did_you_mean(key, known)}" for key in options if key not in known]
    if wrong:
        raise UsageError(
            f"bench {'/'.join(chosen)}: there is no option {', '.join(wrong)}; known: {', '.join(sorted(known))}"
        )


def _run(bench: Bench, options: settings.Options, out: Path) -> tuple[Report, dict[str, Any]]:
    # asked before the measurement, which loads the machine itself
    where, neighbors = describe_machine(), Neighbors()
    report = bench.measure(options)
    where["cores_busy_elsewhere"] = neighbors.cores()
    value = report.to_json(where)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{report.name}.json", value)
    with replacing(out / f"{report.name}.md") as part:
        part.write_text(markdown(report, where), encoding="utf-8")
    write_bars(report.bars, out / f"{report.name}.png")
    return report, value
