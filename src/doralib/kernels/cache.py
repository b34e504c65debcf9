"""What a layer computes with that follows from A, B, m and the norm alone, made when one of them has changed."""

import weakref
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .norm import Change, Copy, FreshNorm, Seen, fresh, split_rows
from .operands import TINY_GAIN, Ready, _by_rows, ready_from


class Member(Protocol):
    """One layer's share."""

    def has_changed(self) -> bool:
        """Whether what it was made from last has changed, as far as it can know by itself."""


M = TypeVar("M", bound=Member)


class Together:
    """The layers of one model that are in use: one that was taken along and then not asked is left out from there on.

    Nothing relies on it: a member that was left out, or changes again, finds out when it is asked itself.
    """

    def __init__(self) -> None:
        self._members: dict[int, weakref.ref[Any]] = {}
        self._not_asked: set[int] = set()

    def remember(self, member: Member) -> None:
        """That it was asked."""
        self._members[id(member)] = weakref.ref(member)
        self._not_asked.discard(id(member))

    def changed(self, asking: M) -> list[M]:
        """Those beside the one that is asking that have changed; the caller makes them anew."""
        # a list at once, and no error for a key that is gone: another thread may be asking too
        known = [(key, ref()) for key, ref in list(self._members.items())]
        others = [
            (key, member) for key, member in known if member is not asking and (not member or member.has_changed())
        ]
        for key, member in others:
            if member is None or key in self._not_asked:
                self._members.pop(key, None)
                self._not_asked.discard(key)
        taken = [(key, member) for key, member in others if key in self._members]
        self._not_asked |= {key for key, _ in taken}
        return [member for _, member in taken if member is not None]

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model's layers meet again under a copy of their own."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def at_hand(refs: Sequence[weakref.ref[Tensor]]) -> tuple[Tensor, ...] | None:
    """The tensors, where all of them live and hold values: FSDP2 frees the memory of a layer that is not computing."""
    found = tuple(t for ref in refs if (t := ref()) is not None and (t.data_ptr() or not t.numel()))
    return found if len(found) == len(refs) else None


class _Wanted(NamedTuple):
    """A layer, and what its `Ready` is to be made from."""

    kept: "Kept"
    factors: tuple[Tensor, ...]
    """A, B and, for DoRA, m."""
    s: float
    bias_O: Tensor | None
    dtype: torch.dtype
    n_O: Tensor | None
    """The norm where it is not `Kept.norm`'s."""

    def key(self) -> Any:
        """Differs once the norm would be another one with the same factors."""
        return self.kept.norm.base.key() if self.has_own_norm() else None

    def has_own_norm(self) -> bool:
        """Whether the layer's own norm is wanted."""
        return len(self.factors) == 3 and self.n_O is None

    def watched(self) -> tuple[Tensor, ...]:
        """What it follows from, beside the norm that is given."""
        own = self.factors if self.n_O is None else self.factors[2:]
        return own if self.bias_O is None else (*own, self.bias_O)


class _Made(NamedTuple):
    """A `Ready` and what it was made from."""

    ready: Ready
    copies: tuple[Copy, ...]
    """Of `_Wanted.watched`."""
    key: Any
    n_O: Tensor | None
    """As it was given: the same tensor as long as what it follows from is the same."""
    s: float
    dtype: torch.dtype

    def still(self, wanted: _Wanted) -> bool:
        """Whether it would be the same now, bit for bit."""
        if self.dtype is not wanted.dtype or self.s != wanted.s or self.n_O is not wanted.n_O:
            return False
        return self.key == wanted.key() and self.same_values(wanted)

    def same_values(self, wanted: _Wanted) -> bool:
        """The same of what an optimiser changes."""
        # A itself is handed out: another tensor of the same values may take its place, and the old one be written to
        if self.ready.wide_a_RI.data_ptr() != wanted.factors[0].data_ptr():
            return False
        watched = wanted.watched()
        return len(watched) == len(self.copies) and all(a.equals(b) for a, b in zip(self.copies, watched, strict=True))


class Kept:
    """One layer's `Ready`, never stale."""

    def __init__(self, norm: FreshNorm) -> None:
        self.together: Together | None = None
        self.norm = norm
        self.held: dict[torch.dtype, tuple[Tensor, Ready, Tensor | None]] | None = None
        """By dtype what a call without gradients needs beside its input, inside `doralib.unchanged`."""
        self._made: _Made | None = None
        self._asked: tuple[tuple[weakref.ref[Tensor], ...], float, bool, torch.dtype] | None = None

    def __call__(
        self,
        factors: tuple[Tensor, ...],
        s: float,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        n_O: Tensor | None = None,
    ) -> Ready:
        """What is ready for products of a dtype, outside the graph.

        Args:
            factors: A, B and, for DoRA, m.
            s: The scale.
            bias_O: The layer's, which is not scaled.
            dtype: Of the products.
            n_O: For DoRA, a norm in place of the layer's own; the same tensor as long as its values are the same.
        """
        if n_O is None and len(factors) == 3 and self.norm.base.triton_weight() is not None:
            # it is written to in place
            n_O = self.norm.constant(*factors[:2], s).clone()
        wanted, made = _Wanted(self, factors, s, bias_O, dtype, n_O), self._made
        if made is None or not made.still(wanted):
            others = [] if self.together is None else self.together.changed(self)
            made = _make([wanted, *(other for kept in others if (other := kept._wanted()))])
        if made.ready.columns_OR is None and not torch.is_grad_enabled():
            made = self._made = made._replace(ready=_with_columns(made.ready))
        if self.together is not None and torch.is_grad_enabled() and wanted.has_own_norm() and _are_parameters(factors):
            self._asked = tuple(map(weakref.ref, wanted.watched())), s, bias_O is not None, dtype
            self.together.remember(self)
        return made.ready

    def has_changed(self) -> bool:
        """Whether the parameters that it was asked for last have changed."""
        wanted, made = self._wanted(), self._made
        # a base that was moved, replaced or sharded waits until its own layer asks
        return bool(wanted and made and made.key == wanted.key() and not made.same_values(wanted))

    def _wanted(self) -> _Wanted | None:
        """For the parameters that it was asked for last, if they are still there."""
        if self._asked is None:
            return None
        refs, s, has_bias, dtype = self._asked
        found = at_hand(refs)
        if found is None:
            return None
        return _Wanted(self, found[:3], s, found[3] if has_bias else None, dtype, None)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer makes its own."""
        return {"norm": self.norm, "together": self.together}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["norm"])  # type: ignore[misc]
        self.together = state["together"]


def meet(layers: Iterable[Kept]) -> None:
    """Let these be made anew together from now on."""
    together = Together()
    for layer in layers:
        layer.together = together


def _with_columns(ready: Ready) -> Ready:
    return ready._replace(columns_OR=ready.wide_gsb_OR.T.contiguous().T)


def _are_parameters(tensors: Sequence[Tensor]) -> bool:
    """Whether an optimiser may change them, each in its place."""
    return all(type(t) is nn.Parameter or isinstance(t, nn.Parameter) for t in tensors)


# what is made in inference mode could not be used by a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def _make(wanted: Sequence[_Wanted]) -> _Made:
    """Make these, DoRA's of one rank, scale and dtype in one go; the first is returned."""
    own = [each for each in wanted if each.has_own_norm()]
    seen = fresh([Change(each.kept.norm, each.factors[0], each.factors[1], each.s) for each in own])
    norms = dict(zip(map(id, own), seen, strict=True))
    batches: dict[Any, list[_Wanted]] = {}
    for each in wanted:
        key: Any = id(each)
        if len(each.factors) == 3:
            a, b, m = each.factors
            key = (len(a), each.s, each.bias_O is None, each.dtype, a.dtype, b.dtype, m.dtype, b.device)
        batches.setdefault(key, []).append(each)
    # the first, which is asked for, last
    for batch in reversed(batches.values()):
        if len(batch[0].factors) == 2:
            made = [_made_lora(batch[0])]
        else:
            made = _made_batch(batch, [_basis(each, norms.get(id(each))) for each in batch])
        for each, new in zip(batch, made, strict=True):
            each.kept._made = new
    return made[0]


class _Basis(NamedTuple):
    """B and the norm that belongs to it, and what is left to compare of them."""

    b_OR: Tensor
    n_O: Tensor
    copies: tuple[Copy, ...]
    key: Any


def _basis(wanted: _Wanted, seen: Seen | None) -> _Basis:
    if seen is not None:
        return _Basis(seen.b_OR.value, seen.n_O, (seen.a_RI, seen.b_OR), seen.key)
    assert wanted.n_O is not None
    return _Basis(wanted.factors[1].detach(), wanted.n_O, (), None)


def _made_batch(batch: list[_Wanted], bases: list[_Basis]) -> list[_Made]:
    first, rows = batch[0], [len(each.b_OR) for each in bases]
    # the copies of m and the bias are what the next call is compared with
    m_O = torch.cat([each.factors[2].detach() for each in batch])
    biases = [each.bias_O.detach() for each in batch if each.bias_O is not None]
    bias_O = torch.cat(biases) if biases else None
    gain_O = m_O / torch.cat([each.n_O for each in bases])
    clear = not gain_O.numel() or gain_O.amin().item() >= TINY_GAIN
    b_OR = torch.cat([each.b_OR for each in bases])
    by_rows = (*_by_rows(b_OR, gain_O, first.s, bias_O, first.dtype), m_O, bias_O)
    columns = [repeat(None) if t is None else split_rows(t, rows) for t in by_rows]
    made = []
    for each, basis, (*parts, own_m_O, own_bias_O) in zip(batch, bases, zip(*columns, strict=False), strict=True):
        a_RI = each.factors[0].detach()
        copies = (*basis.copies, *(Copy(t) for t in (own_m_O, own_bias_O) if t is not None))
        ready = Ready._make([*parts, a_RI.to(first.dtype), a_RI, basis.n_O, clear, None])
        made.append(_Made(ready, copies, basis.key, each.n_O, first.s, first.dtype))
    return made


def _made_lora(wanted: _Wanted) -> _Made:
    a_RI, b_OR = (p.detach() for p in wanted.factors)
    ready = ready_from(a_RI, b_OR, None, wanted.s, None, wanted.dtype)
    copies = tuple(Copy(t.detach().clone()) for t in wanted.watched())
    return _Made(ready, copies, None, None, wanted.s, wanted.dtype)
