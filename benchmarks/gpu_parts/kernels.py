"""The kernels alone: right against float64, the device's ceilings, the best tiles, the norm beside its rivals."""

import contextlib
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doralib.functional import adapted_row_norm, row_norm_sq, times_transposed
from doralib.kernels import fused, launch
from doralib.kernels.launch import Products, Tile

from .bench import Bench

S = 2.0
NORM_SHAPES = [(4096, 4096, 64), (4096, 4096, 16), (1024, 4096, 64), (14336, 4096, 64), (4096, 14336, 64),
               (4096, 4096, 256), (4096, 4096, 512)]  # fmt: skip
PASS_SHAPES = [(2048, 4096, 64), (8192, 4096, 64), (8192, 14336, 64), (128, 4096, 64), (2048, 1024, 64),
               (8192, 4096, 16), (8192, 4096, 512), (2048, 4096, 512)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_tiles(R: int) -> list[Tile]:
    """Tiles tried for the norm."""
    rows = (16, 32, 64, 128) if R <= 128 else (64, 128)
    shapes = itertools.product(rows, (64, 128), ((4, 3), (8, 3), (4, 2)), (1, 2, 4, 8))
    return [Tile(r, c, w, st, splits) for r, c, (w, st), splits in shapes if r * c <= 8192 or w == 8]


def compose_tiles() -> list[Tile]:
    """Tiles tried for the forward pass."""
    shapes = itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8))
    return [Tile(r, c, w, 2) for r, c, w in shapes if 2048 <= r * c <= 16384]


def split_tiles(R: int) -> list[Tile]:
    """Tiles tried for the backward pass, with and without dz B in it."""
    plain = [Tile(r, c, w, 2, 1 << 20) for r, c, w in itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8))
             if 2048 <= r * c <= 8192]  # fmt: skip
    if R > 128:
        return plain
    shapes = itertools.product((16, 32, 64), (32, 64, 128), ((4, 2), (8, 2), (4, 3)), (1, 2, 4))
    fuse = [Tile(r, c, w, st, splits, fuse=True) for r, c, (w, st), splits in shapes if r * c <= 4096]
    return plain + fuse


class Problem:
    """Random operands of one layer."""

    def __init__(self, bench: Bench, N: int, O: int, I: int, R: int, dtype: torch.dtype, bias: bool = False) -> None:
        self.x, self.W = bench.randn(N, I, dtype=dtype), bench.randn(O, I, dtype=dtype, scale=I**-0.5)
        self.a, self.b = bench.randn(R, I, scale=I**-0.5), bench.randn(O, R, scale=0.1 * R**-0.5)
        self.gain, self.dy = 1 + bench.randn(O, scale=0.1), bench.randn(N, O, dtype=dtype)
        self.bias = bench.randn(O, dtype=dtype) if bias else None

    def leaves(self, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [cast(t).detach().clone().requires_grad_() for t in (self.x, self.a, self.b, self.gain)]

    def ours(self) -> dict[str, Tensor]:
        x, a, b, gain = self.leaves(lambda t: t)
        y = fused.dora_linear(x, self.W, a, b, gain, S, self.bias)
        return _with_gradients(y, (x, a, b, gain), self.dy)

    def formula(self, cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """In float64 from the factors as rounded to the input's dtype, as the products see them."""
        x, a, b, gain = self.leaves(lambda t: cast(t if t is self.gain else t.to(self.x.dtype)))
        y = gain * (x @ (cast(self.W) + S * b @ a).T)
        y = y if self.bias is None else y + cast(self.bias)
        return _with_gradients(y, (x, a, b, gain), cast(self.dy))


def _with_gradients(y: Tensor, leaves: tuple[Tensor, ...], dy: Tensor) -> dict[str, Tensor]:
    names = ("dx", "da", "db", "dgain")
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))}


def _sizes(dry: bool) -> list[tuple[int, ...]]:
    odd = [(11, 7, 5, 3), (1, 37, 53, 5), (65, 70, 33, 20)]
    return odd if dry else [*odd, (300, 1000, 777, 17), (513, 520, 1040, 200), (1024, 1024, 4096, 64)]


def _layer_cases(dry: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, bool]]:
    yield from itertools.product(_sizes(dry), DTYPES, (False, True))


def _norm_cases(dry: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, str]]:
    for sizes in _sizes(dry):
        yield from ((sizes, dtype, "") for dtype in DTYPES)
        if sizes[3] > 16:
            yield from ((sizes, torch.bfloat16, dot) for dot in ("bf16", "tf32", "tf32x3", "bf16x3", "ieee"))


def checks(bench: Bench) -> None:
    """Worst errors of output and gradients: relative (Frobenius), and in eps of the formula on absolute values."""
    if not bench.dry:
        _compile_in_parallel(bench)
    for (N, O, I, R), dtype, bias in _layer_cases(bench.dry):
        problem = Problem(bench, N, O, I, R, dtype, bias)
        problem.gain[::5] = 0
        exact, size = problem.formula(Tensor.double), problem.formula(lambda t: t.double().abs())
        row: dict[str, Any] = {}
        for name, found in problem.ours().items():
            error = (found.double() - exact[name]).abs()
            row[name] = (error.norm() / exact[name].norm().clamp_min(1e-300)).item()
            row[f"{name}_eps"] = (error / size[name].clamp_min(1e-300)).max().item() / torch.finfo(dtype).eps
        bench.record("checks", N=N, O=O, I=I, R=R, dtype=str(dtype), bias=bias, **row)
    for (_, O, I, R), dtype, dot in _norm_cases(bench.dry):
        problem = Problem(bench, 1, O, I, R, dtype)
        want = (problem.W.double() + S * problem.b.double() @ problem.a.double()).norm(dim=1)
        row = {"O": O, "I": I, "R": R, "dtype": str(dtype), "dot": dot or "default"}
        try:
            n_O = launch.row_norm(problem.W, problem.a, problem.b, S, _norm_tile(O, I, R, dtype, dot))
            row["worst_relative"] = ((n_O - want).abs() / want).max().item()
        except Exception as error:  # noqa: BLE001 - a way to multiply that this triton lacks is a finding
            row["error"] = repr(error)[:300]
        bench.record("norm_checks", **row)
    _check_freshness(bench)


def _norm_tile(O: int, I: int, R: int, dtype: torch.dtype, dot: str) -> Tile:
    return launch._norm_tile(O, I, R, dtype)._replace(dot=dot)


def _check_freshness(bench: Bench) -> None:
    """The fresh norm equals the norm after every kind of write."""
    O, I, R = (24, 40, 4) if bench.dry else (1024, 4096, 64)
    problem = Problem(bench, 1, O, I, R, torch.bfloat16)
    a, b = torch.nn.Parameter(problem.a), torch.nn.Parameter(problem.b)
    optimizer = torch.optim.AdamW([a, b], lr=1e-2, fused=True)
    seen_a, seen_b, n_O = torch.full_like(a, torch.nan), torch.full_like(b, torch.nan), torch.full((O,), torch.nan)
    seen_a, seen_b, n_O = seen_a.detach(), seen_b.detach(), n_O.to(bench.device)

    def step() -> None:
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        optimizer.step()

    writes: dict[str, Callable[[], object]] = {
        "first": lambda: None,
        "nothing": lambda: None,
        "fused AdamW": step,
        "one number of B through .data": lambda: b.data[O - 1, R - 1].add_(1e-3),
        "one number of A through .data": lambda: a.data[R - 1, I - 1].add_(1.0),
    }
    for name, write in writes.items():
        write()
        launch.fresh_row_norm(problem.W, a.detach(), b.detach(), S, seen_a, seen_b, n_O)
        want = launch.row_norm(problem.W, a.detach(), b.detach(), S)
        bench.record("freshness", after=name, equal=torch.equal(n_O, want))
    n_O.fill_(-1)  # unchanged factors must leave it alone
    launch.fresh_row_norm(problem.W, a.detach(), b.detach(), S, seen_a, seen_b, n_O)
    bench.record("freshness", after="nothing: not computed again", equal=bool((n_O == -1).all()))


def ceilings(bench: Bench) -> None:
    """Copy bandwidth, and the rate of a large bf16 product."""
    count = 1 << 16 if bench.dry else 1 << 31
    source = torch.randint(0, 255, (count,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = bench.interleaved({"copy": lambda: target.copy_(source)}, 9)["copy"]["median"] / 1e3
    bench.record("ceilings", what="copy, read and written", gb_per_second=2 * count / seconds / 1e9)
    size = 64 if bench.dry else 8192
    x, y = (bench.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    seconds = bench.interleaved({"mm": lambda: x @ y}, 9)["mm"]["median"] / 1e3
    bench.record("ceilings", what=f"bf16 product of {size}", tflops=2 * size**3 / seconds / 1e12)


Call = Callable[[Tile], Any]


def _norm_case(bench: Bench, O: int, I: int, R: int, copies: int) -> list[Call]:
    problems = [Problem(bench, 1, O, I, R, torch.bfloat16) for _ in range(copies)]
    return [lambda tile, p=p: launch.row_norm(p.W, p.a, p.b, S, tile) for p in problems]


def _compose_case(bench: Bench, N: int, O: int, R: int, copies: int) -> list[Call]:
    bf16, calls = torch.bfloat16, []
    for _ in range(copies):
        y, xa = bench.randn(N, O, dtype=bf16), bench.randn(N, R, dtype=bf16)
        b, gain = bench.randn(O, R, dtype=bf16, scale=0.01), torch.ones(O, device=bench.device)
        calls.append(lambda tile, y=y, xa=xa, b=b, gain=gain: launch.compose_(y, xa, b, gain, None, S, tile))
    return calls


def _split_case(bench: Bench, N: int, O: int, R: int, copies: int) -> list[Call]:
    bf16, calls = torch.bfloat16, []
    x, W = bench.randn(N, 128, dtype=bf16), bench.randn(O, 128, dtype=bf16)
    for _ in range(copies):
        dy, y, xa = (bench.randn(N, k, dtype=bf16) for k in (O, O, R))
        b, gain = bench.randn(O, R, dtype=bf16), 1 + bench.randn(O, scale=0.1)
        products = Products(x, W, xa, b, S)
        calls.append(lambda tile, dy=dy, y=y, g=gain, p=products: launch.split_gradient(dy, y, g, None, p, tile=tile))
    return calls


def _tuning(dry: bool) -> Iterator[tuple[str, tuple[int, ...], Callable[..., list[Call]], list[Tile]]]:
    """What is tuned: the kernel, its sizes, how to make its calls, the tiles to try."""
    norms, passes = ([(40, 48, 8)], [(24, 40, 8)]) if dry else (NORM_SHAPES, PASS_SHAPES)
    for O, I, R in norms:
        yield "row_norm", (O, I, R), _norm_case, norm_tiles(R)[:: 20 if dry else 1]
    for N, O, R in passes:
        yield "compose_", (N, O, R), _compose_case, compose_tiles()[:: 8 if dry else 1]
        yield "split_gradient", (N, O, R), _split_case, split_tiles(R)[:: 20 if dry else 1]


def tune(bench: Bench) -> None:
    """Every tile of each list; the device's time alone, over rotating buffers larger than its cache."""
    if not bench.dry and "compile_seconds" not in bench.data:
        _compile_in_parallel(bench)
    for name, sizes, case, tiles in _tuning(bench.dry):
        if bench.late("tune"):
            return
        elements = sizes[0] * sizes[1]
        calls = case(bench, *sizes, 1 if bench.dry else max(2, min(12, (1 << 27) // elements)))
        found = []
        for tile in [None, *tiles]:
            try:
                us = bench.device_us([functools.partial(call, tile) for call in calls], 5)
            except Exception as error:  # noqa: BLE001 - a tile too large for the chip is a finding
                bench.record("tune_failures", kernel=name, sizes=sizes, tile=tile, error=repr(error)[:300])
                bench.sync()
                continue
            found.append({"us": round(us, 2), "tile": "default" if tile is None else tile._asdict()})
        found.sort(key=lambda row: row["us"])
        default = next((row["us"] for row in found if row["tile"] == "default"), None)
        top = [{**row, "tile": list(row["tile"].values()) if isinstance(row["tile"], dict) else row["tile"]}
               for row in found[:12]]  # fmt: skip
        unfused = next((r for r in found if isinstance(r["tile"], dict) and not r["tile"]["fuse"]), None)
        bench.record("tune", kernel=name, sizes=sizes, default_us=default, tried=len(found), best=top, unfused=unfused)
        bench.say(f"{name} {sizes}: default {default}, best {found[0] if found else None}")
        del calls
        bench.free()


def _compile_in_parallel(bench: Bench, processes: int = 14) -> None:
    """Fill Triton's cache from many processes: compiling is the host's work and would take most of the time."""
    script = str(Path(__file__).parent.parent / "gpu.py")
    command = [sys.executable, script, "--out", str(bench.out / "share")]
    running = [subprocess.Popen([*command, "--share", f"{k}/{processes}"], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL) for k in range(processes)]  # fmt: skip
    for process in running:
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
    bench.record("compile_seconds", seconds=round(bench.elapsed()), codes=[process.returncode for process in running])


def compile_share(share: int, of: int) -> None:
    """Launch every `of`-th distinct kernel once, so that its binary is on the disk."""
    bench = Bench(Path("/tmp/doralib-share") / str(share), False, 110)
    seen: set[Any] = set()
    jobs: list[Callable[[], Any]] = []
    for sizes, dtype, bias in _layer_cases(False):
        jobs.append(lambda sizes=sizes, dtype=dtype, bias=bias: Problem(bench, *sizes, dtype, bias).ours())
    for (_, O, I, R), dtype, dot in _norm_cases(False):
        tile = _norm_tile(O, I, R, dtype, dot)
        jobs.append(lambda s=(1, O, I, R), dtype=dtype, tile=tile: _launch_norm(Problem(bench, *s, dtype), tile))
    for name, sizes, case, tiles in _tuning(False):
        for tile in tiles:
            key = (name, min(sizes[2], 129) if name == "row_norm" else sizes[2], tile._replace(splits=tile.splits > 1))
            if key not in seen:
                seen.add(key)
                jobs.append(lambda case=case, R=sizes[2], tile=tile: case(bench, 512, 4096, R, 1)[0](tile))
    for job in jobs[share::of]:
        if bench.elapsed() > 110:
            return
        with contextlib.suppress(Exception):  # the part that measures it records the failure
            job()


def _launch_norm(p: Problem, tile: Tile) -> Tensor:
    return launch.row_norm(p.W, p.a, p.b, S, tile)


def norm(bench: Bench) -> None:
    """The norm refresh beside a dense product, PEFT's way, and the factored form; and the cost of seeing no change."""
    shapes = [(40, 48)] if bench.dry else [(4096, 4096), (14336, 4096), (1024, 4096), (4096, 14336)]
    for (O, I), R in itertools.product(shapes, [4] if bench.dry else [16, 64, 128, 256, 512]):
        if bench.late("norm"):
            return
        copies = 1 if bench.dry else max(2, min(6, (1 << 27) // (O * I)))
        problems = [Problem(bench, 1, O, I, R, torch.bfloat16) for _ in range(copies)]
        row: dict[str, Any] = {}
        for name, method in NORM_METHODS.items():
            calls = [method(p) for p in problems]
            row[f"{name}_us"] = round(bench.device_us(calls, 9), 2)
            if not bench.dry:
                row[f"{name}_peak_mb"] = round(bench.peak_bytes(calls[0]) / 1e6, 2)
        want = (problems[0].W.double() + S * problems[0].b.double() @ problems[0].a.double()).norm(dim=1)
        for dot in ("split", "bf16", "tf32"):
            tile = _norm_tile(O, I, R, torch.bfloat16, dot)
            calls = [functools.partial(_launch_norm, p, tile) for p in problems]
            row[f"ours_{dot}_us"] = round(bench.device_us(calls, 9), 2)
            got = _launch_norm(problems[0], tile)
            row[f"ours_{dot}_error"] = ((got - want) / want).abs().max().item()
        bench.record("norm", O=O, I=I, R=R, floor_bytes=O * I * 2 + (O + I) * R * 4, **row)
        bench.say(f"norm {O}x{I} r{R}: " + ", ".join(f"{k[:-3]} {v}" for k, v in row.items() if k.endswith("_us")))
        del problems, calls
        bench.free()


def _ours(p: Problem) -> Callable[[], Any]:
    return lambda: launch.row_norm(p.W, p.a, p.b, S)


def _fresh(p: Problem, *, changed: bool) -> Callable[[], Any]:
    n_O = torch.empty(p.W.shape[0], device=p.W.device)
    seen_a, seen_sb = torch.full_like(p.a, torch.nan), torch.full_like(p.b, torch.nan)

    def run() -> None:
        if changed:
            seen_sb[0, 0].fill_(torch.nan)
        launch.fresh_row_norm(p.W, p.a, p.b, S, seen_a, seen_sb, n_O)

    return run


def _dense(p: Problem) -> Callable[[], Any]:
    a, b = p.a.to(p.W.dtype), p.b.to(p.W.dtype)
    return lambda: torch.linalg.norm(torch.addmm(p.W, b, a, alpha=S), dim=1, dtype=torch.float32)


def _peft(p: Problem) -> Callable[[], Any]:
    """As peft/tuners/lora/dora.py makes it: the factors' product through an identity, then the sum, then the norm."""
    a, b, I = p.a.to(p.W.dtype), p.b.to(p.W.dtype), p.W.shape[1]

    def run() -> Tensor:
        eye = torch.eye(I, device=p.W.device, dtype=p.W.dtype)
        delta_OI = torch.nn.functional.linear(torch.nn.functional.linear(eye, a), b).T
        return torch.linalg.norm(p.W + S * delta_OI, dim=1)

    return run


def _factored(p: Problem) -> Callable[[], Any]:
    W_sq_O = row_norm_sq(p.W)
    return lambda: adapted_row_norm(W_sq_O, times_transposed(p.W, p.a), p.a, p.b, S)


NORM_METHODS = {
    "ours": _ours,
    "fresh_unchanged": functools.partial(_fresh, changed=False),
    "fresh_changed": functools.partial(_fresh, changed=True),
    "dense": _dense,
    "peft_eye": _peft,
    "factored": _factored,
}


def compiled(bench: Bench) -> None:
    """`torch.compile(fullgraph=True)` of the layer: no graph break, the same numbers."""
    for R in (4,) if bench.dry else (16, 200):
        N, O, I = (5, 24, 40) if bench.dry else (512, 1024, 768)
        p = Problem(bench, N, O, I, R, torch.bfloat16, bias=True)
        want, x = p.ours(), p.x.clone()
        function = torch.compile(fused.dora_linear, fullgraph=True, backend="aot_eager" if bench.dry else "inductor")
        leaves = [t.detach().clone().requires_grad_() for t in (x, p.a, p.b, p.gain)]
        y = function(leaves[0], p.W, leaves[1], leaves[2], leaves[3], S, p.bias)
        found = _with_gradients(y, tuple(leaves), p.dy)
        worst = {k: ((found[k].double() - want[k].double()).norm() / want[k].double().norm()).item() for k in want}
        bench.record("compile", R=R, fullgraph=True, relative_difference=worst)
