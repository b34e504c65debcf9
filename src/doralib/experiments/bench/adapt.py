"""How long it takes to put adapters on a model in the shape of LLaMA-3-8B, beside PEFT's get_peft_model."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ...files import format_bytes
from .counting import allocations, peak
from .measure import Turn, interleave, log, spread
from .options import AdaptOptions
from .subjects import SUBJECTS, TARGETS, AdapterSettings, share_weights
from .tables import Bar, Bars, Goal, Report, Table, ms

METHODS = ("peft-lora", "peft-dora", "ours-lora", "ours-dora")
PASS = "one pass"
_SECONDS = 10.0
"""What "seconds, not minutes" is taken to mean, for all layers on meta."""


def bench_adapt(options: AdaptOptions) -> Report:
    """Seconds of adapting: all layers on the meta device, and as many with real weights as memory holds."""
    adapter = AdapterSettings(options.r)
    log.info("adapt: meta")
    cases = [_case("meta", _build_llama(options, options.layers, vocab=128256, real=False), adapter, options)]
    count = min(options.real_layers, options.layers, _layers_that_fit(options))
    if count:
        log.info(f"adapt: {count} real layers")
        cases.append(_case("real", _build_llama(options, count, vocab=256, real=True), adapter, options))
    bars = Bars("Putting adapters on", "seconds", line=None)
    bars.groups = {
        case["name"]: [Bar(name, s["median"], s["low"], s["high"]) for name, s in case["seconds"].items()]
        for case in cases
    }
    return Report(
        "adapt",
        "Putting adapters on a model in the shape of LLaMA-3-8B",
        options.model_dump(mode="json"),
        cases,
        [_table(case) for case in cases],
        bars,
        _goals(cases),
        [
            f"targets {', '.join(TARGETS)}, r {options.r}, bfloat16; meta: no weights, only modules are made",
            f"{PASS}: the row norms of every target's weight by one torch call each: what the start of m needs",
        ],
    )


def _case(kind: str, base: nn.Module, adapter: AdapterSettings, options: AdaptOptions) -> dict[str, Any]:
    failed: dict[str, str] = {}
    turns: dict[str, Turn] = {PASS: Turn(lambda: _one_pass(base))} if kind == "real" else {}
    workers = {}
    for name in METHODS:
        worker = _Worker(base, SUBJECTS[name], adapter)
        try:
            worker.prepare()
            worker.run()
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:  # PEFT need not take meta tensors
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        workers[name] = worker
        turns[name] = Turn(worker.run, worker.prepare)
    rounds = interleave(turns, options.rounds, options.warmup)
    bytes_ = {}
    for name, worker in workers.items():
        worker.prepare()
        bytes_[name] = peak(allocations(worker.run))
    weights = [p for name, p in base.named_parameters() if name.removesuffix(".weight").endswith(TARGETS)]
    layers: int = base.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    pairs = [("ours-dora", "peft-dora"), ("ours-lora", "peft-lora"), ("ours-dora", PASS), ("peft-dora", PASS)]
    return {
        "name": f"{kind}, {layers} layers",
        "settings": {"kind": kind, "layers": layers, "adapted": len(weights), "bytes": sum(p.nbytes for p in weights)},
        **rounds.summary(pairs),
        "peak_bytes": bytes_,
        "failed": failed,
    }


class _Worker:
    """One method; each call on modules of its own around the same weights."""

    def __init__(
        self, base: nn.Module, method: Callable[[nn.Module, AdapterSettings], nn.Module], adapter: AdapterSettings
    ) -> None:
        self.base, self.method, self.adapter = base, method, adapter
        self.model: nn.Module | None = None

    def prepare(self) -> None:
        """A model without an adapter."""
        self.model = share_weights(self.base)

    def run(self) -> None:
        """Put it on."""
        assert self.model is not None
        self.model = self.method(self.model, self.adapter)


def _build_llama(options: AdaptOptions, layers: int, *, vocab: int, real: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=4096 // options.divide,
        intermediate_size=14336 // options.divide,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if real:
        model = model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.uniform_(p, -0.02, 0.02)
    return model.requires_grad_(False)


def _layers_that_fit(options: AdaptOptions) -> int:
    """Half of the free memory; the other half is for whatever a method makes of it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return options.real_layers
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    hidden, inner = 4096 // options.divide, 14336 // options.divide
    layer_bytes = 2 * (2 * hidden * hidden + hidden * hidden // 2 + 3 * hidden * inner)
    return max(1, int(line.split()[1]) * 1024 // 2 // layer_bytes)


@torch.no_grad()
def _one_pass(base: nn.Module) -> None:
    for name, p in base.named_parameters():
        if name.removesuffix(".weight").endswith(TARGETS):
            torch.linalg.vector_norm(p, dim=1, dtype=torch.float32)


def _table(case: dict[str, Any]) -> Table:
    title = (
        f"{case['name']}, {format_bytes(case['settings']['bytes'])} in {case['settings']['adapted']} adapted weights"
    )
    table = Table(title, ["subject", "median ms", "quartiles", "peak of new memory", "/ the same of PEFT"])
    for name, seconds in case["seconds"].items():
        ratio = case["ratios"].get(f"{name} / {name.replace('ours', 'peft')}")
        memory = case["peak_bytes"].get(name)
        table.rows.append(
            [
                name,
                ms(seconds["median"]),
                f"{ms(seconds['low'])} to {ms(seconds['high'])}",
                "" if memory is None else format_bytes(memory),
                f"{ratio['median']:.3f}" if ratio else "",
            ]
        )
    table.rows += [[name, f"failed: {why.splitlines()[0][:80]}", "", "", ""] for name, why in case["failed"].items()]
    return table


def _goals(cases: list[dict[str, Any]]) -> list[Goal]:
    goals = []
    for case in cases:
        found = case["seconds"].get("ours-dora", spread([float("inf")]))
        if case["settings"]["kind"] == "meta":
            goals.append(Goal(f"{case['name']}: seconds of ours-dora", found["median"], _SECONDS))
        elif PASS in case["seconds"]:
            over = statistics.median(case["ratios"][f"ours-dora / {PASS}"]["all"])
            goals.append(Goal(f"{case['name']}: ours-dora / {PASS} over the weights", over, 2.0))
    return goals
