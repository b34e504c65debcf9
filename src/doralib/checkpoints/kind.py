"""What a model gives, by its config.json: words, a label for a text, or a label for each word."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..files import read_json

Kind = Literal["classify", "tokens"]
CLASSES: dict[Kind, str] = {"classify": "ForSequenceClassification", "tokens": "ForTokenClassification"}


def find_kind(config: Mapping[str, Any]) -> Kind | None:
    """The kind of head that a model's config.json names."""
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return next((kind for kind, ending in CLASSES.items() if any(name.endswith(ending) for name in names)), None)


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder is a diffusion pipeline, which is several models."""
    return (Path(folder).expanduser() / "model_index.json").is_file()


def read_kind(path: str) -> Kind | None:
    """The kind of head that a local model's config.json names; None for language models, and where there is no such."""
    file = Path(path).expanduser() / "config.json"
    return find_kind(read_json(file)) if file.is_file() else None
