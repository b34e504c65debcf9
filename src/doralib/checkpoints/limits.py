"""What a config.json may say: whatever it counts is made, one after another, until the memory is gone."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DoraError
from ..files import read_json
from .kind import is_pipeline

# settings that count what is made in a loop, and more than any model has
_LIMITS = {
    re.compile(r"(layers?|layers_per_block|depths?|blocks|experts)$"): 10_000,
    re.compile(r"(labels|timesteps)$"): 1_000_000,
}


def check_sizes(path: str | Path) -> None:
    """Check that a model's folder, or a pipeline's, asks for no more layers, labels or steps than a model can have.

    What is no folder is not looked at: it may be a hub name.

    Raises:
        DoraError: as `read_config`.
    """
    folder = Path(path).expanduser()
    for file in sorted(folder.glob("*/*config.json" if is_pipeline(folder) else "config.json")):
        read_config(file)


def read_config(file: Path) -> dict[str, Any]:
    """The values of a model's config.json, or of a part's of a pipeline.

    Raises:
        DoraError: if it is damaged, or asks for more layers, experts, labels or steps than a model can have.
    """
    config: dict[str, Any] = read_json(file)
    if wrong := [f"{key} {count}" for key, count in _find_too_large(config)]:
        raise DoraError(f"model: {file} is damaged, no model has so many: {', '.join(wrong)}")
    if config.get("quantization_config", {}) is None:
        # transformers writes it of a model that is not quantized
        del config["quantization_config"]
    if not isinstance(config.get("quantization_config", {}), dict):
        raise DoraError(f"model: {file} is damaged: its quantization_config is no object")
    return config


def _find_too_large(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _find_too_large(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _find_too_large(each, key)
    elif isinstance(value, int) and any(rule.search(key) and value > most for rule, most in _LIMITS.items()):
        yield key, value
