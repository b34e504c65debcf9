"""A whole training step of a language model, by every method in turn."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import nn

from .measure import Rounds, Turn, interleave, log
from .options import StepOptions, batch_of, switch_values
from .subjects import AdapterSettings, build, check_subjects, default_subjects, pairs
from .tables import Bars, Goal, Report, ratio_bars, ratio_goal, timing_table
from .workload import TrainingStep, base_model, token_batch


def bench_step(options: StepOptions) -> Report:
    """Seconds of forward, backward and AdamW: dtype x tokens x dropout x checkpointing."""
    check_subjects(options.subjects or [])
    cases: list[dict[str, Any]] = []
    bars = Bars("Training step, time over PEFT LoRA", "time / time of PEFT LoRA in the same round")
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        for tokens, dropout, checkpointing in product(
            options.tokens, options.dropout, switch_values(options.checkpointing)
        ):
            settings = {"dtype": dtype, "tokens": tokens, "dropout": dropout, "checkpointing": checkpointing}
            log.info(f"step: {case_name(settings)}")
            names = list(options.subjects or default_subjects(dtype, dropout))
            summary = time_steps(base, settings, options, names)
            cases.append({"name": case_name(settings), "settings": {**settings, **described}, **summary})
            bars.groups[case_name(settings)] = ratio_bars(summary)
    return Report(
        "step",
        "A training step",
        options.model_dump(mode="json"),
        cases,
        [timing_table(case["name"], case) for case in cases],
        bars,
        [goal for case in cases for goal in _goals(case)],
        [
            "forward with labels, backward, fused AdamW on what is trained, zero_grad",
            "frozen: no adapter at all, the gradient of the embeddings' output is computed: the floor",
            "peft-lora-bf16: PEFT with autocast_adapter_dtype=False, adapters in bfloat16; ours and PEFT's default "
            "keep float32 masters",
        ],
    )


def time_steps(base: nn.Module, settings: dict[str, Any], options: StepOptions, names: Sequence[str]) -> dict[str, Any]:
    """One case: the subjects' steps in turn, and the loss before the first."""
    adapter = AdapterSettings(options.r, settings["dropout"])
    batch = token_batch(base.config.vocab_size, *batch_of(settings["tokens"]))  # type: ignore[union-attr, arg-type]
    steps = {
        name: TrainingStep(build(name, base, adapter), batch, checkpointing=settings["checkpointing"]) for name in names
    }
    # a fresh adapter changes nothing, so without dropout these agree: the subjects did the same job
    first_losses = {name: step() for name, step in steps.items()}
    rounds: Rounds = interleave({name: Turn(step) for name, step in steps.items()}, options.rounds, options.warmup)
    return {"first_losses": first_losses, **rounds.summary(pairs(names))}


def _goals(case: dict[str, Any]) -> list[Goal]:
    settings, name = case["settings"], case["name"]
    if settings["checkpointing"]:
        return []
    if settings["dropout"]:
        wanted = [("ours-dora-adapter / peft-lora", 1.0), ("ours-dora-exact / peft-dora", 0.75)]
    else:
        sequences, tokens = batch_of(settings["tokens"])
        wanted = [("ours-dora / peft-lora", 1.0 if sequences * tokens >= 1024 else 1.05)]
    return [goal for pair, limit in wanted for goal in ratio_goal(name, case, pair, limit)]


def case_name(settings: dict[str, Any]) -> str:
    """A case in words."""
    dropout = f", dropout {settings['dropout']:g}" if settings["dropout"] else ""
    return f"{settings['dtype']}, {settings['tokens']} tokens{dropout}" + ", checkpointing" * settings["checkpointing"]
