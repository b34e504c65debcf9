"""Adapted embeddings: a length for each dimension over the whole vocabulary, as in PEFT, or each token, as in MLX."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .. import functional as F
from ..config import DoraConfig
from ..errors import DoraError
from .base.embedding import Embedding, TokenEmbedding
from .base.linear import Dense
from .factors.embedding import EmbeddingFactors, TokenFactors
from .factors.low_rank import LowRank
from .init import takes_part_of_weight
from .layer import DoraLayer
from .wrapper import AroundBase, ReadsThrough


class DoraEmbedding(ReadsThrough, AroundBase, DoraLayer):
    """A frozen embedding whose dimensions learn a length (m) and a low-rank turn of direction (B A).

    ``y = f g ∘ (W[:, i] + s B A[:, i])`` for token i with ``g = m / |W + s B A|``, W (dim, vocabulary) and f the factor
    of a scaled embedding. There is no dropout: its input is a token.

    Raises:
        DoraError: with max_norm, for which torch writes to the frozen weight.
    """

    base: Embedding

    def __init__(
        self, base_layer: nn.Module, r: int, scale: float, config: DoraConfig, base: Dense | None = None
    ) -> None:
        if getattr(base_layer, "max_norm", None) is not None:
            raise DoraError("an embedding with max_norm writes to its weight on every call; it cannot be adapted")
        if takes_part_of_weight(config.init_lora_weights):
            raise DoraError(
                f"an embedding has no start {config.init_lora_weights!r}; leave it out of target_modules, or out with "
                "exclude_modules"
            )
        super().__init__(base_layer, r, scale, config, base)

    @staticmethod
    def choose_factors(base: Dense, config: DoraConfig) -> LowRank:  # noqa: ARG004
        return EmbeddingFactors(base)

    def around(self, y: Tensor, tokens: Tensor) -> Tensor:
        (A, B), gain_O = self.factors.pair(self), self.gain()
        sb_OR = B * (self.scale if gain_O is None else (gain_O * self.scale)[:, None])
        if self.base.factor is not None:
            sb_OR = sb_OR * self.base.factor.to(sb_OR)
        a = nnf.embedding(tokens, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        change = a.to(y.dtype) @ sb_OR.to(y.dtype).T
        return y + change if gain_O is None else F.add_gain(y, y, gain_O, change)


class DoraTokenEmbedding(DoraEmbedding):
    """A frozen embedding whose tokens learn a length (m) and a low-rank turn of direction.

    ``y = f g ∘ (W[i] + s (B A[:, i])ᵀ)`` for token i with ``g = m[i] / |W[i] + s (B A[:, i])ᵀ|``, W (vocabulary, dim).
    Only the rows that are looked up are computed, and their lengths anew each time. The parameters are those of
    `DoraEmbedding`, with m (vocabulary,).
    """

    @staticmethod
    def as_rows(base: Dense) -> Dense:
        return TokenEmbedding(base.module) if isinstance(base, Embedding) else base

    @staticmethod
    def choose_factors(base: Dense, config: DoraConfig) -> LowRank:  # noqa: ARG004
        return TokenFactors(base)

    def around(self, y: Tensor, tokens: Tensor) -> Tensor:
        # autocast would take the lengths in half precision
        with F.without_autocast(y):
            A, B = self.factors.pair(self)
            look_up = partial(nnf.embedding, tokens, padding_idx=self.padding_idx)
            assert self.lora_magnitude_vector is not None
            a = look_up(B, scale_grad_by_freq=self.scale_grad_by_freq)
            m = look_up(self.lora_magnitude_vector[:, None], scale_grad_by_freq=self.scale_grad_by_freq)
            change = a @ (A * self.scale)
            n = torch.linalg.vector_norm(look_up(self.base.W_OI).to(change.dtype) + change, dim=-1, keepdim=True)
            g = F.kept(F.gain(m, n.detach() if self.detach_norm else n), a)
            turned = g * change if self.base.factor is None else g * change * self.base.factor.to(change)
            return F.add_gain(y, y, g, turned.to(y.dtype))
