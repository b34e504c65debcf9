"""Several rows in one sequence: which of them go together."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import datasets

from ..recipe import DataSettings
from .prepare import IGNORED

_SEQUENCES_AT_ONCE = 1000
_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {"input_ids": _TOKENS, "labels": _TOKENS, "lengths": _TOKENS, "length": datasets.Value("int32")}
)


def is_packed(settings: DataSettings) -> bool:
    """Whether rows are packed: as the recipe says, else where they are whole documents."""
    return settings.style == "text" if settings.packing is None else settings.packing


def pack_rows(rows: datasets.Dataset, most: int) -> datasets.Dataset:
    """Rows as sequences of at most ``most`` tokens; no row is cut, and each stands in one sequence.

    A sequence has the columns of a row and ``lengths``, those of its rows in their order. The first token of a row is
    never learned: nothing of the row comes before it.
    """
    bins = fill_bins(rows["length"][:], most)
    parts = [
        datasets.Dataset.from_dict(_join(rows, bins[start : start + _SEQUENCES_AT_ONCE]), features=_FEATURES)
        for start in range(0, len(bins), _SEQUENCES_AT_ONCE)
    ]
    return datasets.concatenate_datasets(parts)


def fill_bins(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of rows by sequence, each filled as well as the longest rows first allow (best fit decreasing)."""
    room: list[int] = []  # the different rooms left, ascending
    by_room: dict[int, list[list[int]]] = defaultdict(list)
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[place]
        at = bisect_left(room, length)
        if at == len(room):
            left = most
            chosen: list[int] = []
            bins.append(chosen)
        else:
            left = room[at]
            chosen = by_room[left].pop()
            if not by_room[left]:
                del room[at]
        chosen.append(place)
        left -= length
        if not by_room[left]:
            insort(room, left)
        by_room[left].append(chosen)
    return sorted(map(sorted, bins))


def _join(rows: datasets.Dataset, bins: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    taken = iter(rows.select([place for each in bins for place in each]))
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for each in bins:
        members = [next(taken) for _ in each]
        lengths = [len(row["input_ids"]) for row in members]
        columns["input_ids"].append([token for row in members for token in row["input_ids"]])
        columns["labels"].append([label for row in members for label in (IGNORED, *row["labels"][1:])])
        columns["lengths"].append(lengths)
        columns["length"].append(sum(lengths))
    return columns
