"""What a layer computes with that follows from A, B, m and the norm alone, made when one of them has changed."""

import weakref
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .norm import FreshNorm, are_parameters, same
from .together import Together, at_hand

# below this gain the product is not read back from the output: the output may have underflowed
TINY_GAIN = 1e-12


class Ready(NamedTuple):
    """Small factors, a row or a rank wide, in the dtypes they are used in."""

    gsb_OR: Tensor
    """``s g ∘ B`` in the dtype of the products."""
    wide_gsb_OR: Tensor
    """The same in the dtype of B."""
    gain_O: Tensor | None
    """None for LoRA."""
    gs_O1: Tensor | None
    """``s g``."""
    rest_O: Tensor | None
    """g - 1 in the dtype of the products; None where g itself loses nothing and there is no bias."""
    shift_O: Tensor | None
    """``(g - 1) ∘ bias``."""
    a_RI: Tensor
    """In the dtype of the products."""
    wide_a_RI: Tensor
    """A itself."""
    n_O: Tensor | None = None
    """The norm, where the gain is m / n and the gradient is m's."""
    clear: bool | None = None
    """Whether no gain is below TINY_GAIN; None: not known."""


class _Wanted(NamedTuple):
    """A layer, and what its `Ready` is to be made from."""

    kept: "Kept"
    factors: tuple[Tensor, ...]
    """A, B and, for DoRA, m."""
    n_O: Tensor | None
    s: float
    bias_O: Tensor | None
    dtype: torch.dtype


class _Made(NamedTuple):
    """A `Ready` and what it was made from: copies, but the norm, of which `FreshNorm` hands out the same tensor as long
    as A, B and s are the same."""

    ready: Ready
    copies: tuple[Tensor, ...]
    """A and B for LoRA, m for DoRA, and the bias."""
    n_O: Tensor | None
    s: float
    dtype: torch.dtype

    def still(self, wanted: _Wanted) -> bool:
        """Whether it would be the same now, bit for bit."""
        if self.n_O is not wanted.n_O or self.s != wanted.s or self.dtype != wanted.dtype:
            return False
        # A itself is handed out: another tensor of the same values may take its place, and the old one be written to
        if self.ready.wide_a_RI.data_ptr() != wanted.factors[0].data_ptr():
            return False
        watched = _watched(wanted)
        return len(watched) == len(self.copies) and all(same(a, b) for a, b in zip(self.copies, watched, strict=True))


def _watched(wanted: _Wanted) -> tuple[Tensor, ...]:
    own = wanted.factors[:2] if wanted.n_O is None else wanted.factors[2:]
    return own if wanted.bias_O is None else (*own, wanted.bias_O)


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
        self, factors: tuple[Tensor, ...], n_O: Tensor | None, s: float, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Ready:
        """What is ready for products of a dtype, outside the graph.

        Args:
            factors: A, B and, for DoRA, m.
            n_O: From the layer's `FreshNorm`, for these factors; None for LoRA.
            s: The scale.
            bias_O: The layer's, which is not scaled.
            dtype: Of the products.
        """
        wanted, made = _Wanted(self, factors, n_O, s, bias_O, dtype), self._made
        if made is None or not made.still(wanted):
            others = [] if self.together is None else self.together.changed(self)
            # not what is kept now: another thread's round may have put its own there, of the last norm
            made = _make([wanted, *(other for kept in others if (other := kept._wanted()))])
        if self.together is not None and torch.is_grad_enabled() and n_O is not None and are_parameters(*factors):
            watched = factors if bias_O is None else (*factors, bias_O)
            self._asked = tuple(weakref.ref(p) for p in watched), s, bias_O is not None, dtype
            self.together.remember(self)
        return made.ready

    def has_changed(self) -> bool:
        """Whether the parameters that it was asked for last have changed."""
        wanted = self._wanted()
        return wanted is not None and not (self._made and self._made.still(wanted))

    def _wanted(self) -> _Wanted | None:
        """For the parameters that it was asked for last, if they are still there, and the norm was computed there."""
        n_O = self.norm.last
        if self._asked is None or n_O is None:
            return None
        refs, s, has_bias, dtype = self._asked
        found = at_hand(refs)
        if found is None or n_O.device != found[0].device:
            return None
        return _Wanted(self, found[:3], n_O, s, found[3] if has_bias else None, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled layer makes its own."""
        return {"norm": self.norm, "together": self.together}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["norm"])  # type: ignore[misc]
        self.together = state["together"]


def meet(layers: Iterable[Kept]) -> None:
    """Let what these keep, and their norms, be made anew together from now on."""
    norms, kept = Together(), Together()
    for layer in layers:
        layer.together, layer.norm.together = kept, norms


_ByRows = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def ready_from(
    a_RI: Tensor, b_OR: Tensor, gain_O: Tensor | None, s: float, bias_O: Tensor | None, dtype: torch.dtype
) -> Ready:
    """The same from a gain that is at hand."""
    return Ready(*_by_rows(b_OR, gain_O, s, bias_O, dtype), a_RI.to(dtype), a_RI)


def _by_rows(b_OR: Tensor, gain_O: Tensor | None, s: float, bias_O: Tensor | None, dtype: torch.dtype) -> _ByRows:
    """The fields of `Ready` that have a row for each output, in their order."""
    gs_O1 = rest_O = shift_O = None
    if gain_O is not None:
        gs_O1 = (gain_O * s)[:, None]
        if bias_O is not None or dtype != gain_O.dtype:
            rest_O = (gain_O - 1).to(dtype)
            shift_O = None if bias_O is None else rest_O * bias_O.to(dtype)
    wide_OR = b_OR * (s if gs_O1 is None else gs_O1)
    return wide_OR.to(dtype), wide_OR, gain_O, gs_O1, rest_O, shift_O


# what is made in inference mode could not be used by a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def _make(wanted: Sequence[_Wanted]) -> _Made:
    """Make these, DoRA's of one rank, scale and dtype in one go; the first is returned."""
    batches: dict[Any, list[_Wanted]] = {}
    for each in wanted:
        key: Any = id(each)
        if each.n_O is not None:
            a, b, m = each.factors
            key = (len(a), each.s, each.bias_O is None, each.dtype, a.dtype, b.dtype, m.dtype, b.device)
        batches.setdefault(key, []).append(each)
    # the first, which is asked for, last
    for batch in reversed(batches.values()):
        made = [_made_lora(batch[0])] if batch[0].n_O is None else _made_batch(batch)
        for each, own in zip(batch, made, strict=True):
            each.kept._made = own
    return made[0]


def _made_batch(batch: list[_Wanted]) -> list[_Made]:
    first, rows = batch[0], [len(each.factors[1]) for each in batch]
    # the copies of m and the bias are what the next call is compared with
    b_OR, m_O = (torch.cat([each.factors[i].detach() for each in batch]) for i in (1, 2))
    n_O = torch.cat([each.n_O for each in batch if each.n_O is not None])
    biases = [each.bias_O.detach() for each in batch if each.bias_O is not None]
    bias_O = torch.cat(biases) if biases else None
    gain_O = m_O / n_O
    clear = not gain_O.numel() or gain_O.amin().item() >= TINY_GAIN
    by_rows = (*_by_rows(b_OR, gain_O, first.s, bias_O, first.dtype), m_O, bias_O)
    columns = [repeat(None) if t is None else t.split(rows) for t in by_rows]
    made = []
    for each, (*parts, own_m_O, own_bias_O) in zip(batch, zip(*columns, strict=False), strict=True):
        a_RI = each.factors[0].detach()
        ready = Ready._make([*parts, a_RI.to(first.dtype), a_RI, each.n_O, clear])
        copies = (own_m_O,) if own_bias_O is None else (own_m_O, own_bias_O)
        made.append(_Made(ready, copies, each.n_O, first.s, first.dtype))
    return made


def _made_lora(wanted: _Wanted) -> _Made:
    a_RI, b_OR = (p.detach() for p in wanted.factors)
    ready = ready_from(a_RI, b_OR, None, wanted.s, None, wanted.dtype)
    copies = tuple(t.detach().clone() for t in _watched(wanted))
    return _Made(ready, copies, None, wanted.s, wanted.dtype)
