"""VeRA and DVoRA: two random matrices shared by every layer, and vectors for each that scale their rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..config import DoraConfig
from ..errors import DoraError
from ..kernels.cache import LayerCache
from ..kernels.dropout import dropped
from ..state import AdapterState, BankValues, LayerAdapter
from .base.linear import Dense
from .linear import DoraLinear
from .wrapper import AroundBase, autocast


class Bank(nn.Module):
    """Frozen random A (R, I) and B (O, R) of the largest shape; each layer takes as much as it needs.

    Drawn on the CPU from one seed, A first, uniform as PEFT draws them, so that the same seed gives PEFT's matrices.
    They stay float32 whatever the model is cast to, and are in no state dict: the seed makes them again.
    """

    A: Tensor
    B: Tensor

    def __init__(self, r: int, num_in: int, num_out: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (r, num_in)), ("B", (num_out, r))):
            drawn = torch.empty(shape, device="meta" if device.type == "meta" else "cpu")
            if not drawn.is_meta:
                bound = math.sqrt(6 / shape[1])
                drawn.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bank":
        kept = {"A": self.A, "B": self.B}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


def bank_for(bases: Sequence[Dense], config: DoraConfig) -> Bank | None:
    """The random matrices for the largest of these layers; None for the methods without."""
    if not config.has_bank or not bases:
        return None
    num_out, num_in = (max(base.shape[axis] for base in bases) for axis in (0, 1))
    return Bank(config.r, num_in, num_out, config.projection_prng_key, bases[0].device)


def find_other_bank(into: AdapterState, given: AdapterState) -> list[str]:
    """A line where the random matrices of one adapter are not the other's."""
    ours, theirs = (
        next((layer.values.bank for layer in state.layers.values() if isinstance(layer.values, BankValues)), None)
        for state in (into, given)
    )
    if ours is None or theirs is None or ours[0].is_meta:
        return []
    if all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True)):
        return []
    return ["the random A and B of the adapter are not the model's: another projection_prng_key, or other layers"]


class _Scaled:
    """`kernels.norm.NormBase` of a layer with ``diag(b) B diag(d) A``: remembered by d and b, which are small."""

    def __init__(self, base: Dense, bank: Bank) -> None:
        self.base, self.bank = base, bank

    def key(self) -> tuple[Any, ...]:
        return (*self.base.key(), self.bank.A.device)

    def triton_weight(self) -> Tensor | None:
        return None

    def row_norm_sq(self) -> Tensor:
        return self.base.row_norm_sq()

    def expands(self, R: int) -> bool:  # noqa: ARG002
        return False

    def adapted_row_norm(self, W_sq_O: Tensor, d_R: Tensor, b_O: Tensor, s: float) -> Tensor:
        values = BankValues((self.bank.A, self.bank.B), d_R, b_O, None, self.base.shape[1])
        return self.base.adapted_row_norm(W_sq_O, values.a_RI, values.b_OR, s)

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        return self.base.times_transposed(a_RI)

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        return self.base.transposed_times(c_OR)


class DoraBank(AroundBase, DoraLinear):
    """A frozen linear layer with ``V = W + diag(b) B diag(d) A``: d and b are trained, and m for DVoRA.

    ``y = g ∘ (x Wᵀ + b ∘ (B (d ∘ (A x)))) + bias`` with ``g = m / |V|``, or 1 for VeRA. The start is b = 0 and
    d = `d_initial`: nothing changes, bit for bit. Sources: arXiv 2310.11454; 2402.09353, section 5.4.
    """

    vera_lambda_d: nn.Parameter
    """(R,)."""
    vera_lambda_b: nn.Parameter
    """(O,)."""

    def __init__(self, base_layer: nn.Module, bank: Bank, config: DoraConfig, base: Dense | None = None) -> None:
        self._freeze(base_layer, 1.0, config, base)
        if self.base.kind != "linear":
            raise DoraError(f"{type(base_layer).__qualname__}: VeRA and DVoRA adapt linear layers only")
        self.bank, self.d_initial = bank, config.d_initial
        self.cache = LayerCache(_Scaled(self.base, bank))
        self._add_parameters(config.r, config)

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """``diag(d) A``, (R, I), made anew."""
        return self.factors[0]

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """``diag(b) B``, (O, R), made anew."""
        return self.factors[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Both, made anew."""
        values = self.values()
        return values.a_RI, values.b_OR

    @property
    def r(self) -> int:
        """Rank."""
        return len(self.vera_lambda_d)

    def gain(self) -> Tensor | None:
        """``g = m / |V|``, (O,), or None for VeRA."""
        if self.lora_magnitude_vector is None:
            return None
        if self.detach_norm:
            return self.lora_magnitude_vector / self.row_lengths()
        # not remembered: that would take both factors' memory for each layer
        return self.lora_magnitude_vector / LayerCache(self.base).norm(*self.factors, 1.0, detach=False)

    def around(self, y: Tensor, x: Tensor) -> Tensor:
        self.base.refuse_backward(x)
        x = autocast(x)
        dropout = self._draw_dropout(x)
        x_a = dropped(x, dropout)
        a, b = self.bank.A[:, : self.in_features], self.bank.B[: self.out_features]
        scaled = nnf.linear(x_a, a.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)
        change = nnf.linear(scaled, b.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)
        return self._compose(y, change, x_a, dropout)

    def values(self) -> BankValues:
        bank = self.bank.A, self.bank.B
        return BankValues(bank, self.vera_lambda_d, self.vera_lambda_b, self.lora_magnitude_vector, self.in_features)

    def _register_factors(self, a: nn.Parameter, b: nn.Parameter) -> None:
        self.vera_lambda_d = nn.Parameter(a.new_empty(a.shape[0]))
        self.vera_lambda_b = nn.Parameter(b.new_empty(b.shape[0]))

    def _start_factors(self) -> None:
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def _fill_factors(self, given: LayerAdapter | None) -> None:
        for key, p in {"d": self.vera_lambda_d, "b": self.vera_lambda_b}.items():
            p.copy_(given.tensors()[key] if given is not None else torch.zeros_like(p))

    def row_lengths(self) -> Tensor:
        return self.cache.norm(self.vera_lambda_d, self.vera_lambda_b, 1.0, detach=True)
