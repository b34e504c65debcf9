"""The Triton kernels on tensors: what is allocated, how a launch is cut up.

The large products stay with the GEMM library. What is left between them takes one pass over (N, O) each way:

    forward    y = g (base - bias + s xa Bᵀ) + bias, in place, from base = x Wᵀ + bias and xa = x Aᵀ
    backward   dz = g dy,  dg = Σ_N dy (y - bias) / g,  and where it pays  dzb = s dz B
    norm       n = |W + s B A| by tiles in registers: W is read once and no second (O, I) tensor exists

Sums are float32; float64 inputs are not for these kernels.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton as kernels
from .triton import INTERPRETED

_NUM_FLAGS: int = kernels.NUM_FLAGS.value


class Tile(NamedTuple):
    """How one launch is cut up; `benchmarks/gpu.py` tries several."""

    rows: int
    cols: int
    warps: int = 4
    stages: int = 3
    splits: int = 1
    fuse: bool = False
    dot: str = ""


def row_norm(W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, tile: Tile | None = None) -> Tensor:
    """``|W + s B A|`` by rows, (O,) float32, W read once; a dense sum, so nothing cancels that need not."""
    n_O = torch.empty(W_OI.shape[0], dtype=torch.float32, device=W_OI.device)
    with _on(W_OI):
        _launch_norm(W_OI, a_RI.contiguous(), b_OR.contiguous(), s, n_O, None, tile)
    return n_O


def fresh_row_norm(
    W_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    s: float,
    seen_a_RI: Tensor,
    seen_sb_OR: Tensor,
    n_O: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """n_O, made equal to ``|W + s B A|`` if A or s B differ in any bit from the ones seen last; no host waits.

    What is compared are the numbers themselves, so a write of any kind is seen: a fused optimizer's, through ``.data``,
    a new unsharded copy. Unchanged factors cost one reading of A, B and their copies and two launches.

    Args:
        seen_a_RI: float32, contiguous; start it as NaN. Overwritten by A.
        seen_sb_OR: likewise for s B, so that a new s is seen too.
        n_O: float32; overwritten where a change was found, infinity for a row of length zero. W is not watched: start
            again when it changes.
    """
    a_RI, b_OR = a_RI.contiguous(), b_OR.contiguous()
    flags = torch.empty(_NUM_FLAGS, dtype=torch.int32, device=W_OI.device)
    block = 256 if INTERPRETED else 1024
    with _on(W_OI):
        kernels.changed_kernel[(_NUM_FLAGS,)](
            a_RI, b_OR, seen_a_RI, seen_sb_OR, flags, a_RI.numel(), b_OR.numel(), s,
            _share(a_RI.numel(), block), _share(b_OR.numel(), block), BLOCK=block,
        )  # fmt: skip
        _launch_norm(W_OI, a_RI, b_OR, s, n_O, flags, tile)
    return n_O


def _share(count: int, block: int) -> int:
    return _cdiv(count, _NUM_FLAGS * block) * block


def _launch_norm(
    W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, n_O: Tensor, flags: Tensor | None, tile: Tile | None
) -> None:
    (O, I), R = W_OI.shape, a_RI.shape[0]
    if O == 0:
        return
    tile = tile or _norm_tile(O, I, R, W_OI.dtype)
    block_r = min(_power(R), 64 if R > 128 else 128)
    chunk = _cdiv(_cdiv(max(I, 1), tile.splits), tile.cols) * tile.cols
    splits = _cdiv(max(I, 1), chunk)
    out = n_O if splits == 1 else n_O.new_empty(splits, O)
    predicated, marks = flags is not None, n_O if flags is None else flags
    kernels.norm_kernel[(_cdiv(O, tile.rows), splits)](
        W_OI, a_RI, b_OR, marks, out, O, I, R, s, *W_OI.stride(), chunk,
        PREDICATED=predicated, SPLIT=splits > 1, ONE_R=block_r >= R, DOT=tile.dot or _norm_dot(W_OI.dtype),
        UPCAST=INTERPRETED, BLOCK_O=tile.rows, BLOCK_I=tile.cols, BLOCK_R=block_r,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        kernels.finish_norm_kernel[(_cdiv(O, 128),)](out, marks, n_O, O, splits, PREDICATED=predicated, BLOCK_O=128)


def compose_(
    y_NO: Tensor,
    xa_NR: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    bias_O: Tensor | None,
    s: float,
    tile: Tile | None = None,
) -> None:
    """Turn ``y = x Wᵀ + bias`` into ``g ∘ (x Wᵀ + s xa Bᵀ) + bias`` in place; y contiguous, xa and B of its dtype."""
    (N, O), R = y_NO.shape, xa_NR.shape[1]
    if y_NO.numel() == 0:
        return
    tile = tile or _compose_tile(N, O, R)
    with _on(y_NO):
        kernels.compose_kernel[(_cdiv(O, tile.cols), _cdiv(N, tile.rows))](
            y_NO, xa_NR.contiguous(), b_OR.contiguous(), y_NO if gain_O is None else gain_O,
            y_NO if bias_O is None else bias_O, N, O, R, s,
            HAS_GAIN=gain_O is not None, HAS_BIAS=bias_O is not None, UPCAST=_upcast(y_NO),
            BLOCK_N=tile.rows, BLOCK_O=tile.cols, BLOCK_R=min(_power(R), 64),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


class Products(NamedTuple):
    """What makes ``z = x Wᵀ + s xa Bᵀ``, of one dtype; the gradient of a gain near zero makes it again."""

    x_NI: Tensor
    W_OI: Tensor
    xa_NR: Tensor
    b_OR: Tensor
    s: float


def split_gradient(
    dy_NO: Tensor,
    y_NO: Tensor,
    gain_O: Tensor,
    bias_O: Tensor | None,
    products: Products,
    *,
    y_is_whole: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dz = g ∘ dy``, ``dzb = s dz B`` and ``dgain = Σ_N dy ∘ z``, (O,) float32, z read back as (y - bias) / g.

    Args:
        y_is_whole: False if y no longer holds the layer's output: every row of z is then made again.
    """
    (N, O), R, s = y_NO.shape, products.b_OR.shape[1], products.s
    tile = tile or _split_tile(N, O, R)
    dz_NO, num_blocks = torch.empty_like(y_NO), _cdiv(N, tile.rows)
    partial = torch.empty(num_blocks, O, dtype=torch.float32, device=y_NO.device)
    chunk = _cdiv(_cdiv(max(O, 1), tile.splits), tile.cols) * tile.cols
    splits = _cdiv(max(O, 1), chunk)
    dzb_dtype = y_NO.dtype if splits == 1 else torch.float32
    dzb = torch.empty(splits if tile.fuse else 0, N, R, dtype=dzb_dtype, device=y_NO.device)
    with _on(y_NO):
        if y_NO.numel():
            kernels.split_kernel[(num_blocks, splits)](
                dy_NO, y_NO, gain_O, y_NO if bias_O is None else bias_O, products.b_OR, dz_NO, partial, dzb,
                N, O, R, s, chunk,
                HAS_BIAS=bias_O is not None, FUSE=tile.fuse, UPCAST=_upcast(y_NO),
                BLOCK_N=tile.rows, BLOCK_O=tile.cols, BLOCK_R=_power(R) if tile.fuse else 16,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        dgain_O = _gain_gradient(partial, dy_NO, gain_O, products, y_is_whole)
    if not tile.fuse:
        return dz_NO, times(dz_NO, products.b_OR, s), dgain_O
    return dz_NO, dzb[0] if splits == 1 else dzb.sum(0).to(y_NO.dtype), dgain_O


def _gain_gradient(partial: Tensor, dy_NO: Tensor, gain_O: Tensor, products: Products, y_is_whole: bool) -> Tensor:
    x_NI, W_OI, xa_NR, b_OR, s = products
    (N, O), R = dy_NO.shape, b_OR.shape[1]
    dgain_O = torch.zeros_like(gain_O, dtype=torch.float32)
    if O:
        tiny_gain = max(1e-12, torch.finfo(dy_NO.dtype).tiny / torch.finfo(dy_NO.dtype).eps)
        kernels.gain_gradient_kernel[(_cdiv(O, 32),)](
            partial, gain_O, dy_NO, x_NI, W_OI, xa_NR, b_OR, dgain_O, partial.shape[0], N, O, x_NI.shape[1], R, s,
            tiny_gain if y_is_whole else float("inf"), *x_NI.stride(), *W_OI.stride(),
            UPCAST=_upcast(dy_NO), BLOCK_P=32, BLOCK_N=64, BLOCK_O=32, BLOCK_I=64,
        )  # fmt: skip
    return dgain_O


def times(x: Tensor, y: Tensor, s: float) -> Tensor:
    """``s x y`` with s inside the product: no pass of its own."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=s)


def wide_times(x: Tensor, y: Tensor) -> Tensor:
    """``x y`` in float32 from half precision operands, rounded once, for the gradients of float32 masters."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return (x @ y).float()


def _compose_tile(N: int, O: int, R: int) -> Tile:
    """Rows and columns of one program of `compose_`."""
    if N * O < 1 << 20:
        return Tile(16, 64, warps=4, stages=2)
    return Tile(64, 128, warps=8, stages=2) if R > 64 else Tile(64, 64, warps=4, stages=2)


def _split_tile(N: int, O: int, R: int) -> Tile:
    """Rows and columns of one program of `split_gradient`, and whether it makes dzb too."""
    if N * O < 1 << 20:
        return Tile(16, 64, warps=4, stages=2, splits=_cdiv(O, 64))
    return Tile(32, 128, warps=4, stages=2, splits=8)


def _norm_tile(O: int, I: int, R: int, dtype: torch.dtype) -> Tile:
    """Rows and columns of one step of the norm's sweep."""
    if R > 128:
        return Tile(64, 64, warps=4, stages=3, splits=max(1, 256 * 64 // max(O, 1)))
    return Tile(16 if O <= 2048 else 32, 128, warps=4, stages=3)


def _norm_dot(dtype: torch.dtype) -> str:
    """How A and B are multiplied for the norm of a weight of this dtype."""
    return "ieee" if dtype == torch.float32 else "split"


def _upcast(tensor: Tensor) -> bool:
    return INTERPRETED and tensor.dtype == torch.bfloat16


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _power(count: int) -> int:
    """The power of two that holds count; 16 is the least a matrix unit takes."""
    return max(16, 1 << (count - 1).bit_length())


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
