"""Optimizers that the Trainer does not know by name."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..extras import import_extra

PRODIGY = "prodigy"


def check_prodigy(training: Mapping[str, Any]) -> None:
    """Check that prodigy is installed, if it is asked for.

    Raises:
        UsageError: if it is not.
    """
    if training.get("optim") == PRODIGY:
        import_extra("prodigyopt", "training.optim: prodigy")


def make_prodigy(training: Mapping[str, Any], args: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """Prodigy as diffusers' scripts set it, where it is asked for; its learning rate is a factor, usually 1."""
    if training.get("optim") != PRODIGY:
        return None
    from prodigyopt import Prodigy  # noqa: PLC0415  an extra

    settings = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    return Prodigy, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), **settings}
