"""How a training step's time grows with the rank."""

from typing import Any

from torch import nn

from .measure import Turn, interleave, log
from .options import RankOptions, batch_of
from .subjects import REFERENCE, AdapterSettings, build, check_subjects
from .tables import Bar, Bars, Goal, Report, Table, ms, ratio_text
from .workload import TrainingStep, base_model, token_batch

SUBJECTS = (REFERENCE, "ours-dora")


def bench_rank(options: RankOptions) -> Report:
    """Seconds of a training step at each rank, all ranks and methods in turn."""
    names = check_subjects(options.subjects or SUBJECTS)
    cases: list[dict[str, Any]] = []
    bars = Bars("Training step by rank", f"time / time of {REFERENCE} at the lowest rank in the same round")
    tables = []
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        for tokens in options.tokens:
            name = f"{dtype}, {tokens} tokens"
            log.info(f"rank: {name}")
            summary = _case(base, tokens, names, options)
            cases.append({"name": name, "settings": {"dtype": dtype, "tokens": tokens, **described}, **summary})
            tables.append(_table(name, summary, names, options.ranks))
            bars.groups |= _bars(name, summary, names, options.ranks)
    return Report(
        "rank",
        "A training step by rank",
        options.model_dump(mode="json"),
        cases,
        tables,
        bars,
        [goal for case in cases for goal in _goals(case, options.ranks)],
        ["a shortened model's vocabulary is shortened by the same factor, so the head keeps its share of the work"],
    )


def _case(base: nn.Module, tokens: str, names: list[str], options: RankOptions) -> dict[str, Any]:
    batch = token_batch(base.config.vocab_size, *batch_of(tokens))  # type: ignore[union-attr, arg-type]
    turns = {
        _at(name, r): Turn(TrainingStep(build(name, base, AdapterSettings(r)), batch))
        for r in options.ranks
        for name in names
    }
    rounds = interleave(turns, options.rounds, options.warmup)
    lowest = _at(REFERENCE, min(options.ranks))
    pairs = [(_at(name, r), _at(REFERENCE, r)) for r in options.ranks for name in names if name != REFERENCE]
    pairs += [(_at(name, r), lowest) for r in options.ranks for name in names if _at(name, r) != lowest]
    return rounds.summary(list(dict.fromkeys(pairs)))


def _at(name: str, r: int) -> str:
    return f"{name} r{r}"


def _table(title: str, summary: dict[str, Any], names: list[str], ranks: tuple[int, ...]) -> Table:
    lowest = _at(REFERENCE, min(ranks))
    table = Table(title, ["subject", "r", "median ms", f"/ {REFERENCE} at this r", f"/ {lowest}"])
    for r in ranks:
        for name in names:
            over = [f"{_at(name, r)} / {under}" for under in (_at(REFERENCE, r), lowest)]
            found = [summary["ratios"].get(key) for key in over]
            shown = [ratio_text(ratio) for ratio in found]
            table.rows.append([name, str(r), ms(summary["seconds"][_at(name, r)]["median"]), *shown])
    return table


def _bars(title: str, summary: dict[str, Any], names: list[str], ranks: tuple[int, ...]) -> dict[str, list[Bar]]:
    groups: dict[str, list[Bar]] = {}
    for r in ranks:
        found = {name: summary["ratios"].get(f"{_at(name, r)} / {_at(REFERENCE, min(ranks))}") for name in names}
        groups[f"{title}, r {r}"] = [Bar(n, v["median"], v["low"], v["high"]) for n, v in found.items() if v]
    return groups


def _goals(case: dict[str, Any], ranks: tuple[int, ...]) -> list[Goal]:
    pairs = [f"{_at('ours-dora', r)} / {_at(REFERENCE, r)}" for r in ranks]
    return [
        Goal(f"{case['name']}: {pair}", case["ratios"][pair]["median"], 1.1) for pair in pairs if pair in case["ratios"]
    ]
