"""Rows of q and k in the two orders of rotary embeddings: the halves of a head apart, or their pairs side by side."""

from torch import Tensor

from ..errors import DoraError


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Pairs side by side (Meta's order, torchtune's and llama.cpp's) to halves apart (transformers'), in each head."""
    size = _find_head_size(rows, heads)
    return rows.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Halves apart to pairs side by side."""
    size = _find_head_size(rows, heads)
    return rows.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape)


def _find_head_size(rows: Tensor, heads: int) -> int:
    if rows.dim() == 0 or rows.shape[0] % (2 * heads):
        raise DoraError(f"{tuple(rows.shape)} has not the rows of {heads} heads of even size, as the base model has")
    return rows.shape[0] // heads
