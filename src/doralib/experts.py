"""Adapted stacks of weights: the experts of a mixture, which a module holds as 3-D parameters and multiplies itself."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .config import DoraConfig
from .errors import UsageError, nearest
from .kernels.weights import adapted_weights
from .layers import Masters, ReadsThrough
from .starts import DRAWN
from .state import ExpertsAdapter

_HELP = "list every stack that can be adapted with: doralib targets MODEL"


@dataclass(frozen=True)
class Stack:
    """A 3-D parameter of a module that says which of its axes is which."""

    module: nn.Module
    field: str
    """The parameter's name in the module."""

    @property
    def W_EOI(self) -> Tensor:
        """The weights, rows are output features; a view."""
        W: Tensor = getattr(self.module, self.field)
        return W.mT if self.module.is_transposed else W

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, O, I)."""
        return tuple(self.W_EOI.shape)


class DoraExperts(Masters):
    """A, B and m of every weight of a stack.

    ``V_e = g_e ∘ (W_e + s B_e A_e)`` with ``g_e = m_e / |W_e + s B_e A_e|``, one length per output row of each expert;
    without m (method lora) g is 1. A fresh adapter changes nothing, bit for bit.
    """

    lora_A: nn.Parameter
    """(E, R, I)."""
    lora_B: nn.Parameter
    """(E, O, R)."""
    lora_magnitude_vector: nn.Parameter | None
    """(E, O)."""

    def __init__(self, stack: Stack, r: int, scale: float, config: DoraConfig) -> None:
        super().__init__()
        self.scale, self.detach_norm, self.start = scale, config.detach_norm, config.init_lora_weights
        E, O, I = stack.shape
        W = stack.W_EOI
        dtype, device = F.sum_dtype(W.dtype), W.device
        self.lora_A = nn.Parameter(torch.empty(E, r, I, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(E, O, r, dtype=dtype, device=device))
        m_EO = nn.Parameter(torch.empty(E, O, dtype=dtype, device=device)) if config.has_magnitude else None
        self.register_parameter("lora_magnitude_vector", m_EO)
        self.reset_parameters(W)

    @torch.no_grad()
    def reset_parameters(self, W_EOI: Tensor) -> None:
        """Back to the start: every A as the paper draws it, B = 0, m = |W|."""
        for a_RI in self.lora_A:
            DRAWN[self.start](a_RI)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            for m_O, W_OI in zip(self.lora_magnitude_vector, W_EOI, strict=True):
                m_O.copy_(F.row_norm_sq(W_OI).sqrt())

    def weights(self, W_EOI: Tensor) -> Tensor:
        """The adapted weights, with gradients to A, B and m; the norm is computed anew each time."""
        values = self.lora_A, self.lora_B, self.lora_magnitude_vector
        return adapted_weights(W_EOI, *values, self.scale, detach_norm=self.detach_norm)

    def state(self) -> ExpertsAdapter:
        """The trained values; views, not copies."""
        m_EO = self.lora_magnitude_vector
        values = self.lora_A.detach(), self.lora_B.detach(), None if m_EO is None else m_EO.detach()
        return ExpertsAdapter(*values, self.scale)

    def extra_repr(self) -> str:
        method = "lora" if self.lora_magnitude_vector is None else "dora"
        return f"{method}, experts={len(self.lora_A)}, r={self.lora_A.shape[1]}, scale={self.scale:g}"


class AdaptedExperts(ReadsThrough):
    """A module some of whose stacks of weights are adapted: during its own forward it reads the adapted weights.

    Each adapted stack is made once a call, in the dtype of the frozen one, and kept while a backward pass may need it.

    Args:
        base_layer: Frozen here; kept as it is.
        names: Whole names of the parameters in the model; their last parts are names in the module.
    """

    def __init__(self, base_layer: nn.Module, names: Sequence[str], config: DoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.enabled = True
        self.fields = tuple(name.rpartition(".")[2] for name in names)
        for name, field in zip(names, self.fields, strict=True):
            adapter = DoraExperts(self._stack(field), config.rank_of(name), config.scale_of(name), config)
            setattr(self, field, adapter)  # add_module finds the parameter of that name through the base

    @property
    def stacks(self) -> dict[str, DoraExperts]:
        """The adapter of each stack, by the parameter's name in the module."""
        return {field: self._modules[field] for field in self.fields}  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer takes, and what it would return."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, self._weights(), args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The module with the adapted weights in the places of its own."""
        module = copy.copy(self.base_layer)
        weights = {field: nn.Parameter(weight, requires_grad=False) for field, weight in self._weights().items()}
        module._parameters = {**self.base_layer._parameters, **weights}
        return module

    def _weights(self) -> dict[str, Tensor]:
        """By name, stored as the module stores them."""
        out = {}
        for field in self.fields:
            weights = self.stacks[field].weights(self._stack(field).W_EOI)
            out[field] = weights.mT if self.base_layer.is_transposed else weights
        return out

    def _stack(self, field: str) -> Stack:
        return Stack(self.base_layer, field)


def expert_weights(model: nn.Module) -> dict[str, Stack]:
    """Every stack of weights that can be adapted, by its whole name; those that are adapted already are left out."""
    return {
        f"{name}.{field}": Stack(module, field)
        for name, module in model.named_modules()
        if name and isinstance(getattr(module, "is_transposed", None), bool) and not name.endswith(".base_layer")
        for field, p in module._parameters.items()
        if p is not None and p.dim() == 3 and p.is_floating_point()
    }


def choose_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Whole names of the stacks to adapt, in model order.

    Raises:
        UsageError: a name that no parameter has, a parameter that is no stack of weights, or of which it cannot be told
            which axis is the output, or that is tied; all of them at once.
    """
    if not names:
        return []
    owners = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(name)
    known, parameters = expert_weights(model), dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    problems = []
    for target in names:
        found = [name for name in parameters if name == target or name.endswith(f".{target}")]
        chosen.update(found)
        if not found:
            near = nearest(target, {name.rpartition(".")[2] for name in known}) or sorted(known)[:3]
            problems.append(f"no parameter is named {target!r}; this model has: {', '.join(near) or 'none'}")
    for name in [name for name in parameters if name in chosen]:
        p, others = parameters[name], [other for other in owners[id(parameters[name])] if other != name]
        if p.dim() != 3:
            problems.append(f"{name} {tuple(p.shape)} is no stack of weights; a layer goes into target_modules")
        elif name not in known:
            problems.append(
                f"{name}: its module does not say which axis is the output; set `is_transposed` on it: False where it "
                "is stored (experts, out, in), True where (experts, in, out)"
            )
        elif others:
            problems.append(f"{name} is tied to {', '.join(others)}: one weight cannot be adapted in one place only")
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UsageError("\n  ".join(["target_parameters:", *problems[:8], *more, _HELP]))
    return [name for name in known if name in chosen]
