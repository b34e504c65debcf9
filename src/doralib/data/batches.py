"""From rows to batches: padding, pairs of answers, or packed rows with a position of its own for each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prepare import IGNORED, Row


@dataclass(frozen=True)
class Collator:
    """Rows of one batch as tensors (rows, longest), padded on the right to a multiple.

    A row's labels are one for each token, or one alone for a classifier. Packed rows have no attention_mask: positions
    that begin anew tell rows apart.
    """

    pad_id: int
    multiple: int = 8
    most: int | None = None
    """Positions that the model has, where padding would go beyond them."""
    flat: bool = False
    """Lay packed sequences one after the other, (1, all tokens): flash attention tells rows apart only there."""
    block_mask: torch.dtype | None = None
    """Packed rows get a mask (rows, 1, longest, longest) of this dtype, for models that do not heed positions."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Keys input_ids, labels and attention_mask; of packed rows position_ids and num_tokens in place of it."""
        if "lengths" not in rows[0]:
            return self._padded(rows)
        if self.flat:
            rows = [{name: [each for row in rows for each in row[name]] for name in ("input_ids", "labels", "lengths")}]
        return self._packed(rows)

    def _padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padded = longest + -longest % self.multiple
        longest = padded if self.most is None else max(longest, min(padded, self.most))
        fill = lambda values, value: [*values, *[value] * (longest - len(values))]
        by_token = isinstance(rows[0]["labels"], list)
        return {
            "input_ids": torch.tensor([fill(row["input_ids"], self.pad_id) for row in rows]),
            "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([fill(row["labels"], IGNORED) if by_token else row["labels"] for row in rows]),
        }

    def _packed(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Padding is a row of its own, which nothing is learned from."""
        used = [len(row["input_ids"]) for row in rows]
        longest = max(used)
        longest += 0 if self.flat else -longest % self.multiple
        fill = lambda values, value: [*values, *[value] * (longest - len(values))]
        lengths = [[*row["lengths"], longest - count] for row, count in zip(rows, used, strict=True)]
        mask = {} if self.block_mask is None else {"attention_mask": make_block_mask(lengths, self.block_mask)}
        return {
            "input_ids": torch.tensor([fill(row["input_ids"], self.pad_id) for row in rows]),
            "position_ids": torch.tensor([[i for length in each for i in range(length)] for each in lengths]),
            "labels": torch.tensor([fill(row["labels"], IGNORED) for row in rows]),
            "num_tokens": torch.tensor(sum(used)),
            **mask,
        }


@dataclass(frozen=True)
class PairCollator:
    """Sources and targets of one batch, each padded on the right: input_ids, attention_mask, labels and num_tokens."""

    pad_id: int
    multiple: int = 8
    most: int | None = None
    """Positions that encoder and decoder have, where padding would go beyond them."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        sources, targets = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        return {
            "input_ids": self.pad(sources, self.pad_id),
            "attention_mask": self.pad([[1] * len(source) for source in sources], 0),
            "labels": self.pad(targets, IGNORED),
            "num_tokens": torch.tensor(sum(map(len, (*sources, *targets)))),
        }

    def pad(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        """(rows, longest)."""
        longest = max(map(len, rows))
        padded = longest + -longest % self.multiple
        longest = padded if self.most is None else max(longest, min(padded, self.most))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


@dataclass(frozen=True)
class OddsCollator:
    """Pairs of answers as ORPO takes them: each answer with its prompt, padded on the right.

    Keys ``chosen_`` and ``rejected_`` with input_ids, attention_mask and labels, (rows, longest).
    """

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for side in ("chosen", "rejected"):
            texts = [[*row["prompt_ids"], *row[f"{side}_ids"]] for row in rows]
            longest = max(map(len, texts))
            fill = lambda values, value, longest=longest: [*values, *[value] * (longest - len(values))]
            labels = [[IGNORED] * len(row["prompt_ids"]) + list(row[f"{side}_ids"]) for row in rows]
            batch[f"{side}_input_ids"] = torch.tensor([fill(text, self.pad_id) for text in texts])
            batch[f"{side}_attention_mask"] = torch.tensor([fill([1] * len(text), 0) for text in texts])
            batch[f"{side}_labels"] = torch.tensor([fill(each, IGNORED) for each in labels])
        return batch


def make_block_mask(lengths: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Causal within each row of some lengths: 0 where a token is seen, the lowest number elsewhere; (B, 1, T, T)."""
    rows_BT = torch.tensor([[k for k, length in enumerate(each) for _ in range(length)] for each in lengths])
    seen_B1TT = (rows_BT[:, None, :, None] == rows_BT[:, None, None, :]).tril()
    return torch.zeros(seen_B1TT.shape, dtype=dtype).masked_fill(~seen_B1TT, torch.finfo(dtype).min)
