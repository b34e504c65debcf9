"""The adapter's settings with what follows from the model: its new tokens, its head, the layers of its kind."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checkpoints.models import find_head_modules
from ..config import DoraConfig
from ..errors import UsageError
from ..recipe import Recipe
from .modality import DrawingModality, Modality, TargetingModality
from .tokens import add_new_tokens


def configure_adapter(modality: Modality, model: nn.Module, processor: Any, recipe: Recipe) -> DoraConfig:
    """The settings of a recipe's adapter; model and processor get the new tokens.

    Raises:
        UsageError: if they do not go with the model.
    """
    if isinstance(modality, DrawingModality):
        config = modality.configure(model, processor, recipe.adapter)
    else:
        config = add_new_tokens(model, getattr(processor, "tokenizer", processor), recipe)
    config = _train_head(config, find_head_modules(model))
    return modality.choose_targets(model, config) if isinstance(modality, TargetingModality) else config


def _train_head(config: DoraConfig, head: Sequence[str]) -> DoraConfig:
    """The settings with which a head that the base may lack is trained too.

    Raises:
        UsageError: if it would be left out.
    """
    if not head or (config.method == "full" and config.target_modules is None):
        return config
    if config.method != "full":
        return config.model_copy(update={"modules_to_save": tuple(dict.fromkeys((*config.modules_to_save, *head)))})
    if isinstance(config.target_modules, str):
        raise UsageError(
            f"adapter.target_modules {config.target_modules!r} leaves out {', '.join(head)}, which is new; with method "
            "full name the modules, or leave target_modules out to train all"
        )
    return config.model_copy(update={"target_modules": tuple(dict.fromkeys((*(config.target_modules or ()), *head)))})
