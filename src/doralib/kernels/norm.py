"""The adapted row norm, computed when A, B, s or the base have changed, and only then."""

import ctypes
import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import functional as F
from .dispatch import on_gpu


class Copy:
    """A tensor's values as they were."""

    __slots__ = ("_address", "_nbytes", "_shape", "value")

    def __init__(self, value: Tensor) -> None:
        """Of a tensor that nobody else writes to."""
        self.value = value
        self._shape = value.shape
        self._nbytes = value.nbytes
        self._address = value.data_ptr() if _memcmp is not None and _in_one_piece(value) else None

    def equals(self, now: Tensor) -> bool:
        """Whether a tensor is the same bit by bit, dtype and device included."""
        value = self.value
        if value.dtype is not now.dtype or self._shape != now.shape:
            return False
        if _memcmp is not None and self._address is not None and _in_one_piece(now):
            return not _memcmp(self._address, now.data_ptr(), self._nbytes)
        return value.device == now.device and torch.equal(value, now)


def _in_one_piece(t: Tensor) -> bool:
    return t.is_cpu and type(t) in (Tensor, nn.Parameter) and t.is_contiguous()


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    """C's own comparison: a generated token compares the factors of every layer, and torch.equal takes longer."""
    try:
        # PyDLL: to give the interpreter's lock away and take it back would take as long as the comparison
        memcmp = ctypes.PyDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no libc under that name, as on Windows
        return None
    memcmp.argtypes, memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return memcmp


_memcmp = _find_memcmp()


def split_rows(t: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Each layer's rows of what was made for all, aligned as a tensor of its own would be.

    A product's last bits may follow from the alignment of its operands. They must not follow from which layers were
    made together.
    """
    return [own.clone() if own.is_cpu and own.data_ptr() % F.ALIGNMENT else own for own in t.split(list(rows))]


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


class Seen(NamedTuple):
    """A norm and what it was computed from."""

    key: tuple[Any, ...]
    a_RI: Copy
    b_OR: Copy
    s: float
    n_O: Tensor

    def still(self, key: tuple[Any, ...], a_RI: Tensor, b_OR: Tensor, s: float) -> bool:
        """Whether it would be the same now, bit for bit."""
        return self.key == key and self.s == s and self.a_RI.equals(a_RI) and self.b_OR.equals(b_OR)


class _OnDevice(NamedTuple):
    """The same where a kernel compares, and writes all three; both factors start as NaN, which equals nothing."""

    key: tuple[Any, ...]
    a_RI: Tensor
    b_OR: Tensor
    n_O: Tensor


class FreshNorm:
    """``|W + s B A|`` by rows, never stale.

    A version counter does not see fused or 8-bit optimisers, ``.data`` writes or FSDP2's unsharded parameters, so
    the factors themselves are remembered and compared bit by bit: (O + I) R numbers against O I R multiplications.
    """

    def __init__(self, base: NormBase) -> None:
        self.base = base
        self._handle = next(_handles)
        _by_handle[self._handle] = self
        self._weight: tuple[tuple[Any, ...], Tensor] | None = None
        self._seen: Seen | None = None
        self._on_device: _OnDevice | None = None

    def base_norm_sq(self) -> Tensor:
        """Squared row lengths of the frozen weight, (O,); one pass over it, once."""
        key = self.base.key()
        if self._weight is None or self._weight[0] != key:
            self._weight = key, self.base.row_norm_sq()
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
        W_OI = self.base.triton_weight()
        if W_OI is not None:
            return self._by_triton(W_OI, a_RI, b_OR, s)
        return fresh([Change(self, a_RI, b_OR, s)])[0].n_O

    @torch.no_grad()
    def at_start(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """The true norm while B = 0, bit for bit the one that the first forward pass will find; one pass over W."""
        if self.base.triton_weight() is None:
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
        db_OR = s * q_O[:, None] * (self.base.times_transposed(a_RI) + s * (b @ (a @ a.T)))
        da_RI = s * self.base.transposed_times(qb_OR) + s * s * ((b.T @ qb_OR) @ a)
        return da_RI.to(a_RI.dtype), db_OR.to(b_OR.dtype)

    @torch.no_grad()
    def _by_triton(self, W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """Compared and, if need be, computed on the device: the host never waits."""
        seen, key = self._on_device, (*self.base.key(), s)
        if seen is None or seen.key != key or seen.a_RI.shape != a_RI.shape:
            with torch.inference_mode(False):
                empty = torch.empty_like(a_RI), torch.empty_like(b_OR), torch.empty_like(b_OR[:, 0])
                a, b, n = (torch.full_like(t, float("nan"), dtype=torch.float32) for t in empty)
            seen = self._on_device = _OnDevice(key, a, b, n)
        fused = on_gpu(W_OI)
        assert fused is not None
        return fused.fresh_row_norm(W_OI, a_RI, b_OR, s, seen.a_RI, seen.b_OR, seen.n_O)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer finds its norm again."""
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Made anew, under a handle of its own."""
        self.__init__(state["base"])  # type: ignore[misc]


class Change(NamedTuple):
    """A layer's norm, and the factors that it is wanted for."""

    norm: FreshNorm
    a_RI: Tensor
    b_OR: Tensor
    s: float


def fresh(changes: Sequence[Change]) -> list[Seen]:
    """The norms for these, the stale among them computed in one go; not where Triton's kernels take the weight."""
    found = []
    for norm, a_RI, b_OR, s in changes:
        seen = norm._seen
        found.append(seen if seen is not None and seen.still(norm.base.key(), a_RI, b_OR, s) else None)
    stale = [change for change, seen in zip(changes, found, strict=True) if seen is None]
    # not what is kept now: another thread may have put its own there
    renewed = iter(_renew(stale) if stale else [])
    return [seen or next(renewed) for seen in found]


# a norm made in inference mode could not be kept for a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def _renew(changes: Sequence[Change]) -> list[Seen]:
    """Compute these norms, all expanded squares of one rank in one go."""
    batches: dict[Any, list[int]] = {}
    for i, (norm, a_RI, b_OR, _) in enumerate(changes):
        R = len(a_RI)
        key = (R, a_RI.dtype, b_OR.dtype, b_OR.device) if norm.base.expands(R) else i
        batches.setdefault(key, []).append(i)
    seen: dict[int, Seen] = {}
    for batch in batches.values():
        # autocast would run the products of float32 sums in half precision
        with torch.autocast(changes[batch[0]].b_OR.device.type, enabled=False):
            seen.update(zip(batch, _renewed([changes[i] for i in batch]), strict=True))
    return [seen[i] for i in range(len(changes))]


def _renewed(batch: list[Change]) -> list[Seen]:
    rows = [len(b_OR) for _, _, b_OR, _ in batch]
    # the norms belong to the copies, whatever another thread does to the parameters meanwhile
    copy_OR = torch.cat([b_OR.detach() for _, _, b_OR, _ in batch])
    copies = [
        Change(norm, a_RI.detach().clone(), b_OR, s)
        for (norm, a_RI, _, s), b_OR in zip(batch, split_rows(copy_OR, rows), strict=True)
    ]
    n_O = _lengths(copies, copy_OR)
    n_O.masked_fill_(n_O == 0, float("inf"))
    seen = []
    for (norm, a_RI, b_OR, s), own_n_O in zip(copies, n_O.split(rows), strict=True):
        norm._seen = Seen(norm.base.key(), Copy(a_RI), Copy(b_OR), s, own_n_O)
        seen.append(norm._seen)
    return seen


def _lengths(changes: list[Change], all_b_OR: Tensor) -> Tensor:
    """Of all rows of these layers, one below the other."""
    squares = [norm.base_norm_sq() for norm, *_ in changes]
    lengths = [
        partial(norm.base.adapted_row_norm, sq, a, b, s) for (norm, a, b, s), sq in zip(changes, squares, strict=True)
    ]
    if not changes[0].norm.base.expands(len(changes[0].a_RI)):
        return lengths[0]()
    dtype = squares[0].dtype
    terms = [
        F.expansion(norm.base.times_transposed(a_RI).to(dtype), a_RI.to(dtype), b_OR.to(dtype), s)
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
