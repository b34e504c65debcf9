"""One linear layer by every method, with the same frozen weight."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from doralib import functional as F
from doralib.config import DoraConfig
from doralib.kernels import eager, fused
from doralib.layers.linear import DoraLinear

S = 2.0


class TritonLayer(nn.Module):
    """The kernels with as little around them as a layer needs; `refresh` makes the norm stale before every call."""

    def __init__(self, base: nn.Linear, R: int, *, dora: bool = True, refresh: bool = False) -> None:
        super().__init__()
        self.base_layer, self.refresh = base, refresh
        (O, I), device = base.weight.shape, base.weight.device
        self.lora_A = nn.Parameter(torch.randn(R, I, device=device) * I**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(O, R, device=device))
        self.magnitude = nn.Parameter(F.row_norm_sq(base.weight).sqrt()) if dora else None
        self.seen_a, self.seen_sb = torch.full_like(self.lora_A, torch.nan), torch.full_like(self.lora_B, torch.nan)
        self.seen_a, self.seen_sb = self.seen_a.detach(), self.seen_sb.detach()
        self.n_O = torch.empty(O, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """DoRA, or without a magnitude LoRA."""
        W_OI, a, b = self.base_layer.weight, self.lora_A, self.lora_B
        gain_O = None
        if self.magnitude is not None:
            if self.refresh:
                self.seen_sb[0, 0].fill_(torch.nan)
            n_O = fused.fresh_row_norm(W_OI, a.detach(), b.detach(), S, self.seen_a, self.seen_sb, self.n_O)
            gain_O = F.gain(self.magnitude, n_O)
        return fused.dora_linear(x, W_OI, a, b, gain_O, S, self.base_layer.bias)


class EagerLayer(TritonLayer):
    """The same with `eager.dora_linear` and a norm that is never computed again."""

    def forward(self, x: Tensor) -> Tensor:
        """DoRA with the norm of the start."""
        gain_O = self.magnitude / self.magnitude.detach()
        return eager.dora_linear(x, self.base_layer.weight, self.lora_A, self.lora_B, gain_O, S, self.base_layer.bias)


class Autocast(nn.Module):
    """A layer under bfloat16 autocast, as a Trainer with bf16=True runs it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's output."""
        device = next(self.inner.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            return self.inner(*args, **kwargs)


def frozen(W_OI: Tensor) -> nn.Linear:
    """A frozen layer that shares the weight."""
    layer = nn.Linear(W_OI.shape[1], W_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W_OI, requires_grad=False)
    return layer


def peft_layer(W_OI: Tensor, R: int, *, dora: bool, fp32: bool) -> nn.Module:
    """PEFT's layer: adapters in bfloat16, its fastest, or as it makes them by default, float32 under autocast."""
    settings = peft.LoraConfig(r=R, lora_alpha=int(S * R), target_modules=["proj"], use_dora=dora, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            nn.Sequential(OrderedDict(proj=frozen(W_OI))), settings, autocast_adapter_dtype=fp32
        )
    layer = model.base_model.model.proj
    return Autocast(layer) if fp32 else layer


def doralib_layer(W_OI: Tensor, R: int) -> nn.Module:
    """The layer that `doralib.adapt` puts in."""
    return DoraLinear(frozen(W_OI), R, S, DoraConfig(r=R, lora_alpha=S * R)).to(W_OI.device)


LAYERS: dict[str, Callable[[Tensor, int], nn.Module]] = {
    "frozen": lambda W, _: frozen(W),
    "peft_lora": lambda W, R: peft_layer(W, R, dora=False, fp32=False),
    "peft_dora": lambda W, R: peft_layer(W, R, dora=True, fp32=False),
    "peft_lora_fp32": lambda W, R: peft_layer(W, R, dora=False, fp32=True),
    "peft_dora_fp32": lambda W, R: peft_layer(W, R, dora=True, fp32=True),
    "triton_lora": lambda W, R: TritonLayer(frozen(W), R, dora=False),
    "triton_dora": lambda W, R: TritonLayer(frozen(W), R),
    "triton_dora_refresh": lambda W, R: TritonLayer(frozen(W), R, refresh=True),
    "eager_dora": lambda W, R: EagerLayer(frozen(W), R),
    "doralib_dora": doralib_layer,
}


def make_layers(W_OI: Tensor, R: int, names: tuple[str, ...] = tuple(LAYERS)) -> dict[str, nn.Module]:
    """The layers of these methods, with an update that is not zero."""
    layers = {name: LAYERS[name](W_OI, R) for name in names}
    factors = [p for layer in layers.values() for name, p in layer.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for b_OR in factors:
            b_OR.normal_(std=0.01 * R**-0.5)
    return layers


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    kept = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
