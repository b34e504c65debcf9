"""Families: YAML files that describe many settings at once, as what they share, parts, and grids of parts.

    shared: {...}                        what every variant begins with
    parts: {NAME: {...}}                 what a part lays over it; a null takes a setting back
    grids: [{of: [[A, B], [C]]}]         one variant for each choice, A-C and B-C, its parts laid in this order
    variants: {A-C: {...}}               what one of them has of its own
    columns: [...]                       the names of the numbers in a list of `published`

Grids, parts and variants may also say `reproduces` (a table of a paper), `note` (text) and `published` (a list of
numbers, or some of them by their names).
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError, did_you_mean
from .files import read_yaml

_ABOUT = ("reproduces", "note", "published")


@dataclass(frozen=True)
class Variant:
    """One of a family's settings, and what is known about it."""

    name: str
    values: Mapping[str, Any]
    reproduces: str = ""
    published: Mapping[str, float] | None = None
    """Scores by the names of the family's columns; None where nothing was published."""
    notes: tuple[str, ...] = ()


def is_family(values: Any) -> bool:
    """Whether the value of a YAML file is a family."""
    return isinstance(values, Mapping) and "grids" in values


def read_family(path: Path) -> dict[str, Variant]:
    """The variants of a family file by name, in the order of its grids.

    Raises:
        UsageError: if it is not YAML, or names a part or a variant that is not there.
    """
    family = read_yaml(path)
    parts, own = family.get("parts") or {}, dict(family.get("variants") or {})
    made: dict[str, Variant] = {}
    for grid in family["grids"]:
        for names in itertools.product(*grid["of"]):
            if unknown := [name for name in names if name not in parts]:
                raise UsageError(f"{path}: there is no part {unknown[0]!r}{did_you_mean(unknown[0], parts)}")
            name = "-".join(names)
            layers = [grid, *(parts[part] for part in names), own.pop(name, {})]
            made[name] = _make_variant(name, family, layers)
    if own:
        raise UsageError(f"{path}: no grid makes the variants {', '.join(map(repr, own))}")
    return made


def _make_variant(name: str, family: Mapping[str, Any], layers: list[Mapping[str, Any]]) -> Variant:
    values = copy.deepcopy(family.get("shared") or {})
    for layer in layers:
        _lay_over(values, {key: value for key, value in layer.items() if key not in (*_ABOUT, "of")})
    published = next(_say(layers, "published"), None)
    if isinstance(published, list):
        published = dict(zip(family["columns"], published, strict=True))
    return Variant(
        name,
        values,
        reproduces=str(next(_say(layers, "reproduces"), "")),
        published=published,
        notes=tuple(" ".join(note.split()) for note in reversed([*_say(layers, "note")])),
    )


def _say(layers: list[Mapping[str, Any]], key: str) -> Iterator[Any]:
    """What the layers say under a key, the last first."""
    return (layer[key] for layer in reversed(layers) if key in layer)


def _lay_over(values: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        else:
            values[key] = copy.deepcopy(value)
