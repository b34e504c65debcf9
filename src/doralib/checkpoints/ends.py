"""The end of an assistant's turn in the generation settings of a model on disk, so that every server stops there."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..data.turns import find_end_tokens
from ..files import read_json, write_json


def write_end_tokens(folder: Path) -> list[str]:
    """Add what the chat template puts after an answer to `eos_token_id` in generation_config.json.

    Returns what there is to say; files that say so already stay as they are.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # noqa: BLE001 - tokenizers raise bare classes of their own
        why = str(error).strip().splitlines() or [type(error).__name__]
        return [f"the tokens that end an answer are not known, the tokenizer cannot be read: {why[0]}"]
    settings = _read_settings(folder)
    ends = settings.get("eos_token_id")
    wanted = find_end_tokens(ends, tokenizer)
    if wanted == ([ends] if isinstance(ends, int) else list(ends or [])):
        return []
    write_json(folder / "generation_config.json", {**settings, "eos_token_id": wanted})
    return [f"generation_config.json: an answer ends at {', '.join(tokenizer.convert_ids_to_tokens(wanted))}"]


def _read_settings(folder: Path) -> dict[str, Any]:
    """generation_config.json, or what transformers makes of config.json where there is none."""
    path = folder / "generation_config.json"
    if path.is_file():
        return dict(read_json(path))
    config = read_json(folder / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True, **{name: config[name] for name in names if config.get(name) is not None}}
