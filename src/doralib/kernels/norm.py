"""The adapted row norm, computed when A, B, s or the base have changed, and only then."""

import itertools
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import adapted_row_norm, sum_dtype


class NormBase(Protocol):
    """What the norm asks of a frozen layer."""

    def key(self) -> tuple[Any, ...]:
        """Differs once the layer's weight has been changed or moved."""

    def row_norm_sq(self) -> Tensor:
        """Squared row lengths of W, (O,)."""

    def times_transposed(self, a_RI: Tensor) -> Tensor:
        """``W Aᵀ``, (O, R)."""

    def transposed_times(self, c_OR: Tensor) -> Tensor:
        """``Cᵀ W``, (R, I)."""

    def dense_rows(self, index: Tensor) -> Tensor:
        """Rows of W, (K, I)."""


@dataclass
class _Seen:
    key: tuple[Any, ...]
    a_RI: Tensor
    b_OR: Tensor
    s: float
    U_OR: Tensor | None
    n_O: Tensor


class FreshNorm:
    """``|W + s B A|`` by rows, never stale.

    A version counter does not see fused or 8-bit optimisers, ``.data`` writes or FSDP2's unsharded parameters, so
    the factors themselves are remembered and compared bit by bit: (O + I) R numbers against O I R multiplications.
    """

    def __init__(self, base: NormBase) -> None:
        self._base = base
        self._handle = next(_handles)
        _by_handle[self._handle] = self
        self._weight: tuple[tuple[Any, ...], Tensor] | None = None
        self._seen: _Seen | None = None

    def base_norm_sq(self) -> Tensor:
        """Squared row lengths of the frozen weight, (O,); one pass over it, once."""
        key = self._base.key()
        if self._weight is None or self._weight[0] != key:
            self._weight = key, self._base.row_norm_sq()
        return self._weight[1]

    def know_base_norm_sq(self, W_sq_O: Tensor) -> None:
        """Take squared row lengths that were just computed."""
        self._weight = self._base.key(), W_sq_O

    def __call__(self, a_RI: Tensor, b_OR: Tensor, s: float, *, detach: bool) -> Tensor:
        """The norm, (O,): a constant of the backward pass, or with its full gradient."""
        if detach:
            return _row_norm(a_RI, b_OR, s, self._handle)
        return self._with_gradient(a_RI, b_OR, s)

    @torch.compiler.disable
    def _with_gradient(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        seen = self._refreshed(a_RI.detach(), b_OR.detach(), s, keep_U=True)
        return _FullGradient.apply(a_RI, b_OR, seen.n_O, seen.U_OR, self._base, s)

    def constant(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """The norm, (O,), outside the graph. Not to be written to."""
        return self._refreshed(a_RI.detach(), b_OR.detach(), s, keep_U=False).n_O

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer finds its norm again."""
        return {"base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Made anew, under a handle of its own."""
        self.__init__(state["base"])  # type: ignore[misc]

    def _refreshed(self, a_RI: Tensor, b_OR: Tensor, s: float, *, keep_U: bool) -> _Seen:
        W_sq_O, seen = self.base_norm_sq(), self._seen
        if seen is None or (keep_U and seen.U_OR is None) or not self._still(seen, a_RI, b_OR, s):
            with torch.no_grad():
                U_OR = self._base.times_transposed(a_RI)
                n_O = adapted_row_norm(W_sq_O, U_OR, a_RI, b_OR, s, self._base.dense_rows)
                seen = _Seen(self._base.key(), a_RI.clone(), b_OR.clone(), s, U_OR if keep_U else None, n_O)
            self._seen = seen
        return seen

    def _still(self, seen: _Seen, a_RI: Tensor, b_OR: Tensor, s: float) -> bool:
        return seen.key == self._base.key() and seen.s == s and _same(seen.a_RI, a_RI) and _same(seen.b_OR, b_OR)


_handles = itertools.count()
_by_handle: WeakValueDictionary[int, FreshNorm] = WeakValueDictionary()


def _row_norm(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    """The norm as a constant; one opaque operator where a compiler looks on, so that it sees no graph break."""
    if torch.compiler.is_compiling():
        return _row_norm_op(a_RI.detach(), b_OR.detach(), s, handle)
    return _by_handle[handle].constant(a_RI, b_OR, s)


@torch.library.custom_op("doralib::row_norm", mutates_args=())
def _row_norm_op(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    # a compiler may write into what an operator returned: the remembered norm stays ours
    return _by_handle[handle].constant(a_RI, b_OR, s).clone()


@_row_norm_op.register_fake
def _row_norm_shape(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    return b_OR.new_empty(b_OR.shape[0], dtype=sum_dtype(b_OR.dtype))


def _same(seen: Tensor, now: Tensor) -> bool:
    return seen.dtype == now.dtype and seen.device == now.device and torch.equal(seen, now)


class _FullGradient(torch.autograd.Function):
    """The norm with its gradient: with q = dL/dn / n, (O, R) temporaries only.

    dB = s q ∘ (W Aᵀ + s B A Aᵀ) and dA = s (q ∘ B)ᵀ W + s² (Bᵀ (q ∘ B)) A.
    """

    @staticmethod
    def forward(ctx, a_RI, b_OR, n_O, U_OR, base, s):
        ctx.save_for_backward(a_RI, b_OR, n_O, U_OR)
        ctx.base, ctx.s = base, s
        return n_O.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dn_O):
        a_RI, b_OR, n_O, U_OR = ctx.saved_tensors
        a, b, s = a_RI.to(n_O.dtype), b_OR.to(n_O.dtype), ctx.s
        q_O = torch.where(n_O > 0, dn_O / torch.where(n_O > 0, n_O, 1), 0)
        qb_OR = q_O[:, None] * b
        db_OR = s * q_O[:, None] * (U_OR + s * (b @ (a @ a.T)))
        da_RI = s * ctx.base.transposed_times(qb_OR) + s * s * ((b.T @ qb_OR) @ a)
        return da_RI.to(a_RI.dtype), db_OR.to(b_OR.dtype), None, None, None, None
