"""Run by test_triton.py under TRITON_INTERPRET=1: every kernel against float64, on memory that starts as NaN."""

import itertools

import pytest
import torch
from torch import Tensor

from doralib.kernels import fused, launch
from doralib.kernels.dropout import Dropout
from doralib.kernels.launch import Products, Tile

# no two sizes of a case are equal; the last is larger than one tile each way and its rank is no power of two
SHAPES = [(7, 5, 3, 11), (13, 2, 1, 3), (3, 6, 5, 1), (70, 40, 20, 66)]  # O, I, R, N
S = 0.7
NAMES = ("y", "dx", "da", "db", "dgain", "dbias")

each_seed = pytest.mark.parametrize("seed", range(20))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda v: "O{}-I{}-R{}-N{}".format(*v))


def test_the_interpreter_is_on():
    assert launch.INTERPRETED


@pytest.fixture(autouse=True)
def _memory_starts_as_nan(monkeypatch):
    def spoiled(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, spoiled(getattr(owner, name)))


def draw(shape, seed, dtype=torch.float32):
    """x, W, a, b, gain, bias and dy, rounded once."""
    O, I, R, N = shape
    g = torch.Generator().manual_seed(seed)
    sizes = [(N, I), (O, I), (R, I), (O, R), (O,), (O,), (N, O)]
    return [torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]


def formula(x, W, a, b, gain, s, bias, keep=None, p=0.0):
    low = x if keep is None else x * keep / (1 - p)
    z = x @ W.T + s * (low @ a.T) @ b.T
    z = z if gain is None else gain * z
    return z if bias is None else z + bias


def run(f, x, W, a, b, gain, bias, dy, *rest):
    """Output and gradients by name."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, a, b, gain, bias)]
    y = f(leaves[0], W, leaves[1], leaves[2], leaves[3], S, leaves[4], *rest)
    y.backward(dy)
    return {"y": y.detach()} | {
        name: leaf.grad for name, leaf in zip(NAMES[1:], leaves, strict=True) if leaf is not None
    }


def worst_errors(found, tensors, *rest):
    """Of each result, in eps of the formula on absolute values, which is the size of the terms that are summed."""
    exact = run(formula, *(None if t is None else t.double() for t in tensors), *rest)
    size = run(formula, *(None if t is None else t.double().abs() for t in tensors), *rest)
    gain, bias, dy = (None if t is None else t.double().abs() for t in tensors[4:])
    if bias is not None and gain is not None:
        # the base product carries the bias when it is rounded, and the product is read back from the output
        size["y"] = size["y"] + gain * bias
        size["dgain"] = size["dgain"] + (dy * (bias + bias / gain.clamp_min(1e-30))).sum(0)
    eps = torch.finfo(found["y"].dtype).eps
    errors = {}
    for name, value in found.items():
        error = (value.double() - exact[name]).abs()
        errors[name] = torch.where(error == 0, 0, error / size[name]).max().item() / eps if error.numel() else 0.0
        assert not value.isnan().any(), name
    return errors


def assert_right(found, tensors, *rest):
    for name, error in worst_errors(found, tensors, *rest).items():
        assert error <= 4, f"{name}: {error:.1f} eps"


@each_seed
@each_shape
def test_dora_linear(shape, seed):
    tensors = draw(shape, seed)
    if seed % 2:
        tensors[5] = None
    assert_right(run(fused.dora_linear, *tensors), tensors)


@pytest.mark.parametrize("seed", range(4))
@each_shape
def test_lora(shape, seed):
    tensors = draw(shape, seed)
    tensors[4] = None
    if seed % 2:
        tensors[5] = None
    found = run(fused.dora_linear, *tensors)
    assert set(found) == {"y", "dx", "da", "db"} | ({"dbias"} if tensors[5] is not None else set())
    assert_right(found, tensors)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_with_gain_zero(seed, with_bias):
    """Their output is the bias and their gain's gradient is still Σ dy z, though y no longer holds z."""
    tensors = draw(SHAPES[seed % 4], seed)
    tensors[4][::2] = 0
    if not with_bias:
        tensors[5] = None
        tensors[1][0] = tensors[3][0] = 0  # a row of length zero too
    assert_right(run(fused.dora_linear, *tensors), tensors)


@pytest.mark.parametrize("seed", range(4))
def test_dropout_of_the_adapters_input(seed):
    tensors = draw(SHAPES[3], seed)
    keep = torch.rand(tensors[0].shape) > 0.3
    found = run(fused.dora_linear, *tensors, Dropout(keep, 0.3, exact=False))
    assert_right(found, tensors, keep, 0.3)


def test_exact_dropout_goes_the_plain_way():
    tensors = draw(SHAPES[0], 0)
    x, W, a, b, gain, bias, _ = tensors
    keep = torch.rand(x.shape) > 0.3
    want = x @ W.T + (gain - 1) * ((x * keep / 0.7) @ W.T) + gain * S * ((x * keep / 0.7) @ a.T @ b.T) + bias
    torch.testing.assert_close(fused.dora_linear(x, W, a, b, gain, S, bias, Dropout(keep, 0.3, exact=True)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_adapter_changes_no_bit(dtype):
    x, W, a, b, _, bias, _ = draw(SHAPES[3], 0, dtype)
    for bias_O in (None, bias):
        y = fused.dora_linear(x, W, a.float(), torch.zeros_like(b).float(), torch.ones(70), S, bias_O)
        assert torch.equal(y, torch.nn.functional.linear(x, W, bias_O))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_half_precision(dtype, seed):
    """Plumbing: the interpreter's stores truncate bfloat16, a whole eps instead of half of one."""
    tensors = draw(SHAPES[3], seed, dtype)
    masters = [t.float() if k in (2, 3, 4) else t for k, t in enumerate(tensors)]
    found = run(fused.dora_linear, *masters)
    assert found["y"].dtype == found["dx"].dtype == dtype
    assert all(found[name].dtype == torch.float32 for name in ("da", "db", "dgain"))
    assert_right(found, masters)


def test_every_layout():
    """Strided x, a transposed weight, an expanded dy, leading dimensions, factors that are views."""
    O, I, _, N = SHAPES[3]
    x, W, a, b, gain, bias, dy = draw(SHAPES[3], 1)
    plain = run(fused.dora_linear, x, W, a, b, gain, bias, dy)
    twice = torch.stack((x, x), dim=2)
    views = (twice[:, :, 1], W.t().contiguous().t(), a.t().contiguous().t(), b.t().contiguous().t())
    assert all(not view.is_contiguous() for view in views)
    strided = run(fused.dora_linear, *views, gain, bias, dy)
    # not compared with one another: the interpreter's numpy sums each layout in an order of its own
    assert_right(plain, [x, W, a, b, gain, bias, dy])
    assert_right(strided, [x, W, a, b, gain, bias, dy])
    found = run(fused.dora_linear, x, W, a, b, gain, bias, dy[:1].expand(N, O))
    assert_right(found, [x, W, a, b, gain, bias, dy[:1].expand(N, O)])
    folded = fused.dora_linear(x.view(6, 11, I), W, a, b, gain, S, bias)
    assert torch.equal(folded, plain["y"].view(6, 11, O))


def test_zero_tokens():
    O, I, _, _ = SHAPES[0]
    x, W, a, b, gain, bias, _ = draw(SHAPES[0], 0)
    found = run(fused.dora_linear, x[:0].view(2, 0, I), W, a, b, gain, bias, torch.zeros(2, 0, O))
    assert found["y"].shape == (2, 0, O)
    assert found["dx"].shape == (2, 0, I)
    assert all(not found[name].any() for name in ("da", "db", "dgain", "dbias"))


def test_an_output_changed_in_place_is_not_read():
    tensors = draw(SHAPES[0], 3)
    plain = run(lambda *args: torch.relu(fused.dora_linear(*args)), *tensors)
    found = run(lambda *args: torch.relu_(fused.dora_linear(*args)), *tensors)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_gradients_only_where_asked():
    x, W, a, b, gain, bias, dy = draw(SHAPES[0], 0)
    y = fused.dora_linear(x, W, a, b.requires_grad_(), gain, S, bias)
    y.backward(dy)
    assert b.grad is not None
    assert x.grad is a.grad is gain.grad is None
    with torch.inference_mode():
        assert torch.equal(fused.dora_linear(x, W, a, b, gain, S, bias), y)


def test_a_second_derivative_is_refused():
    x, W, a, b, gain, bias, _ = draw(SHAPES[0], 0)
    y = fused.dora_linear(x.requires_grad_(), W, a, b, gain, S, bias)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("tile", [Tile(16, 16, splits=1), Tile(32, 16, splits=3), Tile(16, 32, splits=2)], ids=str)
def test_dz_b_inside_the_pass_or_beside_it(tile):
    x, W, a, b, gain, bias, dy = draw(SHAPES[3], 5)
    y, products = formula(x, W, a, b, gain, S, bias), Products(x, W, x @ a.T, b, S)
    for tried in (tile, tile._replace(fuse=True)):
        dz, dzb, dgain = launch.split_gradient(dy, y, gain, bias, products, tile=tried)
        torch.testing.assert_close(dz, dy * gain)
        torch.testing.assert_close(dzb, S * (dy * gain) @ b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dgain, (dy * formula(x, W, a, b, None, S, None)).sum(0), rtol=1e-4, atol=1e-4)


FAULTS = {
    "s forgotten going forward": ("compose_", lambda f: lambda y, xa, b, g, bias, s: f(y, xa, b, g, bias, 1.0)),
    "bias scaled": ("compose_", lambda f: lambda y, xa, b, g, bias, s: f(y, xa, b, g, None, s)),
    "gain forgotten": ("compose_", lambda f: lambda y, xa, b, g, bias, s: f(y, xa, b, None, bias, s)),
    "bias kept in z": ("split_gradient", lambda f: lambda dy, y, g, bias, p, **k: f(dy, y, g, None, p, **k)),
    "s forgotten going back": (
        "split_gradient",
        lambda f: lambda dy, y, g, bias, p, **k: f(dy, y, g, bias, p._replace(s=1.0), **k),
    ),
    "g forgotten going back": (
        "split_gradient",
        lambda f: lambda dy, y, g, bias, p, **k: (dy, *f(dy, y, g, bias, p, **k)[1:]),
    ),
    "last rank dropped": ("wide_times", lambda f: lambda x, y: f(x, y) * (1 + 1e-5)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_catches(fault, monkeypatch):
    name, plant = FAULTS[fault]
    monkeypatch.setattr(launch, name, plant(getattr(launch, name)))
    tensors = draw(SHAPES[0], 2)
    assert max(worst_errors(run(fused.dora_linear, *tensors), tensors).values()) > 4


def norm_error(n_O, W, a, b, s=S):
    """In eps of |w| + |s b a|: the sum is dense, so no square cancels."""
    delta = s * b.double() @ a.double()
    size = W.double().abs() + s * b.double().abs() @ a.double().abs()
    want = (W.double() + delta).norm(dim=1)
    return ((n_O - want).abs() / size.norm(dim=1).clamp_min(1e-30)).max().item() / torch.finfo(torch.float32).eps


@each_seed
@each_shape
def test_row_norm(shape, seed):
    _, W, a, b, _, _, _ = draw(shape, seed)
    if seed % 2:
        b[0], W[0] = 0, 0
    if seed % 3 == 0:
        W[-1] = -S * b[-1] @ a  # the update takes the row away: the expanded square would keep nothing
    n_O = launch.row_norm(W, a, b, S)
    assert norm_error(n_O, W, a, b) <= 4
    assert not seed % 2 or n_O[0] == 0


TILES = [Tile(16, 16), Tile(16, 16, splits=2), Tile(32, 16, splits=3), Tile(128, 64, splits=9)]


@pytest.mark.parametrize("R", [3, 20, 150])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.rows}x{t.cols}/{t.splits}")
def test_row_norm_however_it_is_cut(tile, R):
    _, W, a, b, _, _, _ = draw((33, 41, R, 1), R)
    assert norm_error(launch.row_norm(W, a, b, S, tile), W, a, b) <= 4
    assert norm_error(launch.row_norm(W.t().contiguous().t(), a, b, S, tile), W, a, b) <= 4


@pytest.mark.parametrize(("dot", "bound"), [("ieee", 4), ("split", 2**9), ("bf16", 2**17)])
def test_row_norm_by_other_products(dot, bound):
    """Truncated parts, as the interpreter makes them: "split" drops 2⁻¹⁵ of a product, "bf16" 2⁻⁷."""
    for seed in range(10):
        _, W, a, b, _, _, _ = draw(SHAPES[3], seed)
        error = norm_error(launch.row_norm(W, a, b, S, Tile(16, 16, dot=dot)), W, a, b)
        assert error <= bound
    assert dot == "ieee" or error > 4


@pytest.mark.parametrize("R", [3, 150])
def test_the_fresh_norm_sees_every_write(R):
    _, W, a, b, _, _, _ = draw((33, 41, R, 1), 0)
    a, b = torch.nn.Parameter(a), torch.nn.Parameter(b)
    optimizer = torch.optim.AdamW([a, b], lr=1e-2, fused=True)
    seen_a, seen_sb, n_O = torch.full_like(a.data, torch.nan), torch.full_like(b.data, torch.nan), torch.empty(33)
    s = S

    def step():
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        optimizer.step()

    writes = [
        lambda: None,
        step,
        lambda: b.data[-1, -1].add_(1e-4),
        lambda: a.data[-1, -1].mul_(1 + 1e-6),
        lambda: a.data[0, 0].neg_(),
        lambda: a.data.copy_(torch.randn_like(a)),
    ]
    for write in writes:
        write()
        launch.fresh_row_norm(W, a.data, b.data, s, seen_a, seen_sb, n_O)
        assert torch.equal(n_O, launch.row_norm(W, a.data, b.data, s))
        assert torch.equal(seen_a, a.data)
    s = 2 * S
    launch.fresh_row_norm(W, a.data, b.data, s, seen_a, seen_sb, n_O)
    assert norm_error(n_O, W, a.data, b.data, s) <= 4
    n_O.fill_(-1)
    launch.fresh_row_norm(W, a.data, b.data, s, seen_a, seen_sb, n_O)
    assert (n_O == -1).all(), "unchanged factors cost a sweep"


def test_a_compiler_sees_no_break():
    x, W, a, b, gain, bias, dy = draw(SHAPES[0], 4)
    compiled = torch.compile(fused.dora_linear, fullgraph=True, backend="aot_eager")
    for gain_O, bias_O in itertools.product((gain, None), (bias, None)):
        tensors = [x, W, a, b, gain_O, bias_O, dy]
        assert_right(run(compiled, *tensors), tensors)

    def norms(W, a, b, seen_a, seen_sb, n_O):
        fused.fresh_row_norm(W, a, b, S, seen_a, seen_sb, n_O)
        return fused.row_norm(W, a, b, S), n_O * 1

    start = torch.full_like(a, torch.nan), torch.full_like(b, torch.nan), torch.zeros(len(W))
    for n_O in torch.compile(norms, fullgraph=True, backend="aot_eager")(W, a, b, *start):
        assert norm_error(n_O, W, a, b) <= 4


def test_the_operators_keep_their_word():
    x, W, a, b, gain, bias, dy = draw(SHAPES[0], 4)
    y, xa = x @ W.T, x @ a.T
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.doralib.compose_, (y.clone(), xa, b, gain, bias, S), test_utils=checks)
    torch.library.opcheck(torch.ops.doralib.split_gradient, (dy, y, gain, bias, x, W, xa, b, S), test_utils=checks)
    torch.library.opcheck(torch.ops.doralib.row_norm, (W, a, b, S), test_utils=checks)
