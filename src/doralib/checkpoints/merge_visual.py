"""Merge the adapter of a VL-BART: the base, what was trained and the extra tokens become one model."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.merge import merge
from ..disk import replacing
from ..errors import DoraError
from ..files import write_json
from .load import load_model
from .merge import RECORD, check_out, list_written_files

_MOST = 1e-4  # of the largest logit, in float32: the sums of a merged layer are taken in another order


def merge_visual(
    adapter: Path, base: str | None, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> float:
    """Write the merged model, whole in memory, and compare its logits with the adapted one's; their largest difference.

    Args:
        adapter: Of a VL-BART.
        base: None: the one that the adapter names.
        out: Made whole or not at all; what stands there is refused unless ``overwrite``.
        dtype: Of the merged model; None: as the base.

    Returns:
        The difference over the largest logit.

    Raises:
        UsageError: if there is no base, or ``out`` cannot be written.
        DoraError: if the merged model does not answer as the adapted one does; nothing is written then.
    """
    model, tokenizer = load_model(str(adapter), base=base)
    place = Path(model.name_or_path)
    check_out(out, place if place.is_dir() else adapter, [adapter], overwrite)
    before = _ask(model)
    merge(model)
    with replacing(out) as part:
        (model if dtype is None else model.to(getattr(torch, dtype))).save_pretrained(part)
        tokenizer.save_pretrained(part)
        record = {"base": str(model.name_or_path), "dtype": dtype, "adapters": [str(adapter)]}
        write_json(part / RECORD, {**record, "files": sorted(list_written_files(part))})
        after = _ask(load_model(str(part))[0])
        found = float((after - before).abs().max() / before.abs().max())
        if not found <= (_MOST if before.dtype == torch.float32 and dtype in (None, "float32") else math.inf):
            raise DoraError(f"the merged model does not answer as the adapted one does: they differ by {found:.2g}")
    return found


@torch.inference_mode()
def _ask(model: Any) -> Tensor:
    """Logits for random features and words, the same for each model."""
    generator, visual = torch.Generator().manual_seed(0), model.config.visual
    words = torch.randint(3, model.config.vocab_size, (2, 8), generator=generator)
    features = torch.randn(2, visual["tokens"], visual["features"], generator=generator).to(model.dtype)
    places = torch.stack([torch.zeros(visual["tokens"], dtype=torch.long), torch.arange(visual["tokens"])], dim=-1)
    given = {"attention_mask": torch.ones_like(words), "features": features, "places": places.expand(2, -1, -1)}
    logits: Tensor = model(input_ids=words, **given, decoder_input_ids=words).logits.float()
    return logits
