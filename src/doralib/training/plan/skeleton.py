"""A recipe's model without its values: from config.json alone, adapted, on the meta device, with few of its blocks."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from ...adapters.adapt import adapt
from ...checkpoints.kind import HeadKind
from ...config import DoraConfig
from ...recipe import Recipe
from .storage import StoredLinear, find_storage_of, replace_quantized

TEXT_HEADS: dict[HeadKind, Any] = {
    "classify": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}
# settings that may tell one block of a model from another
_BY_BLOCK = ("target_modules", "exclude_modules", "magnitude_modules", "rank_pattern", "alpha_pattern", "fused_modules")


@dataclass(frozen=True)
class Weights:
    """Bytes and numbers of a model's parameters."""

    frozen_bytes: int
    frozen: int
    quantized: int
    """Of the frozen ones."""
    trained_bytes: int
    trained: int

    def plus(self, other: "Weights", times: int = 1) -> "Weights":
        """The sum with so many times another; -1: the difference."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Weights(*(mine + times * theirs for mine, theirs in pairs))


class Skeleton:
    """The model of a recipe on the meta device.

    Args:
        config: The model's own, which is not changed.
        kind: Of its head; None: a language model.
    """

    def __init__(self, recipe: Recipe, config: Any, kind: HeadKind | None) -> None:
        self.recipe, self.stored = recipe, find_storage_of(recipe.model, config)
        config = copy.deepcopy(config)
        # the kernels keep the same bytes, and need not be installed here
        if config._attn_implementation not in ("eager", None):
            config._attn_implementation = "sdpa"
        attention = recipe.model.attn_implementation
        with torch.device("meta"):
            self.plain: Any = (AutoModelForCausalLM if kind is None else TEXT_HEADS[kind]).from_config(
                config,
                dtype=find_dtype(recipe, config),
                trust_remote_code=recipe.model.trust_remote_code,
                attn_implementation="eager" if attention == "eager" else "sdpa",
            )
        name, blocks = find_blocks(self.plain)
        alike = blocks is not None and _are_alike(blocks) and not _differs_by_block(recipe.adapter)
        self.count = len(blocks) if blocks is not None and alike else 1
        """How many blocks there are of one kind; 1 where they differ: the model is then taken whole."""
        self._name = name if alike and self.count > 2 else ""

    @property
    def few(self) -> tuple[int, ...]:
        """Numbers of blocks of which all else follows."""
        return (1, 2) if self._name else (self.count,)

    def adapted(self, blocks: int) -> Any:
        """A copy with so many of its blocks, adapted, in training mode, as the recipe checkpoints it."""
        model = copy.deepcopy(self.plain)
        if self._name:
            del model.get_submodule(self._name)[blocks:]
        replace_quantized(model, self.stored)
        adapt(model, self.recipe.adapter)
        training = self.recipe.training
        if training.get("gradient_checkpointing") or training.get("activation_checkpointing"):
            model.gradient_checkpointing_enable()
        return model.train()

    def small_config(self, blocks: int) -> Any:
        """The model's settings with so many blocks; None where it cannot be cut."""
        if not self._name:
            return None
        config = copy.deepcopy(self.plain.config)
        text = config.get_text_config()
        text.num_hidden_layers = blocks
        if isinstance(getattr(text, "layer_types", None), list):
            text.layer_types = text.layer_types[:blocks]
        return config


def find_dtype(recipe: Recipe, config: Any) -> torch.dtype:
    """What the weights are held in, or were before they are quantized."""
    said = recipe.model.dtype
    if said != "auto":
        return getattr(torch, said)
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def weigh(model: nn.Module) -> Weights:
    """What a skeleton's parameters take; a tensor that has several names once."""
    frozen_bytes = frozen = quantized = trained_bytes = trained = 0
    for _, tensor, count in _parameters(model):
        if tensor.requires_grad:
            trained_bytes, trained = trained_bytes + tensor.nbytes, trained + count
        else:
            frozen_bytes, frozen = frozen_bytes + tensor.nbytes, frozen + count
            quantized += count if count != tensor.numel() else 0
    return Weights(frozen_bytes, frozen, quantized, trained_bytes, trained)


def find_widest(model: nn.Module) -> int:
    """Elements of the largest quantized layer: one at a time is made dense."""
    return max((count for _, tensor, count in _parameters(model) if count != tensor.numel()), default=0)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Every tensor once, and how many weights it stands for."""
    seen = set()
    for name, module in model.named_modules():
        packed = module._buffers.items() if isinstance(module, StoredLinear) else ()
        for key, tensor in (*module._parameters.items(), *packed):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                stands_for = module.count if isinstance(module, StoredLinear) and key == "packed" else tensor.numel()
                yield f"{name}.{key}", tensor, stands_for


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | None]:
    """The longest list of modules of one class: where most of a model's parameters are."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(each) for each in module}) == 1
    }
    if not lists:
        return "", None
    name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name, lists[name]


def _are_alike(blocks: nn.ModuleList) -> bool:
    """Whether the blocks have the same parts, and see the same tokens."""

    def described(block: nn.Module) -> Any:
        kinds = [type(module).__qualname__ for module in block.modules()]
        window = [getattr(module, "sliding_window", None) for module in block.modules()]
        return kinds, window, [(name, tuple(p.shape)) for name, p in block.named_parameters()]

    first = described(blocks[0])
    return all(described(block) == first for block in blocks)


def _differs_by_block(config: DoraConfig) -> bool:
    """Whether a name or a pattern of the adapter's settings tells the blocks apart."""
    return any(re.search(r"\d|\[|\\|\(", str(getattr(config, field) or "").strip("()")) for field in _BY_BLOCK)
