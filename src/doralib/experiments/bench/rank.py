"""How a training step's time grows with the rank."""

from .measure import Turn, interleave, log
from .options import RankOptions
from .step import build_steps
from .subjects import REFERENCE, AdapterSettings, check_subjects
from .tables import Bars, Report, Table, make_bars, ms, ratio_goals, ratio_text, ratios_to
from .workload import base_model

SUBJECTS = (REFERENCE, "ours-dora")


def bench_rank(options: RankOptions) -> Report:
    """Seconds of a training step at each rank, all ranks and methods in turn."""
    names, ranks = check_subjects(options.subjects or SUBJECTS), options.ranks
    at = [(name, r) for r in ranks for name in names]
    lowest = f"{REFERENCE} r{min(ranks)}"
    pairs = [(f"{name} r{r}", f"{REFERENCE} r{r}") for name, r in at if name != REFERENCE]
    pairs += [(f"{name} r{r}", lowest) for name, r in at if f"{name} r{r}" != lowest]
    report = Report(
        "rank",
        "A training step by rank",
        options.model_dump(mode="json"),
        Bars("Training step by rank", f"time / time of {REFERENCE} at the lowest rank in the same round"),
        ["a shortened model's vocabulary is shortened by the same factor, so the head keeps its share of the work"],
    )
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        for tokens in options.tokens:
            title = f"{dtype}, {tokens} tokens"
            log.info(f"rank: {title}")
            turns = {
                f"{name} r{r}": Turn(step)
                for r in ranks
                for name, step in build_steps(base, names, AdapterSettings(r), tokens).items()
            }
            found = interleave(turns, options.rounds, options.warmup).summary(dict.fromkeys(pairs))
            case = {"name": title, "settings": {"dtype": dtype, "tokens": tokens, **described}, **found}
            table = Table(title, ["subject", "r", "median ms", f"/ {REFERENCE} at this r", f"/ {lowest}"])
            for name, r in at:
                over = [ratio_text(case, f"{name} r{r}", under) for under in (f"{REFERENCE} r{r}", lowest)]
                table.rows.append([name, str(r), ms(case["seconds"][f"{name} r{r}"]["median"]), *over])
            ratios = ratios_to(lowest, case["ratios"])
            bars = {
                f"{title}, r {r}": make_bars({n: ratios[f"{n} r{r}"] for n in names if f"{n} r{r}" in ratios})
                for r in ranks
            }
            limits = {f"ours-dora r{r} / {REFERENCE} r{r}": 1.1 for r in ranks}
            report.add(case, table, bars=bars, goals=ratio_goals(case, limits))
    return report
