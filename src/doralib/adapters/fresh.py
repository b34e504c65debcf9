"""Parts of a model that may hold random numbers still: a head of a task, rows of a vocabulary that grew."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from torch import nn

from ..documents import decode_json
from .scan import HEADS, Scan, ask_model


def note_frozen_parts(found: Scan, trained: Collection[str]) -> list[str]:
    """A line for each part that transformers fills with random numbers where a base has none, and nothing trains.

    Args:
        found: The model before it is adapted.
        trained: Modules that are adapted or trained whole, or of which rows are trained.
    """
    is_trained = lambda name: any(each == name or each.startswith(f"{name}.") for each in trained)
    heads = [name for name in HEADS if isinstance(getattr(found.model, name, None), nn.Module)]
    notes = [
        f"the head {name!r} stays as it is, and where the base had none it is random; "
        f"modules_to_save=({name!r},) trains it"
        for name in heads
        if not is_trained(name)
    ]
    rows, stored = _count_rows(found), _read_vocabulary(found.model)
    drawn = getattr(found.model, "draws_own_rows", False)
    if rows is not None and stored is not None and rows[1] > stored and not (drawn or is_trained(rows[0])):
        last = rows[1] - 1
        notes.append(
            f"{rows[0]!r} has rows {stored} to {last} that the base's files do not, and they stay as they are; "
            f"trainable_token_indices or modules_to_save trains them"
        )
    return notes


def _count_rows(found: Scan) -> tuple[str, int] | None:
    """The input embedding's name and the number of its tokens."""
    embedding = ask_model(found.model, "get_input_embeddings")
    names = [name for name, module in found.modules.items() if module is embedding]
    weight = getattr(embedding, "weight", None)
    return (names[0], len(weight)) if names and weight is not None and weight.dim() == 2 else None


def _read_vocabulary(model: nn.Module) -> int | None:
    """How many tokens the files of a local base have, as their config.json says."""
    path = Path(str(getattr(model, "name_or_path", "") or "")) / "config.json"
    with suppress(OSError, ValueError):
        values = decode_json(path.read_bytes())
        places = [values, values.get("text_config")] if isinstance(values, dict) else []
        sizes = [each.get("vocab_size") for each in places if isinstance(each, dict)]
        return next((size for size in sizes if isinstance(size, int)), None)
    return None
