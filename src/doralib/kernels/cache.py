"""What a layer computes with that follows from A, B, m and its frozen weight, made when one of them has changed.

No version counter sees every write: not those of fused and 8-bit optimizers, of ``.data``, or to FSDP2's unsharded
parameters. So the small tensors are kept as they were and compared bit by bit, (O + I) R numbers against O I R
multiplications. Of the frozen weight the base tells whether it is another one.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import on_gpu
from .norm import NormBase, OnDevice, norm_in_graph, register
from .operands import Operands
from .renewal import Made, Norm, Request, fresh_norms, renew_operands


class LayerCache:
    """One layer's norm and operands, never stale."""

    def __init__(self, base: NormBase) -> None:
        self.base = base
        self.group: Group | None = None
        self.trusted: dict[torch.dtype, tuple[Tensor, Operands, Tensor | None]] | None = None
        """Inside `doralib.unchanged`, by dtype what a call without gradients needs beside x: W, operands and bias."""
        self._handle = register(self)
        self._base_sq: tuple[Any, Tensor] | None = None
        self.last_norm: Norm | None = None
        self.last_operands: Made | None = None
        self._on_device: OnDevice | None = None

    def forget(self) -> None:
        """Make all of it anew: a weight that was cast or moved may lie where the old one did, and have its key."""
        self._base_sq = self.last_norm = self.last_operands = self._on_device = None

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
        request, made = Request(self, a_RI, b_OR, m_O, s, bias_O, dtype, n_O), self.last_operands
        if made is None or not self._is_current(made, request):
            beside = () if self.group is None else self.group.stale_beside(self)
            made = renew_operands([request, *beside])[0]
        if torch.is_grad_enabled():
            if self.group is not None and m_O is not None and n_O is None:
                self.group.remember(self, request)
        elif made.operands.columns_OR is None:
            made = self.last_operands = made._replace(operands=made.operands.with_columns())
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
        return fresh_norms([Request(self, a_RI, b_OR, None, s, None, b_OR.dtype, None)])[0].n_O

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

    def known_norm(self, a_RI: Tensor, b_OR: Tensor, s: float) -> Norm | None:
        """The norm that was made last, if it would be the same now."""
        norm = self.last_norm
        if norm is None or norm.s != s or norm.key != self.base.key():
            return None
        return norm if norm.a_RI.equals(a_RI) and norm.b_OR.equals(b_OR) else None

    def is_stale(self, request: Request) -> bool:
        """Whether parameters have changed since; a base that was moved or replaced waits for its own layer's call."""
        norm, made = self.last_norm, self.last_operands
        if norm is None or made is None or norm.key != self.base.key():
            return False
        return not self._is_current(made, request)

    def _is_current(self, made: Made, request: Request) -> bool:
        """Whether operands for it would be the same that were made, bit for bit."""
        _, a_RI, b_OR, m_O, s, bias_O, dtype, n_O = request
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

    Nothing relies on it: a cache that was left out finds out when asked.
    """

    def __init__(self, caches: Iterable[LayerCache] = ()) -> None:
        self._asked: weakref.WeakKeyDictionary[LayerCache, _Asked] = weakref.WeakKeyDictionary()
        for cache in caches:
            cache.group = self

    def remember(self, cache: LayerCache, request: Request) -> None:
        """What a cache was asked for, if it can be asked again: an optimizer changes parameters in their place."""
        parameters = [t for t in (request.a_RI, request.b_OR, request.m_O) if isinstance(t, nn.Parameter)]
        if len(parameters) == 3:
            tensors = parameters if request.bias_O is None else [*parameters, request.bias_O]
            self._asked[cache] = _Asked(tuple(map(weakref.ref, tensors)), request.s, request.dtype)

    def stale_beside(self, asking: LayerCache) -> list[Request]:
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

    def again(self, cache: LayerCache) -> Request | None:
        """The same for the values as they are; None where FSDP2 has freed the memory of a layer."""
        found = [t for ref in self.tensors if (t := ref()) is not None and (t.data_ptr() or not t.numel())]
        if len(found) < len(self.tensors):
            return None
        a_RI, b_OR, m_O, *bias = found
        return Request(cache, a_RI, b_OR, m_O, self.s, bias[0] if bias else None, self.dtype, None)
