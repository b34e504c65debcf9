"""Norms and operands of one layer or of many, made anew in one go.

A few operators over the rows of all layers take the place of as many for each between two large products: 7 % of a
float32 step of 1x256 tokens (docs/bench.md).
"""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import functional as F
from .copies import Copy
from .norm import NormBase
from .operands import Operands, make_operands


class Renewed(Protocol):
    """What keeps the norm and the operands of one layer: a `LayerCache`."""

    base: NormBase
    last_norm: "Norm | None"
    last_operands: "Made | None"

    def base_norm_sq(self) -> Tensor:
        """Squared row lengths of the frozen weight, (O,)."""

    def known_norm(self, a_RI: Tensor, b_OR: Tensor, s: float) -> "Norm | None":
        """The norm that was made last, if it would be the same now."""


class Request(NamedTuple):
    """A cache, and what is wanted of it."""

    cache: Renewed
    a_RI: Tensor
    b_OR: Tensor
    m_O: Tensor | None
    s: float
    bias_O: Tensor | None
    dtype: torch.dtype
    n_O: Tensor | None


class Norm(NamedTuple):
    """A norm and what it was made from."""

    key: Any
    s: float
    a_RI: Copy
    b_OR: Copy
    n_O: Tensor


class Made(NamedTuple):
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
def renew_operands(requests: Sequence[Request]) -> list[Made]:
    """Make the operands, DoRA's of one rank, scale and dtype in one go."""
    own = [i for i, request in enumerate(requests) if request.m_O is not None and request.n_O is None]
    norms = dict(zip(own, fresh_norms([requests[i] for i in own]), strict=True))
    batches: dict[Any, list[int]] = {}
    for i, (_, a_RI, b_OR, m_O, s, bias_O, dtype, _) in enumerate(requests):
        key: Any = i
        if m_O is not None:
            key = (len(a_RI), s, bias_O is None, dtype, a_RI.dtype, b_OR.dtype, m_O.dtype, b_OR.device)
        batches.setdefault(key, []).append(i)
    made: dict[int, Made] = {}
    for batch in batches.values():
        first = requests[batch[0]]
        if first.m_O is None:
            made[batch[0]] = _make_lora(first)
        else:
            made.update(
                zip(batch, _make_dora([requests[i] for i in batch], [norms.get(i) for i in batch]), strict=True)
            )
    for i, request in enumerate(requests):
        request.cache.last_operands = made[i]
    return [made[i] for i in range(len(requests))]


def _make_lora(request: Request) -> Made:
    _, a_RI, b_OR, _, s, _, dtype, _ = request
    copies = (Copy(t.detach().clone()) for t in (a_RI, b_OR))
    return Made(make_operands(a_RI, b_OR.detach(), None, s, None, dtype), dtype, None, None, *copies)


def _make_dora(batch: list[Request], norms: Sequence[Norm | None]) -> list[Made]:
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
        made.append(Made(operands, r.dtype, Copy(own_m_O), None if own_bias_O is None else Copy(own_bias_O)))
    return made


def fresh_norms(requests: Sequence[Request]) -> list[Norm]:
    """The norms for these, the stale among them made in one go; not where Triton's kernels take the weight."""
    found = [r.cache.known_norm(r.a_RI, r.b_OR, r.s) for r in requests]
    stale = [r for r, norm in zip(requests, found, strict=True) if norm is None]
    # not what is kept now: another thread may have put its own there
    made = iter(renew_norms(stale) if stale else [])
    return [norm or next(made) for norm in found]


# a norm made in inference mode could not be kept for a later backward pass
@torch.inference_mode(False)
@torch.no_grad()
def renew_norms(requests: Sequence[Request]) -> list[Norm]:
    """Make these norms, all expanded squares of one rank in one go."""
    batches: dict[Any, list[int]] = {}
    for i, (cache, a_RI, b_OR, *_) in enumerate(requests):
        R = len(a_RI)
        key = (R, a_RI.dtype, b_OR.dtype, b_OR.device) if cache.base.expands(R) else i
        batches.setdefault(key, []).append(i)
    made: dict[int, Norm] = {}
    for batch in batches.values():
        # autocast would run the products of float32 sums in half precision
        with F.without_autocast(requests[batch[0]].b_OR):
            made.update(zip(batch, _make_norm_batch([requests[i] for i in batch]), strict=True))
    for i, request in enumerate(requests):
        request.cache.last_norm = made[i]
    return [made[i] for i in range(len(requests))]


def _make_norm_batch(batch: list[Request]) -> list[Norm]:
    rows = [len(r.b_OR) for r in batch]
    copy_OR = torch.cat([r.b_OR.detach() for r in batch])
    copies = [
        r._replace(a_RI=r.a_RI.detach().clone(), b_OR=b_OR)
        for r, b_OR in zip(batch, _split_rows(copy_OR, rows), strict=True)
    ]
    n_O = _lengths(copies, copy_OR)
    n_O.masked_fill_(n_O == 0, float("inf"))
    return [
        Norm(r.cache.base.key(), r.s, Copy(r.a_RI), Copy(r.b_OR), own_n_O)
        for r, own_n_O in zip(copies, n_O.split(rows), strict=True)
    ]


def _lengths(batch: list[Request], all_b_OR: Tensor) -> Tensor:
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
