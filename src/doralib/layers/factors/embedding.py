"""Factors of an embedding, under PEFT's names for them; by tokens they are the same two tensors turned over."""

from torch import Tensor, nn

from .low_rank import Holder, LowRank


class EmbeddingFactors(LowRank):
    """`lora_embedding_A` (R, vocabulary) and `lora_embedding_B` (dim, R).

    As in PEFT the start is A = 0, B normal: a padding token's column of A gets no gradient, so a padding row of zeros
    stays zero.
    """

    def add_to(self, layer: Holder, r: int) -> None:
        layer.lora_embedding_A, layer.lora_embedding_B = self._empty(r)

    def reset(self, layer: Holder) -> None:
        nn.init.zeros_(layer.lora_embedding_A)
        nn.init.normal_(layer.lora_embedding_B)

    def pair(self, layer: Holder) -> tuple[Tensor, Tensor]:
        return layer.lora_embedding_A, layer.lora_embedding_B

    def rank(self, layer: Holder) -> int:
        return len(layer.lora_embedding_A)


class TokenFactors(EmbeddingFactors):
    """The same parameters by tokens: A (R, dim) is `lora_embedding_B` turned over, B (vocabulary, R) the other."""

    def add_to(self, layer: Holder, r: int) -> None:
        a, b = self._empty(r)
        layer.lora_embedding_A, layer.lora_embedding_B = (nn.Parameter(p.new_empty(p.T.shape)) for p in (b, a))

    def pair(self, layer: Holder) -> tuple[Tensor, Tensor]:
        """Views."""
        return layer.lora_embedding_B.T, layer.lora_embedding_A.T
