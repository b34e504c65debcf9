"""Tokens trained one by one: rows of a frozen embedding, and of the output head that is tied to it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..errors import DoraError, UsageError
from ..state import AdapterState, RowValues
from .wrapper import AdapterLayer, Masters, ReadsThrough


class TrainedRows(ReadsThrough, Masters, AdapterLayer):
    """A frozen embedding, or linear layer, some of whose rows are replaced by trained ones.

    Each row has values of its own and is no change of the frozen one, as in PEFT: what a resize of the vocabulary drew
    for new tokens does not matter. The rows start as the frozen ones, and are float32 masters.

    Args:
        index: Which rows.
        like: The layer of the tied weight whose rows these are too.

    Raises:
        UsageError: if a row is not there, or named twice.
        DoraError: if the module has no rows that are looked up or multiplied.
    """

    index_N: Tensor
    trainable_tokens_delta: nn.Parameter
    """(N, D), by PEFT's name: the rows themselves."""

    def __init__(self, base_layer: nn.Module, index: Sequence[int], like: "TrainedRows | None" = None) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Embedding | nn.Linear):
            raise DoraError(f"trainable_token_indices: a {type(base_layer).__name__} has no rows that are tokens")
        weight = base_layer.weight
        if len({*index}) < len(index):
            raise UsageError("trainable_token_indices name a token twice")
        if index and not (min(index) >= 0 and max(index) < len(weight)):
            raise UsageError(f"trainable_token_indices: there is no token {max(index)} among {len(weight)}")
        self.base_layer = base_layer.requires_grad_(False)
        self.enabled, self.tied = True, like is not None
        self.register_buffer("index_N", torch.tensor(list(index), device=weight.device), persistent=False)
        place = torch.full((len(weight),), -1, device=weight.device)
        place[self.index_N] = torch.arange(len(index), device=weight.device)
        self.register_buffer("place_V", place, persistent=False)
        rows_ND = weight.detach()[self.index_N].to(F.sum_dtype(weight.dtype))
        self.trainable_tokens_delta = nn.Parameter(rows_ND) if like is None else like.trainable_tokens_delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the frozen layer would return with the trained rows in its weight."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        rows_ND = self.trainable_tokens_delta.to(self.base_layer.weight.dtype)
        if isinstance(self.base_layer, nn.Linear):
            bias = None if self.base_layer.bias is None else self.base_layer.bias[self.index_N]
            return y.index_copy(-1, self.index_N, nn.functional.linear(x, rows_ND, bias).to(y.dtype))
        factor = getattr(self.base_layer, "embed_scale", None)
        if factor is not None:
            rows_ND = rows_ND * (factor.to(rows_ND) if isinstance(factor, Tensor) else factor)
        place = self.place_V[x]
        return torch.where((place >= 0)[..., None], rows_ND[place.clamp_min(0)].to(y.dtype), y)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The frozen module with the trained rows in a weight of its own, cast once."""
        merged, weight = copy.copy(self.base_layer), self.base_layer.weight
        merged._parameters = dict(self.base_layer._parameters)
        merged.weight = nn.Parameter(
            weight.index_copy(0, self.index_N, self.trainable_tokens_delta.to(weight)), requires_grad=False
        )
        return merged

    def trained_rows(self, place: str) -> dict[str, RowValues]:
        if self.tied:
            return {}
        return {f"{place}.weight": RowValues(self.index_N, self.trainable_tokens_delta.detach())}

    @torch.no_grad()
    def fill_from(self, state: AdapterState, place: str) -> None:
        if self.tied:
            return
        given = state.rows.get(f"{place}.weight")
        rows_ND = self.base_layer.weight[self.index_N] if given is None else given.rows_ND
        self.trainable_tokens_delta.copy_(rows_ND)

    def extra_repr(self) -> str:
        return f"tokens={len(self.index_N)}, tied={self.tied}"
