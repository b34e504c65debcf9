"""VL-BART (arXiv 2102.02779): BART whose encoder reads the features of pictures or frames after the words.

Around transformers' BART, which is not changed: the encoder's states are made here and handed to it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import BartConfig, BartForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.bart.modeling_bart import shift_tokens_right

EXTRA_TOKENS = tuple(f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in range(99, -1, -1))
"""Added to the vocabulary at its end; the row of the last but i is what the i-th feature of a picture gets."""


class VisualEmbedding(nn.Module):
    """Features as vectors beside those of words: the sum of what is seen, where, in which picture, and as which one.

    Args:
        features: Numbers that a feature has, F.
        width: Of the model, C.
        images: Pictures that one row may have.
    """

    def __init__(self, features: int, width: int, images: int) -> None:
        super().__init__()
        self.feature = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.position = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width))
        self.image_order = nn.Embedding(images, width)

    def reset(self, std: float, seed: int) -> None:
        """Draw the weights as BART draws its own, from a seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std, generator=generator)
            else:
                nn.init.constant_(p, float(name.endswith("1.weight")))

    def forward(self, features_BNF: Tensor, boxes_BN4: Tensor, images_BN: Tensor, order_BNC: Tensor) -> Tensor:
        """(B, N, C).

        Args:
            features_BNF: Of N places each.
            boxes_BN4: Left, right, top and bottom of each, 0 to 1; zeros where there is none.
            images_BN: Which picture each is of.
            order_BNC: The vector of each one's number within its picture.
        """
        width_BN, height_BN = boxes_BN4[..., 1] - boxes_BN4[..., 0], boxes_BN4[..., 3] - boxes_BN4[..., 2]
        places_BN5 = torch.cat([boxes_BN4, (width_BN * height_BN)[..., None]], dim=-1)
        return self.feature(features_BNF) + self.position(places_BN5) + self.image_order(images_BN) + order_BNC


class VLBart(BartForConditionalGeneration):  # type: ignore[misc]  # transformers has no types
    """BART with a visual embedding, whose settings are ``config.visual``; without features it is BART."""

    accepts_loss_kwargs = False  # the Trainer takes the mean over accumulated batches
    draws_own_rows = True  # of the vocabulary's end, which are never trained: see `extend_vocabulary`

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        visual = config.visual
        self.visual_embedding = VisualEmbedding(visual["features"], config.d_model, visual["images"])
        self.loss_type = "VLBart"  # not transformers' own: a batch has weights
        self.post_init()

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor,
        places: Tensor,
        boxes: Tensor | None = None,
    ) -> tuple[BaseModelOutput, Tensor]:
        """The encoder's states of words and features, (B, T + N, C), and which of them count, (B, T + N).

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding.
            features: (B, N, F).
            places: (B, N, 2), which picture a feature is of and its number there, from 0; -1 for padding.
            boxes: (B, N, 4); None: zeros, as the published models of grids have it.
        """
        encoder, table_VC = self.model.encoder, self.get_input_embeddings().weight
        boxes = features.new_zeros(*features.shape[:2], 4) if boxes is None else boxes
        words_BTC = encoder.embed_tokens(input_ids) + encoder.embed_positions(input_ids)
        images_BN, orders_BN = places.clamp_min(0).unbind(-1)
        order_BNC = nnf.embedding(len(table_VC) - 1 - orders_BN, table_VC)
        seen_BNC = self.visual_embedding(features, boxes, images_BN, order_BNC)
        states = torch.cat([encoder.layernorm_embedding(words_BTC), seen_BNC], dim=1)
        states = nnf.dropout(states, p=encoder.dropout, training=self.training)
        mask = torch.cat([attention_mask, (places[..., 0] >= 0).to(attention_mask.dtype)], dim=1)
        hidden = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=mask)
        for layer in encoder.layers:
            states = layer(states, hidden)
        return BaseModelOutput(last_hidden_state=states), mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        features: Tensor | None = None,
        places: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        **others: Any,
    ) -> Seq2SeqLMOutput:
        """BART's outputs.

        Args:
            input_ids: As the other visual arguments, those of `encode`.
            labels: (B, T), -100 for padding.
            weights: (B, T), what a label's loss is multiplied by before all are added; None: their mean.
            encoder_outputs: What `encode` gave, in place of all that it reads.
            others: Of BART; and boxes, as for `encode`.
        """
        boxes = others.pop("boxes", None)
        if features is not None:
            assert input_ids is not None
            assert attention_mask is not None
            assert places is not None
            encoder_outputs, attention_mask = self.encode(input_ids, attention_mask, features, places, boxes)
            input_ids = None
        if labels is not None:
            config = self.config
            others |= {"use_cache": False}
            others["decoder_input_ids"] = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        others |= {"attention_mask": attention_mask, "encoder_outputs": encoder_outputs}
        output = super().forward(input_ids=input_ids, **others)
        if labels is not None:
            loss_BT = nnf.cross_entropy(output.logits.float().transpose(1, 2), labels, reduction="none")
            output.loss = (loss_BT * weights).sum() if weights is not None else loss_BT.sum() / (labels >= 0).sum()
        return output


def extend_vocabulary(model: VLBart, tokenizer: Any) -> None:
    """Give tokenizer and model the extra tokens, if the tokenizer lacks them.

    Their rows are random and always the same: no adapter trains or keeps them, and every adapter relies on them.
    """
    if EXTRA_TOKENS[-1] in tokenizer.get_vocab():
        return
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA_TOKENS)})
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + len(EXTRA_TOKENS), mean_resizing=False)
    table_VC = model.get_input_embeddings().weight
    # the one generator whose numbers are promised to stay as they are
    drawn = np.random.RandomState(0).normal(0, model.config.init_std, (len(EXTRA_TOKENS), table_VC.shape[1]))
    with torch.no_grad():
        table_VC[-len(EXTRA_TOKENS) :].copy_(torch.from_numpy(drawn))
