"""The loss of a causal language model with logits only where there are labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..data.prepare import IGNORED


class LabelLoss:
    """Cross entropy over the labelled tokens; the vocabulary head sees no other position.

    The head is met on its way in: a hook hands it the labelled rows of the hidden states as one sequence, so whatever
    the model does to its logits afterwards (scaling, soft caps) still happens. A model that never calls its head as a
    module gets the full logits and the same loss.

    Args:
        model: A causal language model for which `is_possible` holds.
        label_smoothing: Share of the target spread over the vocabulary.
    """

    shifts_labels = True
    """A label is the token that comes next."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self._labelled_BT: Tensor | None = None
        self._hook = _head(model).register_forward_pre_hook(self._select)

    @staticmethod
    def is_possible(model: nn.Module) -> bool:
        """Whether the loss is plain next-token cross entropy; a router's own loss, say, comes on top of it."""
        # models of pictures and text have the same loss under the other name, models of two texts another one
        two_texts = getattr(model.config, "is_encoder_decoder", False)
        plain = getattr(model, "loss_type", None) in (
            "ForCausalLM",
            *([] if two_texts else ["ForConditionalGeneration"]),
        )
        return (
            plain and isinstance(_head(model), nn.Module) and not getattr(model.config, "output_router_logits", False)
        )

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the labelled tokens, and their number.

        Args:
            model: The model, or what wraps it (DDP, autocast).
            inputs: With labels (B, T) not yet shifted.
        """
        labels_BT = inputs["labels"]
        labelled_BT = nnf.pad(labels_BT[:, 1:] != IGNORED, (0, 1), value=False)
        self._labelled_BT = labelled_BT
        try:
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            logits = model(**rest, use_cache=False).logits
        finally:
            self._labelled_BT = None
        # the last place of a row never has a next token, so (1, N) of the hook cannot be mistaken for (B, T)
        logits_NV = logits[labelled_BT] if logits.shape[:2] == labels_BT.shape else logits[0]
        targets_N = labels_BT[:, 1:][labelled_BT[:, :-1]]
        loss = nnf.cross_entropy(logits_NV.float(), targets_N, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, torch.tensor(len(targets_N), device=loss.device)

    def remove(self) -> None:
        """Take the hook off: the model is as before."""
        self._hook.remove()

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._labelled_BT is None or not args or args[0].shape[:2] != self._labelled_BT.shape:
            return None
        return (args[0][self._labelled_BT][None], *args[1:])


class HeadLoss:
    """Cross entropy of a classifier, over texts, words or sounds: a sum and a count, so that batches do not matter.

    Args:
        label_smoothing: Share of the target spread over the labels.
    """

    shifts_labels = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    @staticmethod
    def is_possible(model: nn.Module) -> bool:
        """Whether the loss is plain cross entropy over labels: no regression, and no several labels a text."""
        config: Any = model.config
        kind, problem = getattr(model, "loss_type", None), getattr(config, "problem_type", None)
        kinds = ("ForSequenceClassification", "ForTokenClassification", "ForAudioClassification")
        plain = kind in kinds and config.num_labels > 1
        return bool(plain and problem in (None, "single_label_classification"))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the labels, and their number."""
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return _sum_entropy(logits, inputs["labels"], self.label_smoothing)

    def remove(self) -> None:
        """Nothing was put on the model."""


class DecoderLoss:
    """Cross entropy of what a decoder writes, whose input the model makes of the labels itself: a sum and a count.

    Args:
        label_smoothing: Share of the target spread over the vocabulary.
    """

    shifts_labels = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    @staticmethod
    def is_possible(model: nn.Module) -> bool:
        """Whether the loss is plain cross entropy over the labels; a router's own loss, say, comes on top of it."""
        config: Any = model.config
        plain = getattr(model, "loss_type", None) in (None, "ForConditionalGeneration")
        writes = getattr(config, "is_encoder_decoder", False) and hasattr(model, "generate")
        return bool(plain and writes and not getattr(config, "output_router_logits", False))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the labels, and their number."""
        return _sum_entropy(model(**inputs, use_cache=False).logits, inputs["labels"], self.label_smoothing)

    def remove(self) -> None:
        """Nothing was put on the model."""


class FrameLoss:
    """CTC: how unlikely the letters are in any frames, a sum over rows with the number of letters.

    Args:
        model: A model for which `is_possible` holds; until `remove` it sums where it would take means.
    """

    shifts_labels = False

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._config, self._reduction = config, config.ctc_loss_reduction
        config.ctc_loss_reduction = "sum"

    @staticmethod
    def is_possible(model: nn.Module) -> bool:
        """Whether the model names letters for frames."""
        return type(model).__name__.endswith("ForCTC") and hasattr(model.config, "ctc_loss_reduction")

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the rows, and the number of their labels."""
        return model(**inputs).loss, (inputs["labels"] != IGNORED).sum()

    def remove(self) -> None:
        """The model takes means again."""
        self._config.ctc_loss_reduction = self._reduction


def _sum_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy over the labels that count, in float32, and their number.

    Args:
        logits: (..., L).
        labels: (...), numbers below L, or `IGNORED`.
    """
    learned = labels != IGNORED
    found = nnf.cross_entropy(
        logits[learned].float(), labels[learned], reduction="sum", label_smoothing=label_smoothing
    )
    return found, learned.sum()


def _head(model: nn.Module) -> Any:
    return model.get_output_embeddings()  # type: ignore[operator]  # every transformers model has it
