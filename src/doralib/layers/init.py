"""Where A and B start, by `init_lora_weights`; the lengths m start as those of W whatever it says."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional as F
from ..errors import DoraError

# A filled in place, while B = 0: kaiming is the paper's, gaussian is PEFT's of that name
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "kaiming": lambda a_RI: nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5)),
    "gaussian": lambda a_RI: nn.init.normal_(a_RI, std=1 / len(a_RI)),
}
_NUM_ROUNDS = "_niter_"


def _principal(W_OI: Tensor, r: int, s: float, rounds: int | None) -> tuple[Tensor, Tensor]:
    """``s B A`` is the best approximation of W of rank r, its singular values shared evenly (arXiv 2404.02948)."""
    if rounds is None:
        U_OK, S_K, V_KI = torch.linalg.svd(W_OI, full_matrices=False)
    else:
        U_OK, S_K, V_IK = torch.svd_lowrank(W_OI, q=r, niter=rounds)
        V_KI = V_IK.T
    root_R = (S_K[:r] / s).sqrt()
    return root_R[:, None] * V_KI[:r], U_OK[:, :r] * root_R


def _orthonormal(W_OI: Tensor, r: int, s: float, rounds: int | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The first columns of Q and rows of R of W = Q R, whatever s is, as PEFT does (arXiv 2406.01775)."""
    Q_OK, R_KI = torch.linalg.qr(W_OI)
    return R_KI[:r], Q_OK[:, :r]


# A (R, I) and B (O, R) from the weight itself; the weight keeps what it is, see `functional.difference`
DECOMPOSED: dict[str, Callable[[Tensor, int, float, int | None], tuple[Tensor, Tensor]]] = {
    "pissa": _principal,
    "olora": _orthonormal,
}


def takes_part_of_weight(start: str) -> bool:
    """Whether A and B start as a part of the weight."""
    return start.partition(_NUM_ROUNDS)[0] in DECOMPOSED


@torch.no_grad()
def decompose(start: str, W_OI: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) at the start, in `sum_dtype`; a row of W that is zero has a row of B that is zero.

    Raises:
        DoraError: if the weight has no r directions.
    """
    O, I = W_OI.shape
    if r > (most := min(O, I)):
        raise DoraError(f"init_lora_weights {start!r}: r is {r}, but a weight of {O}x{I} has {most} directions to take")
    name, _, rounds = start.partition(_NUM_ROUNDS)
    W = W_OI.to(F.sum_dtype(W_OI.dtype))
    a_RI, b_OR = DECOMPOSED[name](W, r, s, int(rounds) if rounds else None)
    return a_RI, b_OR * W.any(1)[:, None]
