"""Frozen embeddings as rows: a row is a dimension, or a token."""

import torch
from torch import Tensor

from ... import functional as F
from .linear import Dense, Transposed


class Embedding(Transposed):
    """`nn.Embedding`: a row is one dimension over the whole vocabulary, as in PEFT; the weight is stored (I, O)."""

    kind = "embedding"

    @property
    def factor(self) -> Tensor | None:
        """What the layer multiplies its rows by (Gemma's embed_scale), or None."""
        factor = getattr(self.module, "embed_scale", None)
        return factor if factor is None or isinstance(factor, Tensor) else torch.tensor(float(factor))

    def triton_weight(self) -> Tensor | None:
        return None

    # by blocks of tokens: a block of dimensions would read the whole table
    def row_norm_sq(self) -> Tensor:
        sums_O = torch.zeros(self.shape[0], dtype=F.sum_dtype(self.dtype), device=self.device)
        for tokens in F.row_blocks(*self._weight.shape):
            sums_O += self._weight.detach()[tokens].to(sums_O.dtype).square().sum(0)
        return sums_O

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return F.transposed_times(self._weight.detach(), a_RI.detach().T).T

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        return F.times_transposed(self._weight.detach(), c_OR.detach().T).T


class TokenEmbedding(Embedding):
    """`nn.Embedding` with tokens as rows, as MLX has it: the weight as it is stored, (V, dimensions)."""

    kind = "token_embedding"

    W_OI, _stored, row_norm_sq = Dense.W_OI, Dense._stored, Dense.row_norm_sq
    times_transposed, transposed_times = Dense.times_transposed, Dense.transposed_times
