"""The parts of a model that takes more than text: its language model, its towers, and what lies between them."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import DoraConfig, fits_whole
from ..errors import UsageError
from .registry import find_record, places_of
from .scan import Scan

LANGUAGE = "language model"
VISION = "vision tower"


def find_parts(model: nn.Module) -> dict[str, str]:
    """What the parts are called in the model, by a word for each; what is neither is the projector, if it has layers.

    Empty for a model whose parts transformers does not tell apart.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules())) if name}
    found = {LANGUAGE: _ask(model, "get_decoder"), VISION: _ask(model, "get_encoder", modality="image")}
    parts = {word: names[id(module)] for word, module in found.items() if module is not None and id(module) in names}
    if LANGUAGE not in parts:
        return {}
    between = [name for name in Scan(model).linear if not _is_in(name, parts.values())]
    inside = parts[LANGUAGE].rpartition(".")[0]
    for name in between:
        part = ".".join(name.split(".")[: inside.count(".") + 2 if inside else 1])
        parts.setdefault("projector" if "projector" not in parts or parts["projector"] == part else part, part)
    return parts


def _ask(model: Any, method: str, **given: Any) -> nn.Module | None:
    try:
        found = getattr(model, method)(**given)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return None if found is model else found


def _is_in(name: str, parts: Any) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)


def choose_language_layers(model: nn.Module, config: DoraConfig) -> DoraConfig:
    """The settings with the linear layers of the language model as targets, where they name none.

    Raises:
        UsageError: if a name ends layers of several parts: it has to be said which is meant.
    """
    if config.method == "full" or isinstance(config.target_modules, str) or config.target_parameters:
        return config
    parts = find_parts(model)
    if not parts:
        return config
    found = Scan(model)
    if config.target_modules is None:
        prefix = parts[LANGUAGE]
        names = [name for name in found.linear if _is_in(name, [prefix]) and name not in found.unreached]
        return config.model_copy(update={"target_modules": _write_targets(found, prefix, names)})
    _check_one_part(found, parts, config.target_modules)
    return config


def _write_targets(found: Scan, prefix: str, names: list[str]) -> str | tuple[str, ...]:
    """One expression for these layers of a part, or their names where none says just them."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    pattern = write_pattern(prefix, ends)
    fits = {name for name in found.modules if fits_whole(pattern, name)}
    return pattern if fits == set(names) else tuple(names)


def write_pattern(prefix: str, ends: list[str]) -> str:
    """A regular expression of whole names: layers of these endings within a part."""
    return rf"{re.escape(prefix)}\..*\.({'|'.join(map(re.escape, ends))})"


def _check_one_part(found: Scan, parts: Mapping[str, str], targets: tuple[str, ...]) -> None:
    counts: dict[str, int] = {}
    several: list[str] = []
    for target in targets:
        matched = [name for name in found.bases if name == target or name.endswith(f".{target}")]
        here = {word: sum(_is_in(name, [part]) for name in matched) for word, part in parts.items()}
        if sum(count > 0 for count in here.values()) > 1:
            several.append(target)
            counts = {word: counts.get(word, 0) + count for word, count in here.items()}
    if not several:
        return
    told = ", ".join(f"{count} in the {word} ({parts[word]})" for word, count in counts.items() if count)
    pattern = write_pattern(parts[LANGUAGE], list(targets))
    raise UsageError(
        f"adapter.target_modules: {', '.join(several)} would adapt {told}; say which part is meant\n"
        f"  the language model alone: leave target_modules out, or set it to '{pattern}'\n"
        f"  every part: '.*\\.({'|'.join(map(re.escape, targets))})'"
    )


def describe_parts(model: nn.Module) -> dict[str, str]:
    """What of each part is trained, by its word: layers adapted of how many, and numbers trained of how many."""
    parts = find_parts(model)
    linear = Scan(model).linear
    adapted = {name for name, place in places_of(model)} if find_record(model) is not None else set()
    told = {}
    for word, part in parts.items():
        inside = [name for name in linear if _is_in(name, [part]) or name == part]
        count = sum(name in adapted for name in inside)
        numbers = [p for name, p in model.named_parameters() if name.startswith(f"{part}.")]
        trained, total = sum(p.numel() for p in numbers if p.requires_grad), sum(p.numel() for p in numbers)
        whole = part in adapted and not count
        layers = "trained whole" if whole else f"{count} of {len(inside)} linear layers adapted"
        told[word] = f"{part}: {layers}, {trained:,} trained of {total:,}"
    return told
