"""Adapted stacks of weights: the experts of a mixture, which a module holds as 3-D parameters and multiplies itself."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import DoraConfig
from ..kernels.experts import adapted_weights
from ..state import ExpertsValues, LayerAdapter
from .factors.low_rank import fill_pairs
from .init import DRAWN
from .wrapper import AdapterLayer, Part, ReadsThrough


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


class DoraExperts(Part):
    """A, B and m of every weight of a stack.

    ``V_e = g_e ∘ (W_e + s B_e A_e)`` with ``g_e = m_e / |W_e + s B_e A_e|``, one length per output row of each expert;
    without m (method lora) g is 1. A fresh adapter changes nothing, bit for bit.
    """

    kind = "experts"
    lora_A: nn.Parameter
    """(E, R, I)."""
    lora_B: nn.Parameter
    """(E, O, R)."""
    lora_magnitude_vector: nn.Parameter | None
    """(E, O)."""

    def __init__(self, stack: Stack, r: int, scale: float, config: DoraConfig) -> None:
        super().__init__()
        self.stack = stack
        self.scale, self.detach_norm, self.start = scale, config.detach_norm, config.init_lora_weights
        E, O, I = stack.shape
        empty = partial(torch.empty, dtype=F.sum_dtype(stack.W_EOI.dtype), device=stack.W_EOI.device)
        self.lora_A, self.lora_B = nn.Parameter(empty(E, r, I)), nn.Parameter(empty(E, O, r))
        m_EO = nn.Parameter(empty(E, O)) if config.has_magnitude else None
        self.register_parameter("lora_magnitude_vector", m_EO)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start: every A as the paper draws it, B = 0, m = |W|."""
        for a_RI in self.lora_A:
            DRAWN[self.start](a_RI)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            for m_O, W_OI in zip(self.lora_magnitude_vector, self.stack.W_EOI, strict=True):
                m_O.copy_(F.row_norm_sq(W_OI).sqrt())

    def weights(self) -> Tensor:
        """The adapted weights, with gradients to A, B and m; the norm is computed anew each time."""
        values = self.lora_A, self.lora_B, self.lora_magnitude_vector
        return adapted_weights(self.stack.W_EOI, *values, self.scale, detach_norm=self.detach_norm)

    def values(self) -> ExpertsValues:
        return ExpertsValues(self.lora_A, self.lora_B, self.lora_magnitude_vector)

    def fill_factors(self, given: LayerAdapter | None) -> None:
        fill_pairs(self.state().pairs(), given, self.scale)

    def row_lengths(self) -> Tensor:
        weights = zip(self.stack.W_EOI, self.lora_A, self.lora_B, strict=True)
        return torch.stack([F.dense_row_norm(W_OI, a, b, self.scale) for W_OI, a, b in weights])

    def extra_repr(self) -> str:
        method = "lora" if self.lora_magnitude_vector is None else "dora"
        return f"{method}, experts={len(self.lora_A)}, r={self.lora_A.shape[1]}, scale={self.scale:g}"


class AdaptedExperts(ReadsThrough, AdapterLayer):
    """A module some of whose stacks of weights are adapted: during its own forward it reads the adapted weights.

    Each adapted stack is made once a call, in the dtype of the frozen one, and kept while a backward pass may need it.
    The parameters are given by their whole names in the model, whose last parts are their names in the module.
    """

    def __init__(self, base_layer: nn.Module, names: Sequence[str], config: DoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.enabled = True
        self.fields = tuple(name.rpartition(".")[2] for name in names)
        for name, field in zip(names, self.fields, strict=True):
            adapter = DoraExperts(Stack(base_layer, field), config.rank_of(name), config.scale_of(name), config)
            setattr(self, field, adapter)  # add_module finds the parameter of that name through the base

    @property
    def stacks(self) -> dict[str, DoraExperts]:
        """The adapter of each stack, by the parameter's name in the module."""
        return {field: self._modules[field] for field in self.fields}  # type: ignore[misc]

    def adapter_parts(self, place: str) -> dict[str, Part]:
        return {f"{place}.{field}": stack for field, stack in self.stacks.items()}

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
        W_EOI = {field: stack.weights() for field, stack in self.stacks.items()}
        return {field: W.mT for field, W in W_EOI.items()} if self.base_layer.is_transposed else W_EOI
