"""A fast module earns its place on each device: its numbers must be the eager ones before a layer relies on it."""

import warnings
from types import ModuleType

import torch
from torch import Tensor

from ..functional import dense_row_norm
from . import eager

# odd and unequal, so that edges of tiles, a swapped axis or a stray broadcast show
_N, _I, _O, _R, _S = 37, 72, 53, 5, 0.7


def passes(module: ModuleType, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `module.dora_linear` and `module.fresh_row_norm` agree with plain torch there; if not, a warning says so.

    Catches every exception: a compiler that is missing or refuses the device is a reason to fall back, not to fail.
    """
    try:
        fault = _fault(module, device, dtype)
    except Exception as error:  # noqa: BLE001  a GPU toolchain raises classes of its own
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault:
        warnings.warn(f"doralib: Triton kernels are not used on {device} in {dtype}: {fault}", stacklevel=2)
    return not fault


@torch.enable_grad()
@torch.inference_mode(False)
def _fault(module: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    x, W, bias, dy = draw(_N, _I), draw(_O, _I), draw(_O), draw(_N, _O)
    a, b, g = (draw(*shape, of=torch.float32) for shape in ((_R, _I), (_O, _R), (_O,)))
    results = []
    for dora_linear in (module.dora_linear, eager.dora_linear):
        leaves = [t.clone().requires_grad_() for t in (x, a, b, g)]
        y = dora_linear(leaves[0], W, leaves[1], leaves[2], leaves[3], _S, bias)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    seen_a, seen_sb, n_O = (torch.full_like(t, float("nan")) for t in (a, b, g))
    n_O = module.fresh_row_norm(W, a, b, _S, seen_a, seen_sb, n_O)
    pairs = dict(zip(("output", "dx", "dA", "dB", "dgain"), zip(*results, strict=True), strict=True))
    pairs["norm"] = n_O, dense_row_norm(W, a, b, _S)
    allowed = 1e-4 if dtype == torch.float32 else 3e-2
    wrong = [name for name, (ours, plain) in pairs.items() if not _near(ours, plain, allowed)]
    return f"they differ from plain torch in {', '.join(wrong)}" if wrong else ""


def _near(ours: Tensor, plain: Tensor, allowed: float) -> bool:
    return bool((ours.double() - plain.double()).norm() <= allowed * plain.double().norm())
