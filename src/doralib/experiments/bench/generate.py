"""Text written token by token with the adapter left unmerged, beside the model without it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.inference import unchanged
from .measure import Turn, interleave, log, spread
from .options import GenerateOptions
from .subjects import REFERENCE, AdapterSettings, build, check_subjects, import_peft, nudge
from .tables import Bars, Case, Report, Table, make_bars, ratio_goals, ratio_text, ratios_to
from .workload import base_model, token_batch

CACHED = "peft-dora-cached"
HELD = "ours-dora-unchanged"
SUBJECTS = ("base", REFERENCE, "peft-dora", CACHED, "ours-lora", "ours-dora", HELD)


def bench_generate(options: GenerateOptions) -> Report:
    """Tokens per second of greedy writing with a key-value cache."""
    names = list(options.subjects or SUBJECTS)
    check_subjects(name for name in names if name not in (CACHED, HELD))
    report = Report(
        "generate",
        "Unmerged generation",
        options.model_dump(mode="json"),
        Bars("Unmerged generation, time over the base model", "time / time of the base model in the same round"),
        [
            f"{options.new} tokens one by one after a prompt of {options.prompt} (not timed), batch {options.batch}",
            f"{CACHED}: PEFT inside its DoraCaching(), which keeps B A, a dense matrix, of every layer",
            f"{HELD}: inside doralib.unchanged(model), which promises that no parameter is written to",
        ],
    )
    for dtype in options.dtype:
        log.info(f"generate: {dtype}")
        base, described = base_model(options.model, options.layers, dtype)
        case = {"name": dtype, "settings": {"dtype": dtype, **described}, **_case(base, names, options)}
        goals = ratio_goals(case, {"ours-dora / base": 1.1, f"{HELD} / base": 1.1})
        report.add(case, _table(case), bars=make_bars(ratios_to("base", case["ratios"])), goals=goals)
    return report


class Writer:
    """One model, its prompt read, ready to write; every call goes on from the prompt."""

    def __init__(self, model: nn.Module, prompt: Tensor, new: int, context: Callable[[], Any] = nullcontext) -> None:
        self.model, self.prompt, self.new, self.context = model.eval(), prompt, new, context
        self.cache: Any = None
        self.written: list[Tensor] = []

    @torch.no_grad()
    def read_prompt(self) -> None:
        """Fill the key-value cache."""
        with self.context():
            output = self.model(input_ids=self.prompt, use_cache=True)
        self.cache = output.past_key_values
        self.written = [output.logits[:, -1:].argmax(-1)]

    @torch.no_grad()
    def write(self) -> None:
        """The new tokens, one call of the model each."""
        with self.context():
            for _ in range(self.new):
                output = self.model(input_ids=self.written[-1], past_key_values=self.cache, use_cache=True)
                self.written.append(output.logits[:, -1:].argmax(-1))


def _case(base: nn.Module, names: list[str], options: GenerateOptions) -> dict[str, Any]:
    vocab: int = base.config.vocab_size  # type: ignore[union-attr, assignment]
    prompt = token_batch(vocab, options.batch, options.prompt)["input_ids"]
    writers = {}
    for name in names:
        model = build({CACHED: "peft-dora", HELD: "ours-dora"}.get(name, name), base, AdapterSettings(options.r))
        nudge(model)
        contexts = {CACHED: import_peft().helpers.DoraCaching, HELD: partial(unchanged, model)}
        writers[name] = Writer(model, prompt, options.new, contexts.get(name, nullcontext))
    turns = {name: Turn(writer.write, writer.read_prompt) for name, writer in writers.items()}
    rounds = interleave(turns, options.rounds, options.warmup)
    pairs = [(name, under) for under in ("base", REFERENCE) for name in names if name != under]
    count = options.new * options.batch
    speeds = {name: spread([count / s for s in values]) for name, values in rounds.seconds.items()}
    return {**rounds.summary(pairs), "tokens_per_second": speeds}


def _table(case: Case) -> Table:
    table = Table(case["name"], ["subject", "tokens/s", "quartiles", "time / base", f"time / {REFERENCE}"])
    for name, speed in case["tokens_per_second"].items():
        ratios = [ratio_text(case, name, under) for under in ("base", REFERENCE)]
        table.rows.append([name, f"{speed['median']:.1f}", f"{speed['low']:.1f} to {speed['high']:.1f}", *ratios])
    return table
