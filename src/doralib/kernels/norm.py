"""The adapted row norm in the graph: with its full gradient, and as an operator that a compiler can see."""

import itertools
import weakref
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional as F


class NormBase(Protocol):
    """What the norm asks of a frozen layer."""

    def key(self) -> tuple[Any, ...]:
        """Differs once the layer's weight has been changed or moved."""

    def triton_weight(self) -> Tensor | None:
        """W itself, (O, I), where Triton's kernels take it."""

    def row_norm_sq(self) -> Tensor:
        """Squared row lengths of W, (O,)."""

    def expands(self, R: int) -> bool:
        """Whether `adapted_row_norm` is by `functional.expanded_square`, for factors of this rank."""

    def adapted_row_norm(self, W_sq_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """Row lengths of W + s B A, (O,)."""

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        """``W Aᵀ``, (O, R)."""

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        """``Cᵀ W``, (R, I)."""


class NormCache(Protocol):
    """What gives the norm as a constant: a `LayerCache`."""

    base: NormBase

    def constant_norm(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """``|W + s B A|`` by rows, (O,), outside the graph."""


class OnDevice(NamedTuple):
    """A norm that a kernel compares and writes on the device, and what it was made from."""

    key: tuple[Any, ...]
    a_RI: Tensor
    b_OR: Tensor
    n_O: Tensor

    @classmethod
    def nothing_seen(cls, key: tuple[Any, ...], a_RI: Tensor, b_OR: Tensor) -> Self:
        """Factors of NaN, which equal nothing."""
        with torch.inference_mode(False):
            empty = torch.empty_like(a_RI), torch.empty_like(b_OR), torch.empty_like(b_OR[:, 0])
            return cls(key, *(torch.full_like(t, float("nan"), dtype=torch.float32) for t in empty))


def norm_in_graph(cache: NormCache, handle: int, a_RI: Tensor, b_OR: Tensor, s: float, *, detach: bool) -> Tensor:
    """The norm, (O,), with its full gradient, or as a constant where a compiler looks on."""
    if torch.compiler.is_compiling():
        factors = (a_RI.detach(), b_OR.detach()) if detach else (a_RI, b_OR)
        return _row_norm_op(*factors, s, handle)
    return _FullGradient.apply(a_RI, b_OR, cache, s)


@torch.no_grad()
def norm_gradient(cache: NormCache, dn_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """The norm's part of dA and dB: with q = dn / n, in (O, R) temporaries only.

    dB = s q ∘ (W Aᵀ + s B A Aᵀ) and dA = s (q ∘ B)ᵀ W + s² (Bᵀ (q ∘ B)) A.
    """
    n_O = cache.constant_norm(a_RI, b_OR, s)
    a, b = a_RI.to(n_O.dtype), b_OR.to(n_O.dtype)
    q_O = dn_O / n_O
    qb_OR = q_O[:, None] * b
    db_OR = s * q_O[:, None] * (cache.base.times_transposed(a_RI) + s * (b @ (a @ a.T)))
    da_RI = s * cache.base.transposed_times(qb_OR) + s * s * ((b.T @ qb_OR) @ a)
    return da_RI.to(a_RI.dtype), db_OR.to(b_OR.dtype)


class _FullGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_RI, b_OR, cache, s):
        ctx.save_for_backward(a_RI, b_OR)
        ctx.cache, ctx.s = cache, s
        return cache.constant_norm(a_RI, b_OR, s).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dn_O):
        a_RI, b_OR = ctx.saved_tensors
        return *norm_gradient(ctx.cache, dn_O, a_RI, b_OR, ctx.s), None, None


# a compiler's operator takes numbers, not objects
_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, NormCache] = weakref.WeakValueDictionary()


def register(cache: NormCache) -> int:
    """The number by which the operators below find a cache."""
    handle = next(_handles)
    _by_handle[handle] = cache
    return handle


@torch.library.custom_op("doralib::kept_row_norm", mutates_args=())
def _row_norm_op(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    # a compiler may write into what an operator returned: the remembered norm stays ours
    return _by_handle[handle].constant_norm(a_RI, b_OR, s).clone()


@_row_norm_op.register_fake
def _row_norm_shape(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    return b_OR.new_empty(b_OR.shape[0], dtype=F.sum_dtype(b_OR.dtype))


@torch.library.custom_op("doralib::kept_row_norm_gradient", mutates_args=())
def _row_norm_gradient_op(dn_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> tuple[Tensor, Tensor]:
    return norm_gradient(_by_handle[handle], dn_O, a_RI, b_OR, s)


@_row_norm_gradient_op.register_fake
def _row_norm_gradient_shape(dn_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a_RI), torch.empty_like(b_OR)


def _remember(ctx, inputs, output):
    a_RI, b_OR, ctx.s, ctx.handle = inputs
    ctx.save_for_backward(a_RI, b_OR)


def _row_norm_backward(ctx, dn_O):
    return *_row_norm_gradient_op(dn_O, *ctx.saved_tensors, ctx.s, ctx.handle), None, None


_row_norm_op.register_autograd(_row_norm_backward, setup_context=_remember)
