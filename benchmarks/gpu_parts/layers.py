"""Single layers of LLaMA-3-8B's shapes: a training step and inference, by every method."""

import functools
import importlib.util
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .bench import Bench, saved_bytes
from .methods import LAYERS, make_layers

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]  # (O, I): q and o, k and v, gate and up, down
RANKS, TOKENS = (16, 64, 256, 512), (2048, 8192, 128, 1)
GRAPHED = ("frozen", "peft_lora", "peft_dora", "triton_lora", "triton_dora", "triton_dora_refresh")


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Any:
    """Forward, and the gradients of the input and of all that is trained."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(layer(x), [x, *trained], dy)


@torch.no_grad()
def _infer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _case(bench: Bench, O: int, I: int, R: int, N: int, names: tuple[str, ...]) -> tuple[Any, Tensor, Tensor]:
    W_OI = bench.randn(O, I, dtype=torch.bfloat16, scale=0.02)
    x = bench.randn(N, I, dtype=torch.bfloat16).requires_grad_()
    return make_layers(W_OI, R, names), x, bench.randn(N, O, dtype=torch.bfloat16)


def layers(bench: Bench) -> None:
    """Milliseconds, interleaved; bytes kept for the backward pass; the step's peak above what was there."""
    shapes, ranks, tokens = ([(40, 48)], (4,), (1, 20)) if bench.dry else (SHAPES, RANKS, TOKENS)
    for (O, I), R, N in itertools.product(shapes, ranks, tokens):
        if bench.late("layers"):
            return
        made, x, dy = _case(bench, O, I, R, N, tuple(LAYERS))
        row: dict[str, Any] = {"O": O, "I": I, "R": R, "N": N}
        row["step_ms"] = bench.interleaved({k: functools.partial(_step, v, x, dy) for k, v in made.items()}, 15, 2.0)
        row["infer_ms"] = bench.interleaved({k: functools.partial(_infer, v, x) for k, v in made.items()}, 15, 1.0)
        if N >= 2048 or bench.dry:
            row["saved"] = {k: saved_bytes(functools.partial(v, x), list(v.parameters())) for k, v in made.items()}
            row["peak"] = {k: bench.peak_bytes(functools.partial(_step, v, x, dy)) for k, v in made.items()}
        bench.record("layers", **row)
        bench.say(f"{O}x{I} r{R} N{N} " + _summary(row["step_ms"]))
        del made, x, dy


def graphs(bench: Bench) -> None:
    """The step as one replayed graph: what the device needs when the host never keeps it waiting."""
    if bench.dry:
        bench.record("graphs", measured=False, reason="no GPU")
        return
    for (O, I), R, N in itertools.product(SHAPES, (16, 64), (2048, 8192, 128, 1)):
        if bench.late("graphs"):
            return
        made, x, dy = _case(bench, O, I, R, N, GRAPHED)
        runs = {}
        for name, layer in made.items():
            step = functools.partial(_step, layer, x, dy)
            step()
            runs[name] = bench.graph(step).replay
        found = bench.interleaved(runs, 15, 1.0)
        bench.record("graphs", O=O, I=I, R=R, N=N, step_ms=found)
        bench.say(f"graph {O}x{I} r{R} N{N} " + _summary(found))
        del runs, made, x, dy
        bench.free()


def _summary(found: dict[str, dict[str, float]]) -> str:
    base = found["peft_lora"]["median"]
    return f"peft_lora {base:.3f} ms; " + ", ".join(f"{k} {v['median'] / base:.2f}" for k, v in found.items())


def nf4(bench: Bench) -> None:
    """A frozen weight in four bits: only where bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        bench.record("nf4", measured=False, reason="bitsandbytes is not installed on this machine")
        return
    bench.record("nf4", measured=False, reason="bitsandbytes is there, but the kernels do not read its storage yet")
