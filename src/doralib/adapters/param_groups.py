"""What is trained, as an optimizer's parameter groups: a learning rate by what a parameter is."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

from torch import nn

from ..config import DoraConfig
from ..layers.wrapper import AdapterLayer
from ..state import MAGNITUDE
from .registry import config_of, places_of, trainable


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Every trained parameter of an adapted model in one group, for any `torch.optim` optimizer.

    The rates are the configuration's: `magnitude_lr_ratio`, `loraplus_lr_ratio`, `loraplus_lr_embedding`. Weight decay
    shrinks what turns directions, and whole matrices trained beside it; never a magnitude, bias or norm.
    """
    rates = learning_rates(model, config_of(model), learning_rate)
    decays = {p: weight_decay if _shrinks(name, p) else 0.0 for name, p in trainable(model)}
    options = lambda p: (rates[p], decays[p])
    return [
        {"params": list(group), "lr": rate, "weight_decay": decay}
        for (rate, decay), group in groupby(sorted(rates, key=options), key=options)
    ]


def learning_rates(
    model: nn.Module, config: DoraConfig, learning_rate: float, whole_rate: float | None = None
) -> dict[nn.Parameter, float]:
    """The learning rate of every trained parameter.

    Args:
        whole_rate: Of modules that are trained whole; None: as of all others.
    """
    # a model of several networks may have a rate of its own for some of them
    ratio: Callable[[str], float] = getattr(model, "find_rate_ratio", lambda _: 1.0)
    rates = {p: ratio(name) * _rate(name.rpartition(".")[2], config, learning_rate) for name, p in trainable(model)}
    if whole_rate is not None:
        places = (place for _, place in places_of(model))
        whole = [place for place in places if isinstance(place, AdapterLayer) and place.trains_whole]
        rates |= {p: whole_rate for place in whole for p in place.parameters() if p in rates}
    return rates


def _rate(name: str, config: DoraConfig, learning_rate: float) -> float:
    if name == MAGNITUDE:
        return learning_rate * config.magnitude_lr_ratio
    if name in ("lora_B", "lora_fused_B"):
        return learning_rate * config.loraplus_lr_ratio
    if name.startswith("lora_embedding_") and config.loraplus_lr_embedding is not None:
        return config.loraplus_lr_embedding
    return learning_rate


def _shrinks(name: str, p: nn.Parameter) -> bool:
    return p.dim() > 1 or name.rpartition(".")[2].startswith("vera_lambda_")
