"""Objectives beyond labels, by TRL's trainers: preferences (DPO, ORPO, KTO) and rewards (GRPO); the run is ours."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainingArguments

from ..adapters.adapt import disabled
from ..adapters.registry import trainable
from ..errors import UsageError
from ..layers.wrapper import Place
from .trainer import AdapterTrainer

with warnings.catch_warnings():
    # that ORPO's place in TRL may change
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class Reference(nn.Module):
    """A model with its adapter off, magnitudes included: what TRL compares the trained model with.

    It holds no weights of its own. What it returns has no gradient.
    """

    adapted: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config: Any = model.config
        # no child of this module: nothing would be gained from finding its parameters twice
        self.__dict__["adapted"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, as if it had no adapter."""
        with torch.no_grad(), disabled(self.adapted):
            return self.adapted(*args, **kwargs)


class _ObjectiveTrainer(AdapterTrainer):
    """What all of TRL's trainers need to train a run of doralib; the one of TRL comes next in the order of classes."""

    masks: tuple[str, ...] = ("attention_mask",)
    """What in a batch counts its tokens."""
    reads_head = True
    """Whether TRL multiplies by the weight of the head itself, past any adapter on it."""

    def __init__(self, model: Any, args: Any, *others: Any, **more: Any) -> None:
        if self.reads_head and isinstance(model.get_output_embeddings(), Place):
            raise UsageError(
                "objective.kind: TRL multiplies by the weight of the model's head itself, past what is trained on it; "
                "leave the head out of adapter.target_modules, modules_to_save and model.new_tokens, or use kind orpo"
            )
        self._own_forward = model.__dict__.get("forward")
        masters = {p: p.data for _, p in trainable(model)}
        with _hide_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(model, args, *others, **more)
        for p, value in masters.items():
            # TRL casts them to bfloat16 on a quantized base
            p.data = value.to(p.device)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss of a batch, whose tokens are counted."""
        if self.model.training:
            count = torch.stack([inputs[name].sum() for name in self.masks]).sum()
            self.meter.add_tokens(self.accelerator.reduce(count, "sum"))
        with warnings.catch_warnings():
            # TRL asks for is_gradient_checkpointing, which transformers has renamed
            warnings.simplefilter("ignore", FutureWarning)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing: doralib sends no statistics."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the run's own card says how it went."""

    def unlogged(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._kept_metrics().items()}

    def take_up_unlogged(self, measured: dict[str, list[float]]) -> None:
        for name, values in measured.items():
            self._kept_metrics()[name] = values

    def unwrap(self) -> None:
        super().unwrap()
        self.model.__dict__.pop("forward", None)
        if self._own_forward is not None:
            self.model.forward = self._own_forward

    def _kept_metrics(self) -> Any:
        """TRL's own measurements since the last log, by name."""
        return self._metrics["train"]

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        """The rows as they are: they are tokens already."""
        return dataset


class _DpoTrainer(_ObjectiveTrainer, DPOTrainer):  # type: ignore[misc]
    def __init__(self, model: Any, *others: Any, **more: Any) -> None:
        reference = _make_reference(model)
        super().__init__(model, *others, ref_model=reference, **more)
        self.ref_model = _without_changes(reference)


class _KtoTrainer(_ObjectiveTrainer, KTOTrainer):  # type: ignore[misc]
    def __init__(self, model: Any, *others: Any, **more: Any) -> None:
        reference = _make_reference(model)
        super().__init__(model, *others, ref_model=reference, **more)
        self.ref_model = _without_changes(reference)

    def _prepare_dataset(self, dataset: datasets.Dataset, _: Any, args: Any, name: str) -> datasets.Dataset:
        """The rows with the answers of their neighbors in a batch, against which KTO measures how far the model went.

        Their order is drawn once: a file often has all good answers first.
        """
        rows = dataset.shuffle(seed=args.seed) if name == "train" else dataset
        answers, size = rows["completion_ids"][:], args.per_device_train_batch_size
        batches = (answers[start : start + size] for start in range(0, len(answers), size))
        others = [answer for batch in batches for answer in (batch[-1], *batch[:-1])]
        return rows.add_column("KL_completion_ids", others) if self.calculate_KL else rows


class _OrpoTrainer(_ObjectiveTrainer, ORPOTrainer):  # type: ignore[misc]
    masks = ("chosen_attention_mask", "rejected_attention_mask")
    reads_head = False

    def __init__(self, *others: Any, **more: Any) -> None:
        super().__init__(*others, **more)
        # it takes any other collator than its own for a mistake, and says so at each batch
        self.use_dpo_data_collator = True

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:  # noqa: ARG002
        """Nothing more than the row has."""
        return {}

    def _kept_metrics(self) -> Any:
        return self._stored_metrics["train"]


class _GrpoTrainer(_ObjectiveTrainer, GRPOTrainer):  # type: ignore[misc]
    masks = ("prompt_mask", "completion_mask")

    def __init__(self, model: Any, args: Any, *others: Any, **more: Any) -> None:
        beta, args.beta = args.beta, 0.0
        # without a beta it does not load the model a second time
        super().__init__(model, args, *others, **more)
        self.beta = args.beta = beta
        if beta:
            self.ref_model = _make_reference(model)

    def take_up(self, checkpoint: Any) -> None:
        super().take_up(checkpoint)
        # by which it knows when to make new answers
        self._step = self.state.global_step * self.args.gradient_accumulation_steps

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        self.sampler = _Epochs(super()._get_train_sampler(dataset), self.args.seed)
        return self.sampler


class _Epochs(Sampler[int]):
    """TRL's order of prompts, so that it follows from seed and epoch alone and a resumed epoch is the same epoch."""

    def __init__(self, order: Any, seed: int) -> None:
        self.order, self.seed, self.epoch = order, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        if self.order.shuffle:
            self.order.generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(self.order)


ARGUMENTS: Mapping[str, type[TrainingArguments]] = {
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "orpo": ORPOConfig,
    "grpo": GRPOConfig,
}
"""TRL's arguments, by the kind of an objective."""

TRAINERS: Mapping[str, type[AdapterTrainer]] = {
    "dpo": _DpoTrainer,
    "kto": _KtoTrainer,
    "orpo": _OrpoTrainer,
    "grpo": _GrpoTrainer,
}
"""Each with the arguments of `AdapterTrainer`; grpo takes `reward_funcs` too."""


@contextmanager
def _hide_bars() -> Iterator[None]:
    """Let `datasets` draw no bars inside the block."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _make_reference(model: nn.Module) -> nn.Module:
    """The untrained model: the adapter off, or with method full a copy, which costs as much memory again."""
    if any(isinstance(module, Place) for module in model.modules()):
        return Reference(model)
    return copy.deepcopy(model).requires_grad_(False).eval()


def _without_changes(reference: nn.Module) -> nn.Module:
    """A reference as it was before TRL put a forward of its own on it, which would look for weights in it."""
    return Reference(reference.adapted) if isinstance(reference, Reference) else reference
