"""The methods that are compared: a name, and how a frozen model gets that adapter. The weights are shared by all."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...adapters.adapt import adapt
from ...config import DoraConfig
from ...errors import UsageError, did_you_mean
from ...peft import accelerate

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
REFERENCE = "peft-lora"
ACCELERATED = "peft-dora-accelerated"
FLOOR = "frozen"


class AdapterSettings(NamedTuple):
    """What is the same for every method."""

    r: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def fields(self) -> dict[str, Any]:
        """What PEFT's configuration and ours call by the same names; s = 2 at every rank."""
        return {"r": self.r, "lora_alpha": 2 * self.r, "lora_dropout": self.dropout}


def import_peft() -> Any:
    """The package `peft`.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import peft.helpers  # noqa: PLC0415  only a measurement needs it
    except ImportError:
        raise UsageError("the benchmarks compare with PEFT, which is not installed: pip install peft==0.21.2") from None
    return peft


def build(name: str, base: nn.Module, adapter: AdapterSettings) -> nn.Module:
    """A model of its own with that adapter, around the base's own weight tensors.

    Raises:
        UsageError: if there is no such subject.
    """
    check_subjects([name])
    return SUBJECTS[name](share_weights(base), adapter)


def check_subjects(names: Iterable[str]) -> list[str]:
    """The names, if each is a row of `SUBJECTS`.

    Raises:
        UsageError: naming all that are not.
    """
    names = list(names)
    if wrong := [f"{name!r}{did_you_mean(name, SUBJECTS)}" for name in names if name not in SUBJECTS]:
        raise UsageError(f"subjects: there is no {', '.join(wrong)}; known: {', '.join(SUBJECTS)}")
    return names


def default_subjects(dtype: str, dropout: float) -> list[str]:
    """Who takes part in a case unless the user says."""
    ours = ["ours-dora-adapter", "ours-dora-exact"] if dropout else ["ours-dora"]
    low = ["peft-lora-bf16"] if dtype == "bfloat16" else []
    return [FLOOR, REFERENCE, *low, "peft-dora", "ours-lora", *ours]


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Which ratios are reported: each to the reference, and ours to the same method of PEFT."""
    names = list(names)
    found = [(name, REFERENCE) for name in names if name != REFERENCE]
    found += [(name, "peft-dora") for name in names if name.startswith("ours-dora") or name == ACCELERATED]
    return [(over, under) for over, under in found if under in names]


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def nudge(model: nn.Module, size: float = 1e-4) -> None:
    """Move what is trained, as an optimizer would: whatever was computed from it before is stale."""
    for p in trained_parameters(model):
        p.add_(torch.randn_like(p), alpha=size)


def _frozen(model: nn.Module, _: AdapterSettings) -> nn.Module:
    model.requires_grad_(False)
    if callable(want_input_gradients := getattr(model, "enable_input_require_grads", None)):
        want_input_gradients()
    return model


def _base(model: nn.Module, _: AdapterSettings) -> nn.Module:
    return model.requires_grad_(False)


def _ours(model: nn.Module, adapter: AdapterSettings, **settings: str) -> nn.Module:
    return adapt(model, DoraConfig(**adapter.fields(), target_modules=adapter.targets, **settings))


def _peft(model: nn.Module, adapter: AdapterSettings, *, use_dora: bool, float32_masters: bool = True) -> nn.Module:
    peft = import_peft()
    config = peft.LoraConfig(use_dora=use_dora, **adapter.fields(), target_modules=list(adapter.targets))
    wrapped: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=float32_masters)
    return wrapped


SUBJECTS: dict[str, Callable[[nn.Module, AdapterSettings], nn.Module]] = {
    "base": _base,
    "frozen": _frozen,  # the same with a gradient of its input: no adapter can cost less
    "peft-lora": partial(_peft, use_dora=False),
    "peft-lora-bf16": partial(_peft, use_dora=False, float32_masters=False),  # adapters in the model's own dtype
    "peft-dora": partial(_peft, use_dora=True),
    ACCELERATED: lambda model, adapter: accelerate(_peft(model, adapter, use_dora=True)),
    "ours-lora": partial(_ours, method="lora"),
    "ours-dora": partial(_ours, method="dora"),
    "ours-dora-adapter": partial(_ours, method="dora", dropout_mode="adapter"),
    "ours-dora-exact": partial(_ours, method="dora", dropout_mode="exact"),
}
