"""Models and tokenizers from a hub name, a folder, a .gguf file, an adapter folder or a run."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .adapters import another_base
from .config import ModelSettings
from .errors import DoraError, Note, UsageError
from .formats import Given
from .formats.storage import base_named_by, holds_adapter
from .inject import load_adapter
from .several import set_adapter

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_model(settings: ModelSettings) -> Loaded:
    """A causal language model and its tokenizer.

    Raises:
        UsageError: if there is nothing of that name, or it is a folder of something else.
        DoraError: if its files are damaged.
    """
    where, extra = _located(settings.path)
    if not sys.stderr.isatty():
        disable_progress_bar()  # bars of transformers are for a terminal
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code} | extra
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=settings.dtype, attn_implementation=settings.attn_implementation, **options
        )
    except Exception as error:  # safetensors and tokenizers raise bare classes of their own
        raise _explained(settings.path, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_any(path: str, *, base: str | None = None, dtype: str = "auto", given: Given | None = None) -> Loaded:
    """A model for use: a run, an adapter of any format, or whatever `load_model` takes.

    Args:
        base: the model that an adapter goes on, where it is not the one that it names.
        given: what an adapter's file may not say.
    """
    folder = Path(path)
    if holds_adapter(folder):
        named = base or base_named_by(folder)
        if not named:
            raise UsageError(f"{path} does not say which model it adapts; name it with --base MODEL")
        for note in another_base(base_named_by(folder), named):
            warnings.warn(f"{path} {note}", Note, stacklevel=2)
        model, tokenizer = load_model(ModelSettings(path=named, dtype=dtype))
        return load_adapter(model, folder, given=given).eval(), tokenizer
    if (folder / "model" / "config.json").exists():
        folder = folder / "model"
    model, tokenizer = load_model(ModelSettings(path=str(folder) if folder.exists() else path, dtype=dtype))
    return model.eval(), tokenizer


def load_named(model: PreTrainedModel, named: Sequence[str]) -> list[str]:
    """Put adapters on a model, each given as NAME=PATH; their names. The first one computes.

    Raises:
        UsageError: if one is not given so.
    """
    pairs = [each.partition("=") for each in named]
    if bad := [each for each, (name, _, path) in zip(named, pairs, strict=True) if not (name and path)]:
        raise UsageError(f"--adapter {bad[0]}: give a name and a path, NAME=PATH")
    for name, _, path in pairs:
        load_adapter(model, path, name)
    if pairs:
        set_adapter(model, pairs[0][0])
    return [name for name, _, _ in pairs]


def _located(path: str) -> tuple[str, dict[str, str]]:
    """What to hand to transformers for a path or a name."""
    place = Path(path)
    if place.suffix == ".gguf":
        if not place.is_file():
            raise UsageError(f"model: there is no file {path}")
        return str(place.parent), {"gguf_file": place.name}
    if place.is_dir():
        if not (place / "config.json").exists():
            raise UsageError(f"model: {path} holds no config.json, so it is no model folder: {_listing(place)}")
        return path, {}
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or place.exists()
    if looks_local:
        raise UsageError(f"model: there is no model folder {path}; give a folder, a .gguf file or a hub name")
    return path, {}


def _explained(path: str, error: Exception) -> DoraError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(path).exists():
        return DoraError(f"model: {path} cannot be read, a file in it may be truncated or of another kind: {first}")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return UsageError(f"model: no folder or file {path}, and the hub gave nothing by that name{offline}: {first}")


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return json.dumps(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
