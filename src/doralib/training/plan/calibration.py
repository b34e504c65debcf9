"""Seconds of a step on this device: a few real ones of a model with one block and with two, of random numbers."""

import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

from ...adapters.adapt import adapt
from ...checkpoints.models import load_language_model
from ..loss import LabelLoss
from .batch import Lengths
from .skeleton import Skeleton, find_dtype

_SECONDS = 12.0
"""Not much longer than this."""
_MOST_BYTES = 6 * 2**30
_STEPS = 3


class NotCalibrated(Exception):
    """Why there is no time."""


def time_step(skeleton: Skeleton, lengths: Lengths, rows: int, batches: int, device: torch.device) -> tuple[float, str]:
    """Seconds of an optimizer step of so many batches, and how they were found.

    Raises:
        NotCalibrated: with the reason.
    """
    seconds, few = [], rows
    numbers = skeleton.few
    tokens, labels = max(2, round(lengths.usual)), max(1, round(lengths.usual_labels))
    for blocks in numbers:
        model = _make(skeleton, blocks, device)
        first = _measure(model, 1, tokens, labels, device, steps=1)
        few = max(1, min(few, int(_SECONDS / len(numbers) / (_STEPS + 1) / first)))
        each = _measure(model, few, tokens, labels, device, steps=_STEPS)
        seconds.append(each)
        del model
    batch = seconds[0] if len(seconds) == 1 else seconds[0] + (skeleton.count - 1) * max(0.0, seconds[1] - seconds[0])
    shown = " and ".join(map(str, numbers))
    scaled = "" if few == rows else f", times {rows / few:.3g} for {rows} rows"
    told = f"{_STEPS} steps of {few} rows of {tokens} tokens with {shown} of {skeleton.count} blocks{scaled}"
    return batch * rows / few * batches, told + (f", {batches} batches a step" if batches > 1 else "")


def _make(skeleton: Skeleton, blocks: int, device: torch.device) -> Any:
    recipe, config = skeleton.recipe, skeleton.small_config(blocks) or skeleton.plain.config
    dtype = find_dtype(recipe, config)
    size = sum(p.numel() for p in skeleton.adapted(blocks).parameters()) * dtype.itemsize
    if size > _MOST_BYTES:
        raise NotCalibrated(f"{blocks} of its blocks take {size / 2**30:.1f} GiB by themselves")
    with torch.random.fork_rng():
        model = type(skeleton.plain)(config).to(dtype)
        if skeleton.stored is not None:
            if recipe.model.quantization is None:
                raise NotCalibrated("a checkpoint that is quantized already cannot be cut")
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = load_language_model(recipe.model.model_copy(update={"path": folder}))
        adapt(model, recipe.adapter)
    if recipe.training.get("gradient_checkpointing") or recipe.training.get("activation_checkpointing"):
        model.gradient_checkpointing_enable()
    return model.to(device).train()


def _measure(model: Any, rows: int, tokens: int, labels: int, device: torch.device, steps: int) -> float:
    """Seconds of one batch, after one for warming up."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (rows, tokens), device=device)
    targets = torch.full_like(ids, -100)
    targets[:, -min(labels, tokens - 1) :] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}
    loss = LabelLoss(model) if LabelLoss.is_possible(model) else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    found = []
    try:
        for _ in range(steps + 1):
            begun = _now(device)
            value = model(**batch).loss if loss is None else loss(model, batch)[0]
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(_now(device) - begun)
    finally:
        if loss is not None:
            loss.remove()
    return statistics.median(found[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
