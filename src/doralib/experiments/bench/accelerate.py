"""A PEFT user's training step before and after `doralib.peft.accelerate`."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...peft import accelerate
from .measure import log
from .options import AccelerateOptions, batch_of, switch_values
from .step import case_name, time_steps
from .subjects import ACCELERATED, REFERENCE, AdapterSettings, build, check_subjects, nudge, trained_parameters
from .tables import Bars, Report, Table, ratio_bars, ratio_goal, timing_table
from .workload import base_model, token_batch

BEFORE = "peft-dora"


def bench_accelerate(options: AccelerateOptions) -> Report:
    """Seconds of a training step by PEFT's LoRA, PEFT's DoRA, and the same DoRA accelerated; and that they agree."""
    names = check_subjects(options.subjects or (REFERENCE, BEFORE, ACCELERATED))
    cases: list[dict[str, Any]] = []
    bars = Bars("PEFT before and after accelerate, time over PEFT LoRA", "time / time of PEFT LoRA in the same round")
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        agreement = agreement_of(base, options)
        for tokens, dropout, checkpointing in product(
            options.tokens, options.dropout, switch_values(options.checkpointing)
        ):
            settings = {"dtype": dtype, "tokens": tokens, "dropout": dropout, "checkpointing": checkpointing}
            name = case_name(settings)
            log.info(f"accelerate: {name}")
            summary = time_steps(base, settings, options, names)
            cases.append({"name": name, "settings": {**settings, **described}, "agreement": agreement, **summary})
            bars.groups[name] = ratio_bars(summary)
    return Report(
        "accelerate",
        "PEFT before and after doralib.peft.accelerate",
        options.model_dump(mode="json"),
        cases,
        [_agreement_table(cases), *(timing_table(case["name"], case) for case in cases)],
        bars,
        [goal for case in cases for goal in ratio_goal(case["name"], case, f"{ACCELERATED} / {BEFORE}", 1.0)],
        [
            "the same PeftModel of use_dora=True, its own forward and ours; forward, backward, fused AdamW, zero_grad",
            "agreement: moved adapters, no dropout; largest difference of the logits, and of the whole gradient, over "
            "the largest logit and the gradient's length",
        ],
    )


def agreement_of(base: nn.Module, options: AccelerateOptions) -> dict[str, float]:
    """How far outputs and gradients of one model move when it is accelerated, as a share of themselves."""
    model = build(BEFORE, base, AdapterSettings(options.r))
    torch.manual_seed(0)
    nudge(model, 0.01)
    tokens = min(batch_of(options.tokens[0])[1], 64)
    batch = token_batch(base.config.vocab_size, 1, tokens)  # type: ignore[union-attr, arg-type]
    theirs = _outputs(model, batch)
    ours = _outputs(accelerate(model), batch)
    shares = [(a - b).norm(p) / b.norm(p) for a, b, p in zip(ours, theirs, (torch.inf, 2), strict=True)]
    return dict(zip(("logits", "gradient"), map(float, shares), strict=True))


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the loss by everything that is trained, as one vector."""
    model.train().zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradient = torch.cat([p.grad.float().flatten() for p in trained_parameters(model) if p.grad is not None])
    return output.logits.detach().float().flatten(), gradient


def _agreement_table(cases: list[dict[str, Any]]) -> Table:
    found = {case["settings"]["dtype"]: case["agreement"] for case in cases}
    table = Table("Agreement with PEFT's own forward", ["dtype", "logits", "gradient"])
    table.rows += [[dtype, f"{a['logits']:.1e}", f"{a['gradient']:.1e}"] for dtype, a in found.items()]
    return table
