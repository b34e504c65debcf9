"""Batches of one task each, of sizes of their own, all tasks' batches in any order."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments

from .modality import Prepared


def make_task_batches(data: Prepared, args: TrainingArguments) -> "TaskBatches | None":
    """The batches of one task each; None where all rows are alike."""
    if data.ratios is None:
        return None
    sizes = {task: max(1, round(args.train_batch_size * ratio)) for task, ratio in data.ratios.items()}
    return TaskBatches(data.train.rows["task"][:], sizes, args.data_seed or args.seed)


class TaskBatches(Sampler[list[int]]):
    """An order of batches that follows from seed and epoch alone; an epoch shows every row once.

    Args:
        tasks: The task of each row.
        sizes: Rows of a batch, by task.
        seed: Of the order.
    """

    def __init__(self, tasks: Sequence[str], sizes: Mapping[str, int], seed: int) -> None:
        self.sizes, self.seed, self.epoch = dict(sizes), seed, 0
        self._rows: dict[str, list[int]] = {}
        for i, task in enumerate(tasks):
            self._rows.setdefault(task, []).append(i)

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch, by accelerate and the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(math.ceil(len(rows) / self.sizes[task]) for task, rows in self._rows.items())

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = []
        for task, rows in self._rows.items():
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            size = self.sizes[task]
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]
