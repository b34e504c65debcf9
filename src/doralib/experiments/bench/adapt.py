"""How long it takes to put adapters on a model in the shape of LLaMA-3-8B, beside PEFT's get_peft_model."""

import math
from functools import partial

import torch
from torch import nn

from ...disk import format_bytes
from .counting import allocations, peak
from .llama_files import LLAMA, VOCAB, count_numbers, is_target, make_llama
from .measure import Turn, interleave, log, read_kernel_bytes
from .options import AdaptOptions
from .subjects import SUBJECTS, TARGETS, AdapterSettings, share_weights
from .tables import Bars, Case, Goal, Report, Table, make_bars, ms, quartiles

METHODS = ("peft-lora", "peft-dora", "ours-lora", "ours-dora")
PASS = "one pass"
_SECONDS = 10.0
"""What "seconds, not minutes" is taken to mean, for all layers on meta."""


def bench_adapt(options: AdaptOptions) -> Report:
    """Seconds of adapting: all layers on the meta device, and as many with real weights as memory holds."""
    report = Report(
        "adapt",
        "Putting adapters on a model in the shape of LLaMA-3-8B",
        options.model_dump(mode="json"),
        Bars("Putting adapters on", "seconds", line=None),
        [
            f"targets {', '.join(TARGETS)}, r {options.r}, bfloat16; meta: no weights, only modules are made",
            f"{PASS}: the row norms of every target's weight by one torch call each: what the start of m needs",
        ],
    )
    log.info("adapt: meta")
    cases = [_case("meta", options.layers, options)]
    if count := min(options.real_layers, options.layers, _layers_that_fit(options)):
        log.info(f"adapt: {count} real layers")
        cases.append(_case("real", count, options))
    for case in cases:
        report.add(case, _table(case), bars=make_bars(case["seconds"]), goals=_goals(case))
    return report


def _case(kind: str, layers: int, options: AdaptOptions) -> Case:
    base = _build_llama(options, layers, real=kind == "real")
    weights = [p for name, p in base.named_parameters() if is_target(name)]
    failed: dict[str, str] = {}
    workers: dict[str, _Worker] = {}
    for name in METHODS:
        worker = _Worker(base, name, AdapterSettings(options.r))
        try:
            worker.prepare()
            worker.run()
            workers[name] = worker
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:  # PEFT need not take meta tensors
            failed[name] = f"{type(error).__name__}: {error}"
    turns = {PASS: Turn(partial(_one_pass, weights))} if kind == "real" else {}
    turns |= {name: Turn(worker.run, worker.prepare) for name, worker in workers.items()}
    rounds = interleave(turns, options.rounds, options.warmup)
    peaks = {}
    for name, worker in workers.items():
        worker.prepare()
        peaks[name] = peak(allocations(worker.run))
    pairs = [("ours-dora", "peft-dora"), ("ours-lora", "peft-lora"), ("ours-dora", PASS), ("peft-dora", PASS)]
    return {
        "name": f"{kind}, {layers} layers",
        "settings": {"kind": kind, "layers": layers, "adapted": len(weights), "bytes": sum(p.nbytes for p in weights)},
        **rounds.summary(pairs),
        "peak_bytes": peaks,
        "failed": failed,
    }


class _Worker:
    """One method; each call on modules of its own around the same weights."""

    def __init__(self, base: nn.Module, method: str, adapter: AdapterSettings) -> None:
        self.base, self.method, self.adapter = base, method, adapter
        self.model = base

    def prepare(self) -> None:
        """A model without an adapter."""
        self.model = share_weights(self.base)

    def run(self) -> None:
        """Put it on."""
        self.model = SUBJECTS[self.method](self.model, self.adapter)


def _build_llama(options: AdaptOptions, layers: int, *, real: bool) -> nn.Module:
    widths = {name: LLAMA[name] // options.divide for name in ("hidden_size", "intermediate_size")}
    model = make_llama(layers, vocab_size=256 if real else VOCAB, **widths)
    if real:
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.uniform_(p, -0.02, 0.02)
    return model.requires_grad_(False)


def _layers_that_fit(options: AdaptOptions) -> int:
    """Half of the free memory; the other half is for whatever a method makes of it."""
    free = read_kernel_bytes("/proc/meminfo", "MemAvailable")
    layer_bytes = 2 * (count_numbers(1) - count_numbers(0)) // options.divide**2
    return options.real_layers if free is None else max(1, free // 2 // layer_bytes)


@torch.no_grad()
def _one_pass(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def _table(case: Case) -> Table:
    settings = case["settings"]
    title = f"{case['name']}, {format_bytes(settings['bytes'])} in {settings['adapted']} adapted weights"
    table = Table(title, ["subject", "median ms", "quartiles", "peak of new memory", "/ the same of PEFT"])
    for name, seconds in case["seconds"].items():
        ratio = case["ratios"].get(f"{name} / {name.replace('ours', 'peft')}")
        memory = format_bytes(case["peak_bytes"][name]) if name in case["peak_bytes"] else ""
        over = f"{ratio['median']:.3f}" if ratio else ""
        table.rows.append([name, ms(seconds["median"]), quartiles(seconds), memory, over])
    table.rows += [[name, f"failed: {why.splitlines()[0][:80]}", "", "", ""] for name, why in case["failed"].items()]
    return table


def _goals(case: Case) -> list[Goal]:
    if case["settings"]["kind"] == "meta":
        seconds = case["seconds"].get("ours-dora", {"median": math.inf})["median"]
        return [Goal(f"{case['name']}: seconds of ours-dora", seconds, _SECONDS)]
    over = case["ratios"][f"ours-dora / {PASS}"]["median"]
    return [Goal(f"{case['name']}: ours-dora / {PASS} over the weights", over, 2.0)]
