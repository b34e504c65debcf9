"""The order in which training sees its rows."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_BATCHES_SORTED_TOGETHER = 50
PADDING_WORTH_GROUPING = 0.1
"""The share of padding from which on rows of like length stand in one batch."""


def measure_padding(lengths: Sequence[int], batch: int) -> float:
    """The share of padding in batches of rows in any order, as one order shows it."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[lengths[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)]
    room = sum(max(each) * len(each) for each in batches)
    return 1 - sum(lengths) / room if room else 0.0


class SeededSampler(Sampler[int]):
    """An order of the rows that follows from seed and epoch alone, so that a resumed epoch is the same epoch.

    Args:
        lengths: Tokens of each row.
        batch: Rows of one optimizer step: they have about the same length, and the longest of all come first, so
            that memory runs out at once or never. None: no grouping.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int | None, seed: int) -> None:
        self.lengths, self.batch, self.seed = lengths, batch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch, by accelerate and the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        if self.batch is None:
            yield from order
            return
        window = self.batch * _BATCHES_SORTED_TOGETHER
        order = [
            i
            for start in range(0, len(order), window)
            for i in sorted(order[start : start + window], key=lambda i: -self.lengths[i])
        ]
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        # an incomplete batch stays the last, or every later one would be cut across two groups
        whole = len(self) // self.batch
        shuffled = [batches[i] for i in torch.randperm(whole, generator=generator).tolist()] + batches[whole:]
        longest = max(range(len(batches)), key=lambda k: max(self.lengths[i] for i in shuffled[k]))
        if longest < whole:
            shuffled.insert(0, shuffled.pop(longest))
        for rows in shuffled:
            yield from rows


class SortedSampler(Sampler[int]):
    """Rows of several kinds, in batches of one kind each, such as rows with pictures and rows without.

    The last batch of a kind is filled up with rows of that kind that come again. Seed and epoch say the order, as for
    `SeededSampler`.

    Args:
        lengths: Tokens of each row.
        kinds: The kind of each row.
        batch: Rows that go through the model at a time, over all processes.
        seed: Of the order.
        grouped: Whether the rows of a batch have about the same length.
    """

    def __init__(self, lengths: Sequence[int], kinds: Sequence[int], batch: int, seed: int, *, grouped: bool) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0
        self._kind = kinds
        self._places = [[i for i, each in enumerate(kinds) if each == kind] for kind in sorted(set(kinds))]
        self._samplers = [
            SeededSampler([lengths[i] for i in places], batch if grouped else None, seed) for places in self._places
        ]

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch, by accelerate and the trainer."""
        self.epoch = epoch
        for sampler in self._samplers:
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(-(-len(places) // self.batch) * self.batch for places in self._places)

    def __iter__(self) -> Iterator[int]:
        batches = []
        for places, sampler in zip(self._places, self._samplers, strict=True):
            order = [places[i] for i in sampler]
            order += [order[i % len(order)] for i in range(-len(order) % self.batch)]
            batches += [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        size = lambda rows: (self._kind[rows[0]], max(self.lengths[i] for i in rows))
        longest = max(range(len(batches)), key=lambda k: size(shuffled[k]))
        # of the last kind, that with pictures: so that memory runs out at once or never
        shuffled.insert(0, shuffled.pop(longest))
        for rows in shuffled:
            yield from rows


def count_rows(kinds: Sequence[int], batch: int) -> int:
    """How many rows an epoch has, where each batch is of one kind."""
    return sum(-(-kinds.count(kind) // batch) * batch for kind in set(kinds))
