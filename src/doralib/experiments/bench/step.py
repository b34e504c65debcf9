"""A whole training step of a language model, by every method in turn."""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from torch import nn

from .measure import Turn, interleave, log
from .options import ProfileOptions, StepOptions, batch_of, switch_values
from .subjects import AdapterSettings, build, check_subjects, default_subjects, pairs
from .tables import TIME_RATIO, Bars, Case, Goal, Report, ratio_goals, timing_table
from .workload import TrainingStep, base_model, token_batch


def bench_step(options: StepOptions) -> Report:
    """Seconds of forward, backward and AdamW: dtype x tokens x dropout x checkpointing."""
    check_subjects(options.subjects or [])
    report = Report(
        "step",
        "A training step",
        options.model_dump(mode="json"),
        Bars("Training step, time over PEFT LoRA", TIME_RATIO),
        [
            "forward with labels, backward, fused AdamW on what is trained, zero_grad",
            "frozen: no adapter at all, the gradient of the embeddings' output is computed: the floor",
            "peft-lora-bf16: PEFT with autocast_adapter_dtype=False, adapters in bfloat16; ours and PEFT's default "
            "keep float32 masters",
        ],
    )
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        for name, settings in training_cases("step", dtype, options):
            subjects = options.subjects or default_subjects(dtype, settings["dropout"])
            found = time_steps(base, settings, options, subjects)
            case = {"name": name, "settings": {**settings, **described}, **found}
            report.add(case, timing_table(case), goals=_goals(case))
    return report


def training_cases(
    bench: str, dtype: str, options: StepOptions | ProfileOptions
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of every case of one dtype: tokens x dropout x checkpointing; logged as its turn comes."""
    checkpointing = switch_values(options.checkpointing)
    for tokens, dropout, on in product(options.tokens, options.dropout, checkpointing):
        words = (f", dropout {dropout:g}" if dropout else "") + ", checkpointing" * on
        name = f"{dtype}, {tokens} tokens{words}"
        log.info(f"{bench}: {name}")
        yield name, {"dtype": dtype, "tokens": tokens, "dropout": dropout, "checkpointing": on}


def build_steps(
    base: nn.Module, names: Iterable[str], adapter: AdapterSettings, tokens: str, *, checkpointing: bool = False
) -> dict[str, TrainingStep]:
    """A training step of each subject, on the same batch."""
    vocab: int = base.config.vocab_size  # type: ignore[union-attr, assignment]
    batch = token_batch(vocab, *batch_of(tokens))
    return {name: TrainingStep(build(name, base, adapter), batch, checkpointing=checkpointing) for name in names}


def time_steps(base: nn.Module, settings: dict[str, Any], options: StepOptions, names: Iterable[str]) -> dict[str, Any]:
    """One case: the subjects' steps in turn, and the loss before the first."""
    adapter = AdapterSettings(options.r, settings["dropout"])
    steps = build_steps(base, names, adapter, settings["tokens"], checkpointing=settings["checkpointing"])
    # a fresh adapter changes nothing, so without dropout these agree: the subjects did the same job
    first_losses = {name: step() for name, step in steps.items()}
    rounds = interleave({name: Turn(step) for name, step in steps.items()}, options.rounds, options.warmup)
    return {"first_losses": first_losses, **rounds.summary(pairs(steps))}


def _goals(case: Case) -> list[Goal]:
    settings = case["settings"]
    if settings["checkpointing"]:
        return []
    if settings["dropout"]:
        return ratio_goals(case, {"ours-dora-adapter / peft-lora": 1.0, "ours-dora-exact / peft-dora": 0.75})
    sequences, tokens = batch_of(settings["tokens"])
    return ratio_goals(case, {"ours-dora / peft-lora": 1.0 if sequences * tokens >= 1024 else 1.05})
