"""The adapted linear layer on a GPU: `eager.dora_linear` with Triton between the large products.

Keeps for the backward pass what the eager one keeps (x, x Aᵀ and, for the gain, the output), and never makes the host
wait. A compiler sees the kernels as operators with known shapes: no graph break.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

from . import launch
from .dropout import Dropout
from .eager import Watch
from .eager import dora_linear as eager_dora_linear


def dora_linear(
    x: Tensor,
    W_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    gain_O: Tensor | None,
    s: float,
    bias_O: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """What `eager.dora_linear` returns, for float32 and half precision.

    The gradients of A, B and the gain are summed and returned in float32 (cast where their masters are not).
    """
    if dropout is not None and dropout.exact and gain_O is not None:
        return eager_dora_linear(x, W_OI, a_RI, b_OR, gain_O, s, bias_O, dropout)
    keep, boost = (None, 1.0) if dropout is None else (dropout.drawn, 1.0 / (1.0 - dropout.p))
    if not torch.is_grad_enabled():
        return _forward(x, W_OI, bias_O, a_RI, b_OR, gain_O, s * boost, keep)[0]
    return _DoraLinear.apply(x, W_OI, bias_O, a_RI, b_OR, gain_O, s * boost, keep)


def _forward(x, W_OI, bias_O, a_RI, b_OR, gain_O, s, keep):
    """The output, and what was made on the way: x in rows, ``x Aᵀ``, A and B in x's dtype."""
    x_NI = x.reshape(x.numel() // max(1, x.shape[-1]), x.shape[-1])
    a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
    xa_NR = _dropped(x_NI, keep) @ a.T
    y = nnf.linear(x, W_OI, bias_O)  # its own tensor, no view of one: a consumer may write into it
    compose_(y.view(x_NI.shape[0], W_OI.shape[0]), xa_NR, b, gain_O, bias_O, s)
    return y, x_NI, xa_NR, a, b


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_OI, bias_O, a_RI, b_OR, gain_O, s, keep):
        y, x_NI, xa_NR, a, b = _forward(x, W_OI, bias_O, a_RI, b_OR, gain_O, s, keep)
        compiling = torch.compiler.is_compiling()
        # .data: a consumer may write into the output in place; the watch tells, and then y is not read
        kept = None if gain_O is None else y if compiling else y.data
        ctx.watch = None if gain_O is None or compiling else Watch(y)
        ctx.save_for_backward(x_NI, xa_NR, kept, keep, W_OI, bias_O, a, b, gain_O)
        ctx.s, ctx.x_shape, ctx.dtypes = s, x.shape, (a_RI.dtype, b_OR.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_NI, xa_NR, y, keep, W_OI, bias_O, a, b, gain_O = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, needs_gain, _, _ = ctx.needs_input_grad
        dy_NO = dy.reshape(x_NI.shape[0], W_OI.shape[0]).contiguous()
        dgain_O = None
        if gain_O is None:
            dz_NO, dzb_NR = dy_NO, launch.times(dy_NO, b, ctx.s)
        else:
            whole = ctx.watch is None or not ctx.watch.changed()
            products = launch.Products(x_NI, W_OI, xa_NR, b, ctx.s)
            dz_NO, dzb_NR, dgain_O = split_gradient(dy_NO, y.view_as(dy_NO), gain_O, bias_O, products, whole)
            dgain_O = dgain_O.to(gain_O.dtype) if needs_gain else None
        dx = da_RI = db_OR = None
        if needs_x:
            # the small product first: the large one adds to it in its epilogue, which costs no pass over (N, I)
            dx = _dropped(dzb_NR @ a, keep).addmm_(dz_NO, W_OI).view(ctx.x_shape)
        if needs_a:
            da_RI = launch.wide_times(dzb_NR.T, _dropped(x_NI, keep)).to(ctx.dtypes[0])
        if needs_b:
            db_OR = launch.wide_times(dz_NO.T, xa_NR).mul_(ctx.s).to(ctx.dtypes[1])
        dbias_O = dy_NO.sum(0, dtype=torch.float32).to(bias_O.dtype) if needs_bias else None
        return dx, None, dbias_O, da_RI, db_OR, dgain_O, None, None


def _dropped(x_NI, keep):
    return x_NI if keep is None else x_NI * keep.view_as(x_NI)


def compose_(y_NO, xa_NR, b_OR, gain_O, bias_O, s):
    """`launch.compose_`, as an operator where a compiler looks on (the operator costs the host some microseconds)."""
    run = _compose_op if torch.compiler.is_compiling() else launch.compose_
    run(y_NO, xa_NR, b_OR, gain_O, bias_O, s)


def split_gradient(dy_NO, y_NO, gain_O, bias_O, products, y_is_whole):
    """`launch.split_gradient`, likewise."""
    if torch.compiler.is_compiling():
        return _split_op(dy_NO, y_NO, gain_O, bias_O, *products)
    return launch.split_gradient(dy_NO, y_NO, gain_O, bias_O, products, y_is_whole=y_is_whole)


def row_norm(W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
    """`launch.row_norm`, likewise."""
    return _row_norm_op(W_OI, a_RI, b_OR, s) if torch.compiler.is_compiling() else launch.row_norm(W_OI, a_RI, b_OR, s)


def fresh_row_norm(
    W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, seen_a_RI: Tensor, seen_sb_OR: Tensor, n_O: Tensor
) -> Tensor:
    """`launch.fresh_row_norm`, likewise."""
    if not torch.compiler.is_compiling():
        return launch.fresh_row_norm(W_OI, a_RI, b_OR, s, seen_a_RI, seen_sb_OR, n_O)
    _fresh_op(W_OI, a_RI, b_OR, s, seen_a_RI, seen_sb_OR, n_O)
    return n_O


@torch.library.custom_op("doralib::compose_", mutates_args={"y_NO"})
def _compose_op(
    y_NO: Tensor, xa_NR: Tensor, b_OR: Tensor, gain_O: Tensor | None, bias_O: Tensor | None, s: float
) -> None:
    launch.compose_(y_NO, xa_NR, b_OR, gain_O, bias_O, s)


@torch.library.custom_op("doralib::split_gradient", mutates_args=())
def _split_op(
    dy_NO: Tensor,
    y_NO: Tensor,
    gain_O: Tensor,
    bias_O: Tensor | None,
    x_NI: Tensor,
    W_OI: Tensor,
    xa_NR: Tensor,
    b_OR: Tensor,
    s: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.split_gradient(dy_NO, y_NO, gain_O, bias_O, launch.Products(x_NI, W_OI, xa_NR, b_OR, s))


@_split_op.register_fake
def _(dy_NO, y_NO, gain_O, bias_O, x_NI, W_OI, xa_NR, b_OR, s):
    dgain_O = torch.empty_like(gain_O, dtype=torch.float32)
    return torch.empty_like(y_NO), torch.empty_like(xa_NR), dgain_O


@torch.library.custom_op("doralib::row_norm", mutates_args=())
def _row_norm_op(W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
    return launch.row_norm(W_OI, a_RI, b_OR, s)


@_row_norm_op.register_fake
def _(W_OI, a_RI, b_OR, s):
    return W_OI.new_empty(W_OI.shape[0], dtype=torch.float32)


@torch.library.custom_op("doralib::fresh_row_norm", mutates_args={"seen_a_RI", "seen_sb_OR", "n_O"})
def _fresh_op(
    W_OI: Tensor, a_RI: Tensor, b_OR: Tensor, s: float, seen_a_RI: Tensor, seen_sb_OR: Tensor, n_O: Tensor
) -> None:
    launch.fresh_row_norm(W_OI, a_RI, b_OR, s, seen_a_RI, seen_sb_OR, n_O)
