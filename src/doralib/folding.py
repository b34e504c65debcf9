"""What adapters make of one stored tensor, or of a block of its rows: one formula for every layer kind and method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .functional import combined, merge_weight, merged_change, sum_dtype, swapped_channels
from .state import LayerAdapter


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor of a checkpoint."""

    weight: float
    """Its share: the tensor moves by this times the adapter's own change."""
    what: LayerAdapter | Tensor
    """An adapter of its rows, or the tensor as it was trained whole."""
    transposed: bool = False
    """Whether its rows are not stored as rows: HF Conv1D, embeddings, transposed convolutions."""


def changed(block: Tensor, changes: Sequence[Change], rows: slice, shape: tuple[int, ...]) -> Tensor:
    """The block with every change, before the cast: ``W + Σ w (V - W)``; with one change of weight 1, V itself.

    Args:
        block: (rows, everything else) of the tensor as stored; all of it where a change is transposed.
        rows: which rows of the tensor these are.
        shape: the whole tensor's.
    """
    if not changes:
        return block
    if len(changes) == 1 and changes[0].weight == 1:
        change = changes[0]
        if isinstance(change.what, Tensor):
            return _matrix(change.what)[rows]
        return _on_rows(merge_weight, block, change, rows, shape)
    return combined(block, ((change.weight, _difference(block, change, rows, shape)) for change in changes))


def as_rows(stored: Tensor, adapter: LayerAdapter, *, transposed: bool) -> Tensor:
    """A whole stored weight as the matrix (O, I) of the rows that the adapter changes; a view where it can be."""
    if adapter.kind == "transposed_convolution":
        return swapped_channels(stored, stored.shape[0] // adapter.shape[1]).flatten(1)
    return stored.flatten(1).T if transposed else stored.flatten(1)


def _difference(block: Tensor, change: Change, rows: slice, shape: tuple[int, ...]) -> Tensor:
    if isinstance(change.what, LayerAdapter):
        return _on_rows(merged_change, block, change, rows, shape)
    dtype = sum_dtype(block.dtype)
    return _matrix(change.what)[rows].to(dtype) - block.to(dtype)


def _matrix(value: Tensor) -> Tensor:
    """As `checkpoints.Slot.matrix` says: the first axis by all others."""
    return value.reshape(len(value), -1) if value.dim() else value.reshape(1, 1)


def _on_rows(
    formula: Callable[..., Tensor], block: Tensor, change: Change, rows: slice, shape: tuple[int, ...]
) -> Tensor:
    """The formula on output rows, put back as the block is stored."""
    adapter = change.what
    assert isinstance(adapter, LayerAdapter)
    (a_RI, b_OR), m_O = adapter.factors, adapter.m_O
    if not change.transposed:
        return formula(block, a_RI, b_OR[rows], None if m_O is None else m_O[rows], adapter.scale)
    stored = block.view(shape)
    new_OI = formula(as_rows(stored, adapter, transposed=True), a_RI, b_OR, m_O, adapter.scale)
    if adapter.kind == "transposed_convolution":
        return swapped_channels(new_OI.view(adapter.shape), stored.shape[0] // adapter.shape[1]).flatten(1)
    return new_OI.T
