"""Compute PEFT's DoRA layers with doralib's kernels, in place.

Parameters and files stay the same, and outputs and gradients agree within rounding. There is no second base product
without dropout, no identity matrix, and no NaN on zero rows. Nothing is wrapped: each layer's forward is replaced on
the instance, and `restore` puts PEFT's own back.
"""

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import Note, UsageError
from .kernels import eager
from .kernels.cache import Group, LayerCache
from .kernels.dispatch import on_gpu
from .kernels.dropout import draw
from .layers.base.linear import Dense
from .layers.base.opaque import Opaque
from .layers.base.registry import open_base
from .state import MAGNITUDE

Model = TypeVar("Model", bound=nn.Module)
_PEFT_LAYER = "peft.tuners.lora.layer."
_PEFT_DORA = "peft.tuners.lora.dora"
_TAKEN = "doralib_fast"
_DROPOUTS = (nn.Dropout, nn.Identity)


def accelerate(peft_model: Model) -> Model:
    """Let the DoRA layers of a `PeftModel` compute with doralib's kernels, in place; the model itself is returned.

    Where a call needs what PEFT alone can do (merged or disabled adapters, several at once, adapters without DoRA, a
    base weight that is trained or has hooks, a compiler on a CPU) the layer's own forward is used.

    PEFT's `DoraCaching` has nothing to do there: norms and products are kept between calls anyway, and made anew once
    A, B or m change, which its own caches do not notice.

    Raises:
        UsageError: if there is no DoRA layer, or some cannot be taken: all of them with the reason; nothing is changed.
    """
    layers = {name: m for name, m in peft_model.named_modules() if _is_dora(m)}
    if not layers:
        raise UsageError("accelerate: this model has no PEFT layer with use_dora=True")
    reasons = {name: reason for name, m in layers.items() if (reason := _refusal(m))}
    if reasons:
        lines = [f"{name}: {reason}" for name, reason in list(reasons.items())[:8]]
        raise UsageError(
            "\n  ".join([f"accelerate: {len(reasons)} of {len(layers)} DoRA layers cannot be taken:", *lines])
        )
    _warn_of_small_steps(layers)
    for layer in layers.values():
        if _TAKEN not in layer.__dict__:
            fast = _Fast(layer)
            layer.__dict__[_TAKEN] = fast
            layer.__dict__["forward"] = fast.forward
    Group(layer.__dict__[_TAKEN].cache for layer in layers.values())
    return peft_model


def restore(peft_model: Model) -> Model:
    """PEFT's own forward again, on every layer that `accelerate` took."""
    for layer in peft_model.modules():
        if layer.__dict__.pop(_TAKEN, None) is not None:
            del layer.__dict__["forward"]
    return peft_model


class _Fast:
    """One PEFT layer's forward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        base = open_base(layer.base_layer)  # type: ignore[arg-type]
        assert base is not None
        self.base: Dense = base
        self.cache = LayerCache(base)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        plain = not args and all(value is None for value in kwargs.values())
        if plain and not (layer.disable_adapters or layer.merged or self._has_more(x)) and self._is_ours():
            if not torch.compiler.is_compiling() and getattr(_find_peft_dora(), "ENABLE_DORA_CACHING", False):
                _note_caching()
            return self._dora(x, layer.active_adapters[0])
        own: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return own

    def _is_ours(self) -> bool:
        """Whether one adapter is active, and it is DoRA with a dropout that we know; adapters come and go."""
        layer = self.layer
        name, *more = layer.active_adapters or [""]
        return not more and layer.use_dora.get(name, False) and type(layer.lora_dropout[name]) in _DROPOUTS

    def _has_more(self, x: Tensor) -> bool:
        """Whether the base layer does, or gets, what our kernels leave out."""
        module, weight = self.base.module, self.base.module.weight
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        compiled = torch.compiler.is_compiling() and on_gpu(x) is None
        return bool(hooked) or compiled or bool(weight.requires_grad)

    def _dora(self, x: Tensor, name: str) -> Tensor:
        layer, W_OI = self.layer, self.base.W_OI
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W_OI.dtype)
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        m, s = layer.lora_magnitude_vector[name].weight, float(layer.scaling[name])
        p = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        W_OI = W_OI.to(x.dtype)
        bias_O, dropout = self.base.bias, draw(x, p, exact=True) if p else None
        if not x.is_cpu:
            return (on_gpu(x) or eager).dora_linear(
                x, W_OI, A, B, m / self.cache.norm(A, B, s, detach=True), s, bias_O, dropout
            )
        operands = self.cache.operands(A, B, m, s, bias_O, x.dtype)
        if dropout is None and not torch.is_grad_enabled():
            return eager.infer(x, W_OI, operands, None if bias_O is None else bias_O.to(x.dtype))
        return eager.apply_operands(x, W_OI, (A, B, m), operands, bias_O, dropout)


def _find_peft_dora() -> Any:
    """PEFT's module that the caching is switched on in."""
    return sys.modules.get(_PEFT_DORA)


@functools.cache
def _note_caching() -> None:
    """Say once that PEFT's caches stay empty."""
    warnings.warn(
        "accelerate: DoraCaching has no effect on accelerated layers, which keep their norms between calls anyway",
        Note,
        stacklevel=2,
    )


def _warn_of_small_steps(layers: Mapping[str, nn.Module]) -> None:
    """Warn of trained lengths in 16 bits: near 1, where they start, a step of less than 0.004 is rounded away."""
    dtypes = Counter(
        p.dtype
        for layer in layers.values()
        for name, p in layer.named_parameters()
        if MAGNITUDE in name and p.requires_grad and p.dtype.itemsize < 4
    )
    if dtypes:
        told = ", ".join(f"{count} in {dtype}" for dtype, count in dtypes.items())
        warnings.warn(
            f"accelerate: trained magnitudes are {told}, where small steps are lost and most never move; before the "
            "optimizer is made, put them in float32: for name, p in model.named_parameters(): "
            f'if "{MAGNITUDE}" in name: p.data = p.data.float()',
            stacklevel=3,
        )


def _is_dora(module: nn.Module) -> bool:
    """Whether it is a PEFT layer in which an adapter uses DoRA."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    uses: Any = getattr(module, "use_dora", None)
    return kind.startswith("peft.tuners.lora.") and hasattr(module, "base_layer") and any(dict(uses or {}).values())


def _refusal(layer: nn.Module) -> str:
    """Why a layer cannot be taken, or nothing."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if kind != f"{_PEFT_LAYER}Linear":
        return f"it is PEFT's {type(layer).__qualname__} ({kind}); only its Linear is taken"
    base = open_base(layer.base_layer)  # type: ignore[arg-type]
    if base is None or isinstance(base, Opaque):
        return f"its base, {type(layer.base_layer).__qualname__}, is a storage whose weight cannot be read"
    dropouts: Any = layer.lora_dropout
    odd = [type(d).__name__ for d in dropouts.values() if type(d) not in _DROPOUTS]
    return f"its dropout is {odd[0]}" if odd else ""
