"""VeRA and DVoRA: two random matrices shared by every layer, and vectors for each that scale their rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ...config import DoraConfig
from ...errors import DoraError
from ...kernels.cache import LayerCache
from ...state import AdapterState, BankValues, LayerAdapter
from ..base.linear import Dense
from .low_rank import Holder, LowRank


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


class BankFactors(LowRank):
    """``diag(b) B diag(d) A`` with d (R,) and b (O,) trained: VeRA, and DVoRA with m.

    ``y = g ∘ (x Wᵀ + b ∘ (B (d ∘ (A x)))) + bias`` with ``g = m / |V|``, or 1 for VeRA. The start is b = 0 and
    d = `d_initial`: nothing changes, bit for bit. Sources: arXiv 2310.11454; 2402.09353, section 5.4.

    Raises:
        DoraError: if the layer is not linear.
    """

    in_kernels = False

    def __init__(self, base: Dense, bank: Bank, d_initial: float) -> None:
        if base.kind != "linear":
            raise DoraError(f"{type(base.module).__qualname__}: VeRA and DVoRA adapt linear layers only")
        super().__init__(base)
        self.bank, self.d_initial = bank, d_initial
        self.cache = LayerCache(_Scaled(base, bank))

    def add_to(self, layer: Holder, r: int) -> None:
        a, b = self._empty(r)
        layer.bank = self.bank  # moves with the model
        layer.vera_lambda_d, layer.vera_lambda_b = (nn.Parameter(p.new_empty(len(p))) for p in (a, b))

    def reset(self, layer: Holder) -> None:
        nn.init.constant_(layer.vera_lambda_d, self.d_initial)
        nn.init.zeros_(layer.vera_lambda_b)

    def pair(self, layer: Holder) -> tuple[Tensor, Tensor]:
        """``diag(d) A`` and ``diag(b) B``, made anew."""
        values = self.values(layer)
        return values.a_RI, values.b_OR

    def rank(self, layer: Holder) -> int:
        return len(layer.vera_lambda_d)

    def values(self, layer: Holder) -> BankValues:
        bank, num_in = (self.bank.A, self.bank.B), self.base.shape[1]
        return BankValues(bank, layer.vera_lambda_d, layer.vera_lambda_b, layer.lora_magnitude_vector, num_in)

    def fill(self, layer: Holder, given: LayerAdapter | None) -> None:
        for key, p in {"d": layer.vera_lambda_d, "b": layer.vera_lambda_b}.items():
            p.copy_(given.tensors()[key] if given is not None else torch.zeros_like(p))

    def norm(self, layer: Holder, *, detach: bool) -> Tensor:
        if detach:
            return self.cache.norm(layer.vera_lambda_d, layer.vera_lambda_b, 1.0, detach=True)
        # not remembered: that would take both factors' memory for each layer
        return LayerCache(self.base).norm(*self.pair(layer), 1.0, detach=False)

    def product(self, layer: Holder, x: Tensor) -> Tensor:
        O, I = self.base.shape
        scaled = nnf.linear(x, self.bank.A[:, :I].to(x.dtype)) * layer.vera_lambda_d.to(x.dtype)
        return nnf.linear(scaled, self.bank.B[:O].to(x.dtype)) * layer.vera_lambda_b.to(x.dtype)
