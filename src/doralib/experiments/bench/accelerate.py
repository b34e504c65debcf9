"""A PEFT user's training step before and after `doralib.peft.accelerate`."""

import torch
from torch import Tensor, nn

from ...peft import accelerate
from .options import AccelerateOptions, batch_of
from .step import time_steps, training_cases
from .subjects import ACCELERATED, REFERENCE, AdapterSettings, build, check_subjects, nudge, trained_parameters
from .tables import TIME_RATIO, Bars, Report, Table, ratio_goals, timing_table
from .workload import base_model, token_batch

BEFORE = "peft-dora"


def bench_accelerate(options: AccelerateOptions) -> Report:
    """Seconds of a training step by PEFT's LoRA, PEFT's DoRA, and the same DoRA accelerated; and that they agree."""
    names = check_subjects(options.subjects or (REFERENCE, BEFORE, ACCELERATED))
    agreements = Table("Agreement with PEFT's own forward", ["dtype", "logits", "gradient"])
    report = Report(
        "accelerate",
        "PEFT before and after doralib.peft.accelerate",
        options.model_dump(mode="json"),
        Bars("PEFT before and after accelerate, time over PEFT LoRA", TIME_RATIO),
        [
            "the same PeftModel of use_dora=True, its own forward and ours; forward, backward, fused AdamW, zero_grad",
            "agreement: moved adapters, no dropout; largest difference of the logits, and of the whole gradient, over "
            "the largest logit and the gradient's length",
        ],
        tables=[agreements],
    )
    for dtype in options.dtype:
        base, described = base_model(options.model, options.layers, dtype)
        agreement = agreement_of(base, options)
        agreements.rows.append([dtype, f"{agreement['logits']:.1e}", f"{agreement['gradient']:.1e}"])
        for name, settings in training_cases("accelerate", dtype, options):
            found = time_steps(base, settings, options, names)
            case = {"name": name, "settings": {**settings, **described}, "agreement": agreement, **found}
            report.add(case, timing_table(case), goals=ratio_goals(case, {f"{ACCELERATED} / {BEFORE}": 1.0}))
    return report


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
