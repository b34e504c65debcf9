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
