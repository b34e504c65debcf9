"""BERTScore: how alike two texts are to an encoder, token by token (arXiv 1904.09675).

The package bert-score computes the same; its last release, 0.3.13, does not run with transformers 5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UsageError

_AT_ONCE = 64


@dataclass(frozen=True)
class Likeness:
    """Of a text to a reference, each between -1 and 1."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TextEncoder:
    """An encoder, of which the vectors of one layer are compared."""

    model: nn.Module
    tokenizer: Tokenizer
    layer: int

    @torch.inference_mode()
    def compare(
        self, texts: Sequence[str], references: Sequence[str], tick: Callable[[float], None] = lambda _: None
    ) -> list[Likeness]:
        """The likeness of each text to its reference; 0 for an empty text."""
        vectors = self._encode(list(dict.fromkeys([*texts, *references])), tick)
        return [_compare(*vectors[text], *vectors[other]) for text, other in zip(texts, references, strict=True)]

    def _encode(self, texts: Sequence[str], tick: Callable[[float], None]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each text: unit vectors of its tokens, (T, C), and which of them are words and no marks, (T,)."""
        limit = int(self.model.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
        # where positions are counted from the padding's number on, it takes as many
        limit = min(limit - 2 if self.model.config.model_type == "roberta" else limit, self.tokenizer.model_max_length)  # type: ignore[union-attr]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        ordered = sorted(texts, key=len, reverse=True)
        for start in range(0, len(ordered), _AT_ONCE):
            here = [text.strip() for text in ordered[start : start + _AT_ONCE]]
            made = self.tokenizer(here, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            states = self.model(**made, output_hidden_states=True).hidden_states[self.layer].float()
            units_BTC = nn.functional.normalize(states, dim=-1)
            marks = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])
            words_BT = ~torch.isin(made["input_ids"], marks)
            for i, text in enumerate(ordered[start : start + _AT_ONCE]):
                there = made["attention_mask"][i].bool()
                found[text] = units_BTC[i][there], words_BT[i][there]
            tick(len(here) / len(ordered))
        return found


def load_encoder(name: str, layer: int, setting: str) -> TextEncoder:
    """The encoder in a folder or of a hub name, in float32.

    Raises:
        UsageError: if it cannot be loaded, or has fewer layers.
    """
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{setting}: {name!r} cannot be loaded: {str(error).splitlines()[0]}\n"
            "  fetch it where there is a hub, and name its folder as scorer in a task file of your own (like: ...)"
        ) from None
    if layer > (layers := int(model.config.num_hidden_layers)):
        raise UsageError(f"{setting}_layer: {name} has {layers} layers, and number {layer} was asked for")
    return TextEncoder(model.eval(), tokenizer, layer)


def _compare(text_TC: Tensor, words_T: Tensor, other_RC: Tensor, words_R: Tensor) -> Likeness:
    """Each word by the token of the other text that is most like it; the marks around a text count as such tokens."""
    if not words_T.any():
        return Likeness(0.0, 0.0, 0.0)
    like_TR = text_TC @ other_RC.T
    precision = like_TR.amax(dim=1)[words_T].mean().item()
    recall = like_TR.amax(dim=0)[words_R].mean().item() if words_R.any() else 0.0
    return Likeness(precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)
