"""The adapted row norm, computed when A, B, s or the base have changed, and only then."""

import ctypes
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import functional as F
from . import on_gpu
from .together import Together, at_hand


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


@dataclass
class _Seen:
    """A norm and what it was computed from. On a GPU both factors start as NaN, which equals nothing."""

    key: tuple[Any, ...]
    a_RI: Tensor
    b_OR: Tensor
    s: float
    n_O: Tensor

    def still(self, key: tuple[Any, ...], a_RI: Tensor, b_OR: Tensor, s: float) -> bool:
        """Whether it would be the same now, bit for bit."""
        return self.key == key and self.s == s and same(self.a_RI, a_RI) and same(self.b_OR, b_OR)


class FreshNorm:
    """``|W + s B A|`` by rows, never stale.

    A version counter does not see fused or 8-bit optimisers, ``.data`` writes or FSDP2's unsharded parameters, so
    the factors themselves are remembered and compared bit by bit: (O + I) R numbers against O I R multiplications.
    """

    def __init__(self, base: NormBase) -> None:
        self.together: Together | None = None
        self._base = base
        self._handle = next(_handles)
        _by_handle[self._handle] = self
        self._weight: tuple[tuple[Any, ...], Tensor] | None = None
        self._seen: _Seen | None = None
        self._asked: tuple[tuple[weakref.ref[Tensor], weakref.ref[Tensor]], float] | None = None

    def base_norm_sq(self) -> Tensor:
        """Squared row lengths of the frozen weight, (O,); one pass over it, once."""
        key = self._base.key()
        if self._weight is None or self._weight[0] != key:
            self._weight = key, self._base.row_norm_sq()
        return self._weight[1]

    def __call__(self, a_RI: Tensor, b_OR: Tensor, s: float, *, detach: bool) -> Tensor:
        """The norm, (O,): a constant of the backward pass, or with its full gradient. Not to be written to.

        A row of length zero is given as infinity: m / n is then 0, and nothing is NaN in either pass.
        """
        if torch.compiler.is_compiling():
            factors = (a_RI.detach(), b_OR.detach()) if detach else (a_RI, b_OR)
            return _row_norm_op(*factors, s, self._handle)
        if detach:
            return self.constant(a_RI, b_OR, s)
        return _FullGradient.apply(a_RI, b_OR, self, s)

    def constant(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """The norm outside the graph."""
        W_OI = self._base.triton_weight()
        if W_OI is not None:
            return self._on_gpu(W_OI, a_RI, b_OR, s)
        seen = self._seen
        if seen is None or not seen.still(self._base.key(), a_RI, b_OR, s):
            others = [] if self.together is None else self.together.changed(self)
            seen = _renew([_Change(self, a_RI, b_OR, s), *(change for norm in others if (change := norm._change()))])
        if self.together is not None and torch.is_grad_enabled() and are_parameters(a_RI, b_OR):
            self._asked = (weakref.ref(a_RI), weakref.ref(b_OR)), s
            self.together.remember(self)
        return seen.n_O

    @property
    def last(self) -> Tensor | None:
        """The norm that was computed last; A and B may have changed since."""
        return None if self._seen is None else self._seen.n_O

    def has_changed(self) -> bool:
        """Whether the parameters that it was asked for last have changed."""
        change = self._change()
        return change is not None and not (self._seen and self._seen.still(self._base.key(), *change[1:]))

    def _change(self) -> "_Change | None":
        # a base that was moved, replaced or sharded waits until its own layer asks
        if self._asked is None or self._seen is None or self._seen.key != self._base.key():
            return None
        refs, s = self._asked
        found = at_hand(refs)
        return None if found is None else _Change(self, found[0], found[1], s)

    @torch.no_grad()
    def at_start(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """The true norm while B = 0, bit for bit the one that the first forward pass will find; one pass over W."""
        if self._base.triton_weight() is None:
            return self.base_norm_sq().sqrt()
        n_O = self.constant(a_RI, b_OR, s)
        return n_O.masked_fill(n_O.isinf(), 0)

    @torch.no_grad()
    def gradient(self, dn_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> tuple[Tensor, Tensor]:
        """The norm's part of dA and dB: with q = dn / n, in (O, R) temporaries only.

        dB = s q ∘ (W Aᵀ + s B A Aᵀ) and dA = s (q ∘ B)ᵀ W + s² (Bᵀ (q ∘ B)) A.
        """
        n_O = self.constant(a_RI, b_OR, s)
        a, b = a_RI.to(n_O.dtype), b_OR.to(n_O.dtype)
        q_O = dn_O / n_O
        qb_OR = q_O[:, None] * b
        db_OR = s * q_O[:, None] * (self._base.times_transposed(a_RI) + s * (b @ (a @ a.T)))
        da_RI = s * self._base.transposed_times(qb_OR) + s * s * ((b.T @ qb_OR) @ a)
        return da_RI.to(a_RI.dtype), db_OR.to(b_OR.dtype)

    @torch.no_grad()
    def _on_gpu(self, W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """Compared and, if need be, computed on the device: the host never waits."""
        seen, key = self._seen, self._base.key()
        if seen is None or seen.key != key or seen.a_RI.shape != a_RI.shape:
            with torch.inference_mode(False):
                empty = torch.empty_like(a_RI), torch.empty_like(b_OR), torch.empty_like(b_OR[:, 0])
                a, b, n = (torch.full_like(t, float("nan"), dtype=torch.float32) for t in empty)
            seen = self._seen = _Seen(key, a, b, s, n)
        fused = on_gpu(W_OI)
        assert fused is not None
        return fused.fresh_row_norm(W_OI, a_RI, b_OR, s, seen.a_RI, seen.b_OR, seen.n_O)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer finds its norm again."""
        return {"base": self._base, "together": self.together}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Made anew, under a handle of its own."""
        self.__init__(state["base"])  # type: ignore[misc]
        self.together = state["together"]


class _Change(NamedTuple):
    """A norm to be computed, of these factors."""

    norm: FreshNorm
    a_RI: Tensor
    b_OR: Tensor
    s: float


# a norm made in inference mode could not be kept for a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def _renew(changes: Sequence[_Change]) -> _Seen:
    """Compute these norms, all expanded squares of one rank in one go; the first is returned."""
    batches: dict[Any, list[_Change]] = {}
    for change in changes:
        norm, a_RI, b_OR, _ = change
        R = len(a_RI)
        key = (R, a_RI.dtype, b_OR.dtype, b_OR.device) if norm._base.expands(R) else norm._handle
        batches.setdefault(key, []).append(change)
    # the first, which is asked for, last
    for batch in reversed(batches.values()):
        # autocast would run the products of float32 sums in half precision
        with torch.autocast(batch[0].b_OR.device.type, enabled=False):
            seen = _renewed(batch)
    return seen[0]


def _renewed(batch: list[_Change]) -> list[_Seen]:
    rows = [len(b_OR) for _, _, b_OR, _ in batch]
    # the norms belong to the copies, whatever another thread does to the parameters meanwhile
    copy_OR = torch.cat([b_OR.detach() for _, _, b_OR, _ in batch])
    copies = [
        _Change(norm, a_RI.detach().clone(), b_OR, s)
        for (norm, a_RI, _, s), b_OR in zip(batch, copy_OR.split(rows), strict=True)
    ]
    n_O = _lengths(copies, copy_OR)
    n_O.masked_fill_(n_O == 0, float("inf"))
    seen = []
    for (norm, a_RI, b_OR, s), own_n_O in zip(copies, n_O.split(rows), strict=True):
        norm._seen = _Seen(norm._base.key(), a_RI, b_OR, s, own_n_O)
        seen.append(norm._seen)
    return seen


def _lengths(changes: list[_Change], all_b_OR: Tensor) -> Tensor:
    """Of all rows of these layers, one below the other."""
    squares = [norm.base_norm_sq() for norm, *_ in changes]
    lengths = [
        partial(norm._base.adapted_row_norm, sq, a, b, s) for (norm, a, b, s), sq in zip(changes, squares, strict=True)
    ]
    if not changes[0].norm._base.expands(len(changes[0].a_RI)):
        return lengths[0]()
    dtype = squares[0].dtype
    terms = [
        F.expansion(norm._base.times_transposed(a_RI).to(dtype), a_RI.to(dtype), b_OR.to(dtype), s)
        for norm, a_RI, b_OR, s in changes
    ]
    W_sq_O, b_OR = torch.cat(squares), all_b_OR.to(dtype)
    n_sq_O = F.expanded_square(W_sq_O, torch.cat(terms), b_OR)
    if n_sq_O.is_meta or F.nothing_cancelled(W_sq_O, n_sq_O):
        return F.length(n_sq_O)
    # a layer with rows that may have cancelled is taken by itself
    parts = n_sq_O.split([len(sq) for sq in squares])
    return torch.cat(
        [
            F.length(part) if F.nothing_cancelled(sq, part) else own()
            for sq, part, own in zip(squares, parts, lengths, strict=True)
        ]
    )


_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[int, FreshNorm] = weakref.WeakValueDictionary()


@torch.library.custom_op("doralib::kept_row_norm", mutates_args=())
def _row_norm_op(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    # a compiler may write into what an operator returned: the remembered norm stays ours
    return _by_handle[handle].constant(a_RI, b_OR, s).clone()


@_row_norm_op.register_fake
def _row_norm_shape(a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> Tensor:
    return b_OR.new_empty(b_OR.shape[0], dtype=F.sum_dtype(b_OR.dtype))


@torch.library.custom_op("doralib::kept_row_norm_gradient", mutates_args=())
def _row_norm_gradient_op(dn_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> tuple[Tensor, Tensor]:
    return _by_handle[handle].gradient(dn_O, a_RI, b_OR, s)


@_row_norm_gradient_op.register_fake
def _row_norm_gradient_shape(dn_O: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, handle: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a_RI), torch.empty_like(b_OR)


def _remember(ctx, inputs, output):
    a_RI, b_OR, ctx.s, ctx.handle = inputs
    ctx.save_for_backward(a_RI, b_OR)


def _row_norm_backward(ctx, dn_O):
    return *_row_norm_gradient_op(dn_O, *ctx.saved_tensors, ctx.s, ctx.handle), None, None


_row_norm_op.register_autograd(_row_norm_backward, setup_context=_remember)


def same(seen: Tensor, now: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, dtype and device included."""
    if seen.dtype != now.dtype or seen.device != now.device or seen.shape != now.shape:
        return False
    if _memcmp is None or not (_in_one_piece(seen) and _in_one_piece(now)):
        return torch.equal(seen, now)
    return not _memcmp(seen.data_ptr(), now.data_ptr(), seen.nbytes)


def are_parameters(*tensors: Tensor) -> bool:
    """Whether an optimiser may change them, each in its place."""
    return all(isinstance(t, nn.Parameter) for t in tensors)


def _in_one_piece(t: Tensor) -> bool:
    return t.is_cpu and type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous()


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    """C's own comparison: a generated token compares the factors of every layer, and torch.equal takes longer."""
    try:
        memcmp = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no libc under that name, as on Windows
        return None
    memcmp.argtypes, memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return memcmp


_memcmp = _find_memcmp()


class _FullGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_RI, b_OR, norm, s):
        ctx.save_for_backward(a_RI, b_OR)
        ctx.norm, ctx.s = norm, s
        return norm.constant(a_RI, b_OR, s).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dn_O):
        return *ctx.norm.gradient(dn_O, *ctx.saved_tensors, ctx.s), None, None
