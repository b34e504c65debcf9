"""What a layer computes with that follows from A, B, m and its frozen weight, made when one of them has changed.

No version counter sees every write: not those of fused and 8-bit optimizers, of ``.data``, or to FSDP2's unsharded
parameters. So the small tensors are kept as they were and compared bit by bit, (O + I) R numbers against O I R
multiplications. Of the frozen weight the base tells whether it is another one.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from .dispatch import on_gpu
from .norm import NormBase, OnDevice, norm_in_graph, register
from .operands import Operands, make_operands


class LayerCache:
    """One layer's norm and operands, never stale."""

    def __init__(self, base: NormBase) -> None:
        self.base = base
        self.group: Group | None = None
        self.trusted: dict[torch.dtype, tuple[Tensor, Operands, Tensor | None]] | None = None
        """Inside `doralib.unchanged`, by dtype what a call without gradients needs beside x: W, operands and bias."""
        self._handle = register(self)
        self._base_sq: tuple[Any, Tensor] | None = None
        self._norm: _Norm | None = None
        self._made: _Made | None = None
        self._on_device: OnDevice | None = None

    def forget(self) -> None:
        """Make all of it anew: a weight that was cast or moved may lie where the old one did, and have its key."""
        self._base_sq = self._norm = self._made = self._on_device = None

    def operands(
        self,
        a_RI: Tensor,
        b_OR: Tensor,
        m_O: Tensor | None,
        s: float,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        n_O: Tensor | None = None,
    ) -> Operands:
        """What the operator takes for products in a dtype, outside the graph.

        Args:
            m_O: None for LoRA.
            bias_O: The base's, which is not scaled.
            n_O: A norm in place of the layer's own; the same tensor as long as its values are the same.
        """
        if m_O is not None and n_O is None and self.base.triton_weight() is not None:
            n_O = self.constant_norm(a_RI, b_OR, s).clone()  # a kernel writes the next one in its place
        wanted, made = (a_RI, b_OR, m_O, s, bias_O, dtype, n_O), self._made
        if made is None or not self._is_current(made, *wanted):
            beside = () if self.group is None else self.group.stale_beside(self)
            made = _make([_Request(self, *wanted), *beside])[0]
        if torch.is_grad_enabled():
            if self.group is not None and m_O is not None and n_O is None:
                self.group.remember(_Request(self, *wanted))
        elif made.operands.columns_OR is None:
            made = self._made = made._replace(operands=made.operands.with_columns())
        return made.operands

    def norm(self, a_RI: Tensor, b_OR: Tensor, s: float, *, detach: bool) -> Tensor:
        """``|W + s B A|`` by rows, (O,): a constant of the backward pass, or with its full gradient.

        Nobody writes to it. A row of length zero is given as infinity: m / n is then 0, and no pass has a NaN.
        """
        if detach and not torch.compiler.is_compiling():
            return self.constant_norm(a_RI, b_OR, s)
        return norm_in_graph(self, self._handle, a_RI, b_OR, s, detach=detach)

    def constant_norm(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """The norm outside the graph."""
        W_OI = self.base.triton_weight()
        if W_OI is not None:
            return self._norm_by_triton(W_OI, a_RI, b_OR, s)
        return _fresh_norms([_Request(self, a_RI, b_OR, None, s, None, b_OR.dtype, None)])[0].n_O

    @torch.no_grad()
    def norm_at_start(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """The true norm while B = 0, bit for bit the one that the first forward pass will find; one pass over W."""
        if self.base.triton_weight() is None:
            return self.base_norm_sq().sqrt()
        n_O = self.constant_norm(a_RI, b_OR, s)
        return n_O.masked_fill(n_O.isinf(), 0)

    def base_norm_sq(self) -> Tensor:
        """Squared row lengths of the frozen weight, (O,); one pass over it, once."""
        key = self.base.key()
        if self._base_sq is None or self._base_sq[0] != key:
            self._base_sq = key, self.base.row_norm_sq()
        return self._base_sq[1]

    def known_norm(self, a_RI: Tensor, b_OR: Tensor, s: float) -> "_Norm | None":
        """The norm that was made last, if it would be the same now."""
        norm = self._norm
        if norm is None or norm.s != s or norm.key != self.base.key():
            return None
        return norm if norm.a_RI.equals(a_RI) and norm.b_OR.equals(b_OR) else None

    def is_stale(self, request: "_Request") -> bool:
        """Whether parameters have changed since; a base that was moved or replaced waits for its own layer's call."""
        norm, made = self._norm, self._made
        if norm is None or made is None or norm.key != self.base.key():
            return False
        return not self._is_current(made, *request[1:])

    def _is_current(
        self,
        made: "_Made",
        a_RI: Tensor,
        b_OR: Tensor,
        m_O: Tensor | None,
        s: float,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        n_O: Tensor | None,
    ) -> bool:
        """Whether operands for these would be the same that were made, bit for bit."""
        if made.dtype is not dtype or made.operands.s != s:
            return False
        # A itself is handed out: another tensor of the same values may take its place, and the old one be written to
        if made.operands.wide_a_RI.data_ptr() != a_RI.data_ptr():
            return False
        if m_O is None:
            if made.a_RI is None or made.b_OR is None:
                return False
            return made.a_RI.equals(a_RI) and made.b_OR.equals(b_OR)
        if n_O is None:
            norm = self.known_norm(a_RI, b_OR, s)
            n_O = None if norm is None else norm.n_O
        if n_O is None or n_O is not made.operands.n_O or made.m_O is None or not made.m_O.equals(m_O):
            return False
        if bias_O is None or made.bias_O is None:
            return bias_O is None and made.bias_O is None
        return made.bias_O.equals(bias_O)

    @torch.no_grad()
    def _norm_by_triton(self, W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        """Compared and, if need be, computed on the device: the host never waits."""
        key = (*self.base.key(), s)
        if self._on_device is None or self._on_device.key != key or self._on_device.a_RI.shape != a_RI.shape:
            self._on_device = OnDevice.nothing_seen(key, a_RI, b_OR)
        fused = on_gpu(W_OI)
        assert fused is not None
        _, *seen = self._on_device
        n_O: Tensor = fused.fresh_row_norm(W_OI, a_RI, b_OR, s, *seen)
        return n_O

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer makes its own."""
        return {"base": self.base, "group": self.group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"])  # type: ignore[misc]
        self.group = state["group"]


class Group:
    """The caches of one model: an optimizer changes all its layers at once, and the first that is asked renews all.

    A few operators over the rows of all layers take the place of as many for each between two large products: 7 % of a
    float32 step of 1x256 tokens (docs/bench.md). Nothing relies on it: a cache that was left out finds out when asked.
    """

    def __init__(self, caches: Iterable[LayerCache] = ()) -> None:
        self._asked: weakref.WeakKeyDictionary[LayerCache, _Asked] = weakref.WeakKeyDictionary()
        for cache in caches:
            cache.group = self

    def remember(self, request: "_Request") -> None:
        """What a cache was asked for, if it can be asked again: an optimizer changes parameters in their place."""
        parameters = [t for t in (request.a_RI, request.b_OR, request.m_O) if isinstance(t, nn.Parameter)]
        if len(parameters) == 3:
            tensors = parameters if request.bias_O is None else [*parameters, request.bias_O]
            self._asked[request.cache] = _Asked(tuple(map(weakref.ref, tensors)), request.s, request.dtype)

    def stale_beside(self, asking: LayerCache) -> list["_Request"]:
        """What to make along with the one that is asking; one that is not asked afterwards is left out from then on."""
        stale = []
        for cache, asked in list(self._asked.items()):
            request = None if cache is asking else asked.again(cache)
            if request is None or not cache.is_stale(request):
                continue
            if asked.made_along:
                self._asked.pop(cache, None)
            else:
                asked.made_along = True
                stale.append(request)
        return stale

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model's caches meet again in a copy of their own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class _Asked:
    """What a cache was asked for last."""

    def __init__(self, tensors: tuple[weakref.ref[Tensor], ...], s: float, dtype: torch.dtype) -> None:
        self.tensors, self.s, self.dtype, self.made_along = tensors, s, dtype, False

    def again(self, cache: LayerCache) -> "_Request | None":
        """The same for the values as they are; None where FSDP2 has freed the memory of a layer."""
        found = [t for ref in self.tensors if (t := ref()) is not None and (t.data_ptr() or not t.numel())]
        if len(found) < len(self.tensors):
            return None
        a_RI, b_OR, m_O, *bias = found
        return _Request(cache, a_RI, b_OR, m_O, self.s, bias[0] if bias else None, self.dtype, None)


class Copy:
    """A tensor's values as they were."""

    __slots__ = ("_address", "_nbytes", "_shape", "value")

    def __init__(self, value: Tensor) -> None:
        """Of a tensor that nobody else writes to."""
        self.value, self._shape, self._nbytes = value, value.shape, value.nbytes
        self._address = value.data_ptr() if _memcmp is not None and _is_plain(value) else None

    def equals(self, now: Tensor) -> bool:
        """Whether a tensor is the same bit by bit, dtype and device included."""
        value = self.value
        if value.dtype is not now.dtype or self._shape != now.shape:
            return False
        if _memcmp is not None and self._address is not None and _is_plain(now):
            return not _memcmp(self._address, now.data_ptr(), self._nbytes)
        return value.device == now.device and torch.equal(value, now)


def _is_plain(t: Tensor) -> bool:
    return t.is_cpu and type(t) in (Tensor, nn.Parameter) and t.is_contiguous()


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    """C's own comparison: `torch.equal` costs a float32 step of 1x256 tokens 8 % (docs/bench.md)."""
    try:
        # PyDLL: to give the interpreter's lock away and take it back would take as long as the comparison
        memcmp = ctypes.PyDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no libc under that name, as on Windows
        return None
    memcmp.argtypes, memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return memcmp


_memcmp = _find_memcmp()


class _Request(NamedTuple):
    """A cache, and what is wanted of it."""

    cache: LayerCache
    a_RI: Tensor
    b_OR: Tensor
    m_O: Tensor | None
    s: float
    bias_O: Tensor | None
    dtype: torch.dtype
    n_O: Tensor | None


class _Norm(NamedTuple):
    """A norm and what it was made from."""

    key: Any
    s: float
    a_RI: Copy
    b_OR: Copy
    n_O: Tensor


class _Made(NamedTuple):
    """Operands and what they were made from, beside the norm: m and the bias, or A and B of LoRA."""

    operands: Operands
    dtype: torch.dtype
    m_O: Copy | None = None
    bias_O: Copy | None = None
    a_RI: Copy | None = None
    b_OR: Copy | None = None


# what is made in inference mode could not be used by a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def _make(requests: Sequence[_Request]) -> list[_Made]:
    """Make the operands, DoRA's of one rank, scale and dtype in one go."""
    own = [i for i, request in enumerate(requests) if request.m_O is not None and request.n_O is None]
    norms = dict(zip(own, _fresh_norms([requests[i] for i in own]), strict=True))
    batches: dict[Any, list[int]] = {}
    for i, (_, a_RI, b_OR, m_O, s, bias_O, dtype, _) in enumerate(requests):
        key: Any = i
        if m_O is not None:
            key = (len(a_RI), s, bias_O is None, dtype, a_RI.dtype, b_OR.dtype, m_O.dtype, b_OR.device)
        batches.setdefault(key, []).append(i)
    made: dict[int, _Made] = {}
    for batch in batches.values():
        first = requests[batch[0]]
        if first.m_O is None:
            made[batch[0]] = _make_lora(first)
        else:
            made.update(
                zip(batch, _make_dora([requests[i] for i in batch], [norms.get(i) for i in batch]), strict=True)
            )
    for i, request in enumerate(requests):
        request.cache._made = made[i]
    return [made[i] for i in range(len(requests))]


def _make_lora(request: _Request) -> _Made:
    _, a_RI, b_OR, _, s, _, dtype, _ = request
    copies = (Copy(t.detach().clone()) for t in (a_RI, b_OR))
    return _Made(make_operands(a_RI, b_OR.detach(), None, s, None, dtype), dtype, None, None, *copies)


def _make_dora(batch: list[_Request], norms: Sequence[_Norm | None]) -> list[_Made]:
    first = batch[0]
    # the norm belongs to the copies of A and B, whatever another thread does to the parameters meanwhile
    factors = [r.b_OR.detach() if norm is None else norm.b_OR.value for r, norm in zip(batch, norms, strict=True)]
    n_by_layer: list[Any] = [r.n_O if norm is None else norm.n_O for r, norm in zip(batch, norms, strict=True)]
    rows = [len(b_OR) for b_OR in factors]
    # the copies of m and the bias are what the next call is compared with
    m_O = torch.cat([r.m_O.detach() for r in batch if r.m_O is not None])
    biases = [r.bias_O.detach() for r in batch if r.bias_O is not None]
    bias_O, gain_O = torch.cat(biases) if biases else None, m_O / torch.cat(n_by_layer)
    whole = make_operands(first.a_RI, torch.cat(factors), gain_O, first.s, bias_O, first.dtype)
    by_rows = (whole.gsb_OR, whole.wide_gsb_OR, whole.gain_O, whole.gs_O1, whole.rest_O, whole.shift_O, m_O, bias_O)
    columns = [repeat(None) if t is None else _split_rows(t, rows) for t in by_rows]
    made = []
    for r, n_O, (gsb, wide_gsb, *rest, own_m_O, own_bias_O) in zip(
        batch, n_by_layer, zip(*columns, strict=False), strict=True
    ):
        a_RI = r.a_RI.detach()
        operands = Operands._make([r.s, a_RI.to(r.dtype), gsb, a_RI, wide_gsb, *rest, n_O, None])
        made.append(_Made(operands, r.dtype, Copy(own_m_O), None if own_bias_O is None else Copy(own_bias_O)))
    return made


def _fresh_norms(requests: Sequence[_Request]) -> list[_Norm]:
    """The norms for these, the stale among them made in one go; not where Triton's kernels take the weight."""
    found = [r.cache.known_norm(r.a_RI, r.b_OR, r.s) for r in requests]
    stale = [r for r, norm in zip(requests, found, strict=True) if norm is None]
    # not what is kept now: another thread may have put its own there
    made = iter(_make_norms(stale) if stale else [])
    return [norm or next(made) for norm in found]


# a norm made in inference mode could not be kept for a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def _make_norms(requests: Sequence[_Request]) -> list[_Norm]:
    """Make these norms, all expanded squares of one rank in one go."""
    batches: dict[Any, list[int]] = {}
    for i, (cache, a_RI, b_OR, *_) in enumerate(requests):
        R = len(a_RI)
        key = (R, a_RI.dtype, b_OR.dtype, b_OR.device) if cache.base.expands(R) else i
        batches.setdefault(key, []).append(i)
    made: dict[int, _Norm] = {}
    for batch in batches.values():
        # autocast would run the products of float32 sums in half precision
        with torch.autocast(requests[batch[0]].b_OR.device.type, enabled=False):
            made.update(zip(batch, _make_norm_batch([requests[i] for i in batch]), strict=True))
    for i, request in enumerate(requests):
        request.cache._norm = made[i]
    return [made[i] for i in range(len(requests))]


def _make_norm_batch(batch: list[_Request]) -> list[_Norm]:
    rows = [len(r.b_OR) for r in batch]
    copy_OR = torch.cat([r.b_OR.detach() for r in batch])
    copies = [
        r._replace(a_RI=r.a_RI.detach().clone(), b_OR=b_OR)
        for r, b_OR in zip(batch, _split_rows(copy_OR, rows), strict=True)
    ]
    n_O = _lengths(copies, copy_OR)
    n_O.masked_fill_(n_O == 0, float("inf"))
    return [
        _Norm(r.cache.base.key(), r.s, Copy(r.a_RI), Copy(r.b_OR), own_n_O)
        for r, own_n_O in zip(copies, n_O.split(rows), strict=True)
    ]


def _lengths(batch: list[_Request], all_b_OR: Tensor) -> Tensor:
    """Of all rows of these layers, one below the other."""
    squares = [r.cache.base_norm_sq() for r in batch]
    alone = [
        partial(r.cache.base.adapted_row_norm, sq, r.a_RI, r.b_OR, r.s) for r, sq in zip(batch, squares, strict=True)
    ]
    if not batch[0].cache.base.expands(len(batch[0].a_RI)):
        return alone[0]()
    dtype = squares[0].dtype
    terms = [
        F.expansion(r.cache.base.times_transposed(r.a_RI).to(dtype), r.a_RI.to(dtype), r.b_OR.to(dtype), r.s)
        for r in batch
    ]
    W_sq_O = torch.cat(squares)
    n_sq_O = F.expanded_square(W_sq_O, torch.cat(terms), all_b_OR.to(dtype))
    if n_sq_O.is_meta or F.nothing_cancelled(W_sq_O, n_sq_O):
        return F.length(n_sq_O)
    # a layer with rows that may have cancelled is taken by itself
    parts = zip(squares, n_sq_O.split([len(sq) for sq in squares]), alone, strict=True)
    return torch.cat([F.length(part) if F.nothing_cancelled(sq, part) else own() for sq, part, own in parts])


def _split_rows(t: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Each layer's rows of what was made for all, aligned as a tensor of its own would be.

    A product's last bits may follow from the alignment of its operands. They must not follow from which layers were
    made together.
    """
    return [own.clone() if own.is_cpu and own.data_ptr() % F.ALIGNMENT else own for own in t.split(list(rows))]
