"""Whether a model keeps packed rows apart, shown by a trial."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .batches import Collator
from .encoding import count_embeddings
from .prepare import IGNORED

# how far logits of a packed row may be from those of the row alone, as a share of the largest; what a row sees of its
# neighbors changes them by far more
_ROUNDING, _ROUNDING_OF_16_BITS = 1e-4, 3e-2
# settings of models that do not see every earlier token, which a mask of ours would let them see
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def choose_layout(model: nn.Module, collator: Collator) -> Collator:
    """The collator with the layout of packed rows in which each row has the logits that it has alone.

    transformers tells rows apart by positions that begin anew, where there is neither a mask nor a cache; flash
    attention only in one long sequence. Models that do not heed positions get a mask of blocks. Whether either holds
    only shows when the model runs: recurrent layers carry their state on, some models make positions of their own.

    Raises:
        UsageError: if no layout keeps rows apart.
    """
    flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    layouts = [replace(collator, flat=flash)]
    windows = any(getattr(model.config, name, None) for name in _WINDOWS)
    if not flash and not windows:
        layouts.append(replace(collator, block_mask=_find_dtype(model)))
    reasons = []
    for layout in layouts:
        why = _find_leak(model, layout)
        if not why:
            return layout
        reasons.append(why)
    raise UsageError(
        f"data.packing: {type(model).__name__} cannot keep packed rows apart: {reasons[0]}; "
        "data.packing: false pads rows instead"
    )


def _find_leak(model: nn.Module, collate: Collator) -> str:
    """How packed rows differ from the same rows alone, or ""."""
    count = count_embeddings(model) or 32
    # from different ends of the vocabulary, so that what leaks from one row into the next changes it
    draw = lambda start, length: [(7 * i * i + 3 * i + start) % count for i in range(length)]
    a, b, c = draw(1, 9), draw(count // 2, 6), draw(5, 7)
    packed = ([a, b], [c, a, b])
    sequences = [
        {
            "input_ids": [token for row in rows for token in row],
            "labels": [IGNORED for row in rows for _ in row],
            "lengths": [len(row) for row in rows],
        }
        for rows in packed
    ]
    try:
        together = _find_logits(model, collate(sequences))
        alone = {len(row): _find_logits(model, {"input_ids": torch.tensor([row])})[0] for row in (a, b, c)}
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        lines = str(error).strip().splitlines()
        return f"it fails on packed rows ({lines[0] if lines else type(error).__name__})"
    pairs = [(found, alone[len(found)]) for found in _split(together, packed)]
    worst = max(float((found - expected).abs().max()) for found, expected in pairs)
    scale = max(float(expected.abs().max()) for _, expected in pairs)
    rounding = _ROUNDING_OF_16_BITS if _find_dtype(model).itemsize < 4 else _ROUNDING
    if worst <= rounding * scale:
        return ""
    return f"the logits of a row change by {worst / scale:.1%} of the largest beside other rows"


def _find_dtype(model: nn.Module) -> torch.dtype:
    return getattr(model, "dtype", torch.float32)


def _find_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits (B, T, V) in float64."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "num_tokens")}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits.double().cpu()
    finally:
        for module, training in modes.items():
            module.training = training


def _split(logits_BTV: Tensor, packed: Sequence[Sequence[Sequence[int]]]) -> Iterator[Tensor]:
    """The logits of each row, (length, V), of sequences that lie side by side or one after the other."""
    begin = 0
    for i, rows in enumerate(packed):
        if len(logits_BTV) > 1:
            begin = 0
        for row in rows:
            yield logits_BTV[min(i, len(logits_BTV) - 1), begin : begin + len(row)]
            begin += len(row)
