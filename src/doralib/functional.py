"""DoRA in formulas. Everything else calls these or is tested against them.

Dimensions, the same letters in every file: O output features (rows of a weight), I input features, R rank,
N rows of an input. Source: arXiv 2402.09353, equations 5 and 11; s = lora_alpha / r multiplies B A wherever it stands.

    V = W + s B A        n = length of each output row of V        g = m / n        y = g ∘ (x Vᵀ) + bias
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# rows are taken in blocks of this many elements: 4 MiB of float32 stay in a core's cache
BLOCK_ELEMENTS = 1 << 20
# bytes: torch's own tensors on a CPU begin at a multiple of this
ALIGNMENT = 64
# where the terms of the expanded square are more than this times their sum, rounding has eaten 3 of its bits
CANCELLATION = 8.0
# above this n² / |w|² they are not: the larger root of 8 n² = 1 + (1 + n)², squared
SHRUNK = ((1 + math.sqrt(15)) / 7) ** 2
# the dense sweep over W costs about as much as this many multiplications an element; measured on 2 Xeon cores
SWEEP = 16


class Rows(Protocol):
    """A matrix by blocks of its rows: a tensor, or a storage that is made dense one block at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""

    @property
    def device(self) -> torch.device:
        """Where the blocks are made."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """These rows, dense."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and gains over tensors of this dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """A context in which products near this tensor keep their dtype; the meta device has no autocast to switch off."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def row_blocks(num_rows: int, row_length: int, elements: int | None = None) -> Iterator[slice]:
    """Slices that cover the rows, each of at most `elements` (BLOCK_ELEMENTS), and at least one row."""
    step = max(1, (elements or BLOCK_ELEMENTS) // max(1, row_length))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


@torch.no_grad()
def row_norm_sq(W_OI: Rows) -> Tensor:
    """Squared length of each output row, (O,), in `sum_dtype`; no float copy of W is made."""
    dtype = sum_dtype(W_OI.dtype)
    sums = [W_OI[rows].to(dtype).square().sum(1) for rows in row_blocks(*W_OI.shape)]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=dtype, device=W_OI.device)


@torch.no_grad()
def times_transposed(W_OI: Rows, a_RI: Tensor) -> Tensor:
    """``W Aᵀ``, (O, R), in `sum_dtype`, by row blocks where W is of another dtype."""
    dtype = sum_dtype(W_OI.dtype)
    a_IR = a_RI.to(dtype).T
    if isinstance(W_OI, Tensor) and W_OI.dtype == dtype:
        return W_OI @ a_IR
    U_OR = a_IR.new_empty(W_OI.shape[0], a_RI.shape[0])
    for rows in row_blocks(*W_OI.shape):
        torch.mm(W_OI[rows].to(dtype), a_IR, out=U_OR[rows])
    return U_OR


@torch.no_grad()
def transposed_times(W_OI: Rows, c_OR: Tensor) -> Tensor:
    """``Cᵀ W``, (R, I), in `sum_dtype`, by row blocks."""
    dtype = sum_dtype(W_OI.dtype)
    out_RI = c_OR.new_zeros(c_OR.shape[1], W_OI.shape[1], dtype=dtype)
    for rows in row_blocks(*W_OI.shape):
        out_RI.addmm_(c_OR[rows].to(dtype).T, W_OI[rows].to(dtype))
    return out_RI


@torch.no_grad()
def expansion(U_OR: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
    """``2 s W Aᵀ + s² B A Aᵀ``, (O, R): row by row its product with B is ``|w + s b A|² - |w|²``.

    Args:
        U_OR: ``W Aᵀ``.
    """
    return torch.addmm(U_OR, b_OR, a_RI @ a_RI.T, beta=2 * s, alpha=s * s)


@torch.no_grad()
def expanded_square(W_sq_O: Tensor, expansion_OR: Tensor, b_OR: Tensor) -> Tensor:
    """``|w + s b A|²`` row by row, (O,), from |w|² and `expansion`."""
    return W_sq_O + (expansion_OR * b_OR).sum(1)


def nothing_cancelled(W_sq_O: Tensor, n_sq_O: Tensor) -> bool:
    """Whether no row is so much shorter that its expanded square can have lost more than rounding."""
    # |s b A| <= |w| + n: where n is not much below |w| nothing can have cancelled
    return not n_sq_O.numel() or torch.sub(n_sq_O, W_sq_O, alpha=SHRUNK).amin().item() >= 0


@torch.no_grad()
def adapted_row_norm(
    W_sq_O: Tensor,
    U_OR: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    s: float,
    dense_rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Length of each output row of ``W + s B A``, (O,), without forming the (O, I) sum; outside the graph.

    Row by row ``|w + s b A|² = |w|² + 2 s b·(W Aᵀ) + s² b (A Aᵀ) bᵀ``: the largest temporary is (O, R). The expanded
    square cancels where s b A is about -w; those rows are summed densely.

    Args:
        W_sq_O: `row_norm_sq` of W, in the dtype of the result.
        U_OR: ``W Aᵀ``.
        dense_rows: The rows of W with the given numbers, (K, I). Without it the rows that cancel keep an error of
            about eps (|w| + |s b A|)² / |w + s b A|².
    """
    a, b, U = a_RI.to(W_sq_O.dtype), b_OR.to(W_sq_O.dtype), U_OR.to(W_sq_O.dtype)
    n_sq_O = expanded_square(W_sq_O, expansion(U, a, b, s), b)
    if dense_rows is not None and not (n_sq_O.is_meta or nothing_cancelled(W_sq_O, n_sq_O)):
        gram_O = s * s * ((b @ (a @ a.T)) * b).sum(1)
        cancelled = (n_sq_O * CANCELLATION < W_sq_O + gram_O).nonzero().flatten()
        for rows in row_blocks(len(cancelled), a.shape[1]):
            index = cancelled[rows]
            n_sq_O[index] = torch.addmm(dense_rows(index).to(b.dtype), b[index], a, alpha=s).square().sum(1)
    return length(n_sq_O)


def length(n_sq_O: Tensor) -> Tensor:
    """The square root, in place; rounding can leave a tiny negative where W + s B A is almost zero."""
    return n_sq_O.clamp_min_(0).sqrt_()


def difference(a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``B A - B0 A0``, of rank 2 R: ``[B - B0, B0] [A; A - A0]``, where nothing cancels while A is near A0.

    At the start both products are zero exactly. For factors of a convolution too.
    """
    return torch.cat([a, a - start_a]), torch.cat([b - start_b, start_b], 1)


def dense_is_cheaper(O: int, I: int, R: int) -> bool:
    """Whether summing W + s B A densely costs less than the expanded square, whose R x R products grow faster."""
    return R * R * (O + I) > SWEEP * O * I


@torch.no_grad()
def dense_row_norm(W_OI: Rows, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
    """`adapted_row_norm` by blocks of the rows themselves: no (O, I) tensor, no cancellation."""
    dtype = sum_dtype(W_OI.dtype)
    a, b = a_RI.to(dtype), b_OR.to(dtype)
    n_O = b.new_empty(W_OI.shape[0])
    for rows in row_blocks(*W_OI.shape):
        n_O[rows] = torch.addmm(W_OI[rows].to(dtype), b[rows], a, alpha=s).square_().sum(1).sqrt_()
    return n_O


def gain(m_O: Tensor, n_O: Tensor) -> Tensor:
    """``m / n``, (O,); a row of length zero has gain zero, in the backward pass too."""
    alive = n_O > 0
    return torch.where(alive, m_O / torch.where(alive, n_O, 1), 0)


def add_gain(base: Tensor, product: Tensor, gain: Tensor, turned: Tensor | None = None) -> Tensor:
    """``base + (g - 1) ∘ product + turned``: an adapted layer's output from the frozen layer's own.

    Written with g - 1, so that g = 1 and no turn give the base output bit for bit, and a bfloat16 product loses nothing
    where g is near 1.

    Args:
        product: The frozen layer's output without its bias.
        gain: g, of a shape that multiplies it.
        turned: ``g ∘ (s B A x)``; None: A and B turn nothing.
    """
    change = (gain - 1).to(base.dtype) * product
    return base + (change if turned is None else change + turned)


def compose(base_NO: Tensor, lora_NO: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """``g ∘ (z + s x Aᵀ Bᵀ) + bias`` from the frozen layer's own output ``base = z + bias``.

    Args:
        lora_NO: ``s x Aᵀ Bᵀ``.
    """
    product_NO = base_NO if bias_O is None else base_NO - bias_O.to(base_NO.dtype)
    return add_gain(base_NO, product_NO, gain_O, gain_O.to(base_NO.dtype) * lora_NO)


def compose_exact(base_NO: Tensor, dropped_NO: Tensor, lora_NO: Tensor, gain_O: Tensor) -> Tensor:
    """``W x + (g - 1) ∘ (W x~) + g ∘ (s B A x~) + bias``: dropout on exactly the change of the weight.

    The paper's code and PEFT. Equal to `compose` when x~ = x.

    Args:
        base_NO: ``W x + bias``.
        dropped_NO: ``W x~``, no bias.
        lora_NO: ``s B A x~``.
    """
    return add_gain(base_NO, dropped_NO, gain_O, gain_O.to(base_NO.dtype) * lora_NO)


@torch.no_grad()
def effective_weight(W_OI: Tensor, a_RI: Tensor, gsb_OR: Tensor, gain_O: Tensor | None) -> Tensor:
    """``g ∘ (W + s B A)``, (O, I), in W's dtype; W itself, bit for bit, where g = 1 and B A = 0.

    It is laid out and aligned as W is: then a product with it has the bits of the same product with W.

    Args:
        a_RI: In W's dtype, and so is gsb_OR.
        gsb_OR: ``s g ∘ B``.
        gain_O: None for LoRA.
    """
    V_OI = _empty_as(W_OI)
    if gain_O is None:
        V_OI.copy_(W_OI)
    else:
        torch.mul(W_OI, gain_O.to(W_OI.dtype)[:, None], out=V_OI)
    return V_OI.addmm_(gsb_OR, a_RI)


def _empty_as(W_OI: Tensor) -> Tensor:
    """An empty tensor with W's strides and, where W is in one piece, its alignment.

    A weight that is mapped from a file may lie at any address, and a CPU's product can take another way there.
    """
    offset = W_OI.data_ptr() % ALIGNMENT
    in_one_piece = W_OI.is_contiguous() or W_OI.t().is_contiguous()
    if not offset or not in_one_piece:
        return torch.empty_like(W_OI)
    memory = W_OI.new_empty(W_OI.numel() + ALIGNMENT // W_OI.itemsize)
    start = (offset - memory.data_ptr()) % ALIGNMENT // W_OI.itemsize
    return memory.as_strided(W_OI.shape, W_OI.stride(), start)


@torch.no_grad()
def merge_weight(W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor | None, s: float) -> Tensor:
    """``g ∘ (W + s B A)``, the (O, I) weight that makes a plain layer equal to the adapted one.

    Takes a whole weight or a block of its rows with the same rows of B and m, or a stack of weights (E, O, I) with
    stacks of A (E, R, I), B (E, O, R) and m (E, O). A row with B = 0 and m = |w| up to the
    rounding of a sum is the base's own, bit for bit.

    Args:
        m_O: None for LoRA: ``W + s B A``.

    Returns:
        In `sum_dtype`; the caller casts it, once.
    """
    dtype = sum_dtype(W_OI.dtype)
    V_OI = W_OI.to(dtype, copy=True)
    add = V_OI.addmm_ if V_OI.dim() == 2 else V_OI.baddbmm_
    add(b_OR.to(dtype), a_RI.to(dtype), alpha=s)
    if m_O is None:
        return V_OI
    gain_O = gain(m_O.to(dtype), torch.linalg.vector_norm(V_OI, dim=-1))
    return V_OI.mul_(kept(gain_O[..., None], b_OR))


def kept(gain_O1: Tensor, b_OR: Tensor) -> Tensor:
    """The gain of rows, exactly 1 where B = 0 and it differs from 1 by what two ways of summing a length may.

    The gradient is the gain's.
    """
    rest = 1 - gain_O1.detach()
    same = (rest.abs() <= 8 * torch.finfo(rest.dtype).eps) & (b_OR == 0).all(-1, keepdim=True)
    # exact: the two are within a factor 2
    return torch.where(same, gain_O1 + rest, gain_O1)


class Share(NamedTuple):
    """One adapter's share of a combination: ``w (V - W)`` with ``V = g ∘ (W + s B A)``."""

    weight: float
    """w."""
    a_RI: Tensor
    b_OR: Tensor
    gain_O: Tensor | None
    """g; None for LoRA."""
    s: float


@torch.no_grad()
def combined_factors(parts: Sequence[Share]) -> tuple[Tensor, Tensor, Tensor]:
    """The one adapter that changes W by what several change it, weighted and summed: A', B' and G, in float64.

    ``W + Σ w_i (V_i - W) = G ∘ (W + B' A')`` row by row, with G = 1 + Σ w_i (g_i - 1), A' the A_i one under the other
    and B' the w_i s_i g_i ∘ B_i / G side by side. The magnitude is m' = G |W + B' A'|; LoRA alone has G = 1.

    Returns:
        A' (R, I), B' (O, R) and G (O,). Where G is 0 the row is 0, which m' = 0 and B' = 0 say; if a change is left
        there all the same, no adapter can say it, and G is NaN.
    """
    gains = [torch.ones(len(p.b_OR)).to(p.b_OR) if p.gain_O is None else p.gain_O for p in parts]
    moves = torch.stack([p.weight * (g.double() - 1) for p, g in zip(parts, gains, strict=True)])
    G_O = 1 + moves.sum(0)
    # what is left of sums like 1 - 0.7 - 0.3
    nothing = G_O.abs() <= 4 * torch.finfo(torch.float64).eps * (1 + moves.abs().sum(0))
    a_RI = torch.cat([p.a_RI.double() for p in parts])
    turn_OR = torch.cat(
        [p.weight * p.s * g.double()[:, None] * p.b_OR.double() for p, g in zip(parts, gains, strict=True)], 1
    )
    left = nothing.clone()
    left[nothing] = (turn_OR[nothing] @ a_RI).any(1)
    b_OR = torch.where(nothing[:, None], 0, turn_OR / torch.where(nothing, 1, G_O)[:, None])
    return a_RI, b_OR, torch.where(left, float("nan"), torch.where(nothing, 0, G_O))


@torch.no_grad()
def merged_change(W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor | None, s: float) -> Tensor:
    """``g ∘ (W + s B A) - W``, (O, I) in `sum_dtype`, as ``(g - 1) ∘ W + g ∘ (s B A)``: nothing cancels near g = 1."""
    dtype = sum_dtype(W_OI.dtype)
    W, a, b = W_OI.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
    if m_O is None:
        return b @ a * s
    g_O1 = gain(m_O.to(dtype), dense_row_norm(W, a, b, s))[:, None]
    return torch.addmm((g_O1 - 1) * W, g_O1 * b, a, alpha=s)


@torch.no_grad()
def combined(W_OI: Tensor, changes: Iterable[tuple[float, Tensor]]) -> Tensor:
    """``W + Σ w (V - W)`` from each adapter's weight w and own merged change V - W, in `sum_dtype`.

    The one sum of DoRA adapters that means something: m, A and B of two adapters cannot be added, for each was
    trained with its own norm.
    """
    V_OI = W_OI.to(sum_dtype(W_OI.dtype), copy=True)
    for weight, change_OI in changes:
        V_OI.add_(change_OI, alpha=weight)
    return V_OI


def swapped_channels(weight: Tensor, groups: int) -> Tensor:
    """(g a, b, taps...) as (g b, a, taps...): from a transposed convolution's storage to output channels, and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def moved(W_OI: Tensor, V_OI: Tensor) -> tuple[Tensor, Tensor]:
    """How far each output row went from W to V: | |v| - |w| | and 1 - cos(v, w), both (O,); paper, section 3.2.

    A row of length zero has no direction: its second value is 0.
    """
    dtype = sum_dtype(W_OI.dtype)
    w, v = W_OI.to(dtype), V_OI.to(dtype)
    length_w, length_v = w.norm(dim=1), v.norm(dim=1)
    both = length_w * length_v
    cosine = torch.where(both > 0, (w * v).sum(1) / torch.where(both > 0, both, 1), 1)
    return (length_v - length_w).abs(), 1 - cosine
