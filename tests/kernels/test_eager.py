"""Each fast function against the formula it stands for, in float64, forward and every gradient."""

import copy
import math

import pytest
import reference
import torch
from torch import nn

from doralib import functional as F
from doralib.kernels import eager
from doralib.kernels.cache import LayerCache
from doralib.kernels.dropout import Dropout, boost, dropped, zero_, zeroed
from doralib.kernels.dropout import draw as draw_dropout
from doralib.kernels.eager import dora_linear
from doralib.kernels.reductions import column_dots, plain_sweep, scaled_product_and_dots
from doralib.layers.base.linear import Dense

# no two sizes of a case are equal: a swapped axis or a stray broadcast cannot pass
SHAPES = [(7, 5, 3, 11), (1, 5, 2, 4), (13, 2, 1, 3), (6, 9, 4, 1)]  # O, I, R, N
S = 0.7

each_seed = pytest.mark.parametrize("seed", range(20))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda v: "O{}-I{}-R{}-N{}".format(*v))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
NAMES = ("x", "A", "B", "gain", "bias")


@pytest.fixture(params=[math.inf, 0], ids=["by-parts", "effective-weight"])
def way(request, monkeypatch):
    """Both ways to compute the layer, whatever the sizes."""
    monkeypatch.setattr(eager, "_ROWS_PER_FEATURE", request.param)
    return request.param


def draw(shape, dtype, seed=0):
    """x, W, A, B, gain, bias and dy, rounded to dtype once, so that every path starts from the same numbers."""
    O, I, R, N = shape
    g = torch.Generator().manual_seed(seed)
    sizes = {"x": (N, I), "W": (O, I), "A": (R, I), "B": (O, R), "gain": (O,), "bias": (O,), "dy": (N, O)}
    return {name: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for name, size in sizes.items()}


def run(f, tensors):
    """Output and gradients by name."""
    t = {name: value.detach().clone() for name, value in tensors.items()}
    for name in NAMES:
        if t.get(name) is not None:
            t[name].requires_grad_()
    y = f(t)
    y.backward(t["dy"])
    return {"y": y.detach(), **{f"d{n}": t[n].grad for n in NAMES if t.get(n) is not None and t[n].grad is not None}}


def assert_within_bound(ours, formula, tensors, dtype, units=6):
    """The error is a few eps of the formula on absolute values: what rounding can cost, however much cancels.

    The measured worst of 20 seeds is 2.5 eps in float32; the composition by g - 1 adds |g - 1| |z| to the terms.
    """
    exact = run(formula, {n: v.double() for n, v in tensors.items()})
    size = run(formula, {n: v.double().abs() + (n == "gain") for n, v in tensors.items()})
    if "dgain" in size:
        # z is read back from the output as (y - bias) / g, and computed again where g is tiny
        read_back = (tensors["bias"] / tensors["gain"]).double().abs().where(tensors["gain"].abs() > 1e-12, 0)
        size["dgain"] += tensors["dy"].double().abs().sum(0) * read_back
    assert ours.keys() == exact.keys()
    for name, got in ours.items():
        error = ((got.double() - exact[name]).abs() / size[name]).max()
        assert error <= units * torch.finfo(dtype).eps, f"{name}: {error / torch.finfo(dtype).eps:.1f} eps"


def plain(t):
    return dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, t["bias"])


def plain_formula(t):
    return reference.linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, t["bias"])


@each_seed
@each_shape
@each_dtype
def test_dora_linear(shape, dtype, seed, way):
    tensors = draw(shape, dtype, seed)
    assert_within_bound(run(plain, tensors), plain_formula, tensors, dtype)


@each_seed
@each_dtype
def test_lora_linear(dtype, seed, way):
    tensors = draw(SHAPES[0], dtype, seed)
    ours = run(lambda t: dora_linear(t["x"], t["W"], t["A"], t["B"], None, S, t["bias"]), tensors)
    assert_within_bound(
        ours,
        lambda t: reference.linear(t["x"], t["W"], t["A"], t["B"], torch.ones(7).double(), S, t["bias"]),
        tensors,
        dtype,
    )


@each_seed
@each_dtype
@pytest.mark.parametrize("exact", [False, True], ids=["adapter", "exact"])
def test_dropout(dtype, exact, seed):
    tensors = draw(SHAPES[0], dtype, seed)
    keep = torch.rand(11, 5, generator=torch.Generator().manual_seed(seed)) > 0.3
    drawn = keep if seed % 2 else (~keep).flatten().nonzero().flatten()
    formula = reference.linear_exact_dropout if exact else reference.linear_adapter_dropout

    def ours(t):
        return dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, t["bias"], Dropout(drawn, 0.3, exact))

    def expected(t):
        dropped = t["x"] * keep / 0.7
        return formula(t["x"], dropped, t["W"], t["A"], t["B"], t["gain"], S, t["bias"])

    if exact:
        # g (W + s B A) - W cancels in the formula on absolute values; compare with plain relative closeness
        a, b = run(ours, tensors), run(expected, {n: v.double() for n, v in tensors.items()})
        for name in a:
            torch.testing.assert_close(a[name].double(), b[name], rtol=0, atol=200 * torch.finfo(dtype).eps)
    else:
        assert_within_bound(run(ours, tensors), expected, tensors, dtype)


@pytest.mark.parametrize("exact", [False, True])
def test_gradcheck(exact):
    t = draw((7, 5, 3, 4), torch.float64)
    keep = torch.rand(4, 5) > 0.5
    leaves = [t[name].requires_grad_() for name in NAMES]
    for dropout in (None, Dropout(keep, 0.5, exact)):
        assert torch.autograd.gradcheck(
            lambda x, A, B, gain, bias, dropout=dropout: dora_linear(x, t["W"], A, B, gain, S, bias, dropout), leaves
        )


def test_gain_of_zero_still_has_its_gradient(way):
    tensors = draw(SHAPES[0], torch.float32)
    tensors["gain"][2] = 0
    tensors["gain"][4] = 1e-30
    assert_within_bound(run(plain, tensors), plain_formula, tensors, torch.float32)


def test_a_consumer_that_changes_the_output_in_place(way):
    tensors = draw(SHAPES[0], torch.float32)
    ours = run(lambda t: torch.relu_(plain(t)), tensors)
    exact = run(lambda t: torch.relu(plain_formula(t)), {n: v.double() for n, v in tensors.items()})
    for name, got in ours.items():
        torch.testing.assert_close(got.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fault",
    [
        lambda t: dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S * S, t["bias"]),
        lambda t: dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, None) + t["bias"] * t["gain"].detach(),
        lambda t: dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"].detach(), S, t["bias"]) + 0 * t["gain"],
        lambda t: dora_linear(t["x"], t["W"], t["A"], t["B"].detach(), t["gain"], S, t["bias"]) + 0 * t["B"].sum(),
    ],
    ids=["scale", "scaled bias", "no gain gradient", "no B gradient"],
)
def test_planted_faults_are_caught(fault):
    tensors = draw(SHAPES[0], torch.float32)
    with pytest.raises(AssertionError, match="eps"):
        assert_within_bound(run(fault, tensors), plain_formula, tensors, torch.float32)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_input_shapes(shape):
    t = draw(SHAPES[0], torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    A = t["A"].requires_grad_()
    y = dora_linear(x, t["W"], A, t["B"], t["gain"], S, t["bias"])
    torch.testing.assert_close(y, reference.linear(x, t["W"], A, t["B"], t["gain"], S, t["bias"]))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert A.grad.shape == A.shape


def test_non_contiguous_tensors():
    t = draw((7, 5, 3, 11), torch.float64)
    x = torch.randn(5, 11, dtype=torch.float64).T.requires_grad_()
    W_T = t["W"].T.contiguous().T
    y = dora_linear(x, W_T, t["A"], t["B"], t["gain"], S)
    torch.testing.assert_close(y, reference.linear(x, t["W"], t["A"], t["B"], t["gain"], S))
    y.backward(torch.randn(7, 11, dtype=torch.float64).T)
    assert torch.isfinite(x.grad).all()


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    t = draw(SHAPES[0], torch.float32)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        dora_linear(t["x"][:, :4], t["W"], t["A"], t["B"], t["gain"], S)
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        dora_linear(t["x"].double(), t["W"], t["A"], t["B"], t["gain"], S)


def test_second_derivative_is_refused():
    t = draw(SHAPES[0], torch.float64)
    x = t["x"].requires_grad_()
    (dx,) = torch.autograd.grad(plain(t).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_inference_mode():
    t = draw(SHAPES[0], torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(plain(t), plain_formula(t))


def test_bfloat16_plumbing():
    """Dtypes come out right and gradients of masters are float32; rounding alone separates it from float64."""
    tensors = draw((48, 64, 8, 32), torch.float32)
    low = {n: v.bfloat16() if n in ("x", "W", "dy") else v for n, v in tensors.items()}
    ours = run(plain, low)
    assert ours["y"].dtype == ours["dx"].dtype == torch.bfloat16
    assert ours["dA"].dtype == ours["dB"].dtype == ours["dgain"].dtype == torch.float32
    exact = run(plain_formula, {n: v.double() for n, v in low.items()})
    for name, got in ours.items():
        assert (got.double() - exact[name]).norm() <= 0.01 * exact[name].norm(), name


def saved_bytes(f):
    """Distinct bytes that autograd keeps for the backward pass of f."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f()
    return sum(kept.values()), kept.get(y.untyped_storage().data_ptr(), 0)


def test_bytes_saved_for_backward():
    O, I, R, N = 96, 160, 4, 64
    t = draw((O, I, R, N), torch.float32)
    leaves = {n: t[n].requires_grad_() for n in NAMES}
    frozen = sum(t[n].numel() * 4 for n in ("W", "A", "B", "gain", "bias"))
    x, xa, y, gsb = N * I * 4, N * R * 4, N * O * 4, O * R * 4
    assert leaves
    total, output = saved_bytes(lambda: plain(t))
    assert total == frozen + x + xa + y + gsb
    assert output == y  # the output itself, so nothing more where its consumer keeps it too
    total, output = saved_bytes(lambda: dora_linear(t["x"], t["W"], t["A"], t["B"], None, S, t["bias"]))
    assert (total, output) == (frozen - O * 4 + x + xa + gsb, 0)
    keep = torch.rand(N, I) > 0.1
    total, _ = saved_bytes(
        lambda: dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, t["bias"], Dropout(keep, 0.1, False))
    )
    assert total == frozen + x + xa + y + gsb + N * I  # one byte an input element for the mask
    few = torch.arange(0, N * I, 10)
    total, _ = saved_bytes(
        lambda: dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, t["bias"], Dropout(few, 0.1, False))
    )
    assert total == frozen + x + xa + y + gsb + 8 * N * I // 10  # eight for each that is zeroed


def test_a_weight_is_made_only_where_it_pays(monkeypatch):
    """Float32 on a CPU, many rows, no dropout; and it is not kept for the backward pass."""
    made = []
    monkeypatch.setattr(eager, "effective_weight", lambda *args: made.append(args) or F.effective_weight(*args))

    def times_made(shape, dtype=torch.float32, **settings):
        t = draw(shape, dtype)
        made.clear()
        run(lambda t: dora_linear(t["x"], t["W"], t["A"], t["B"], t["gain"], S, t["bias"], **settings), t)
        return len(made)

    many, few = (7, 8, 3, 11), (7, 8, 3, 10)
    assert times_made(many) == 2
    assert times_made(few) == 0
    assert times_made(many, torch.bfloat16) == 0
    assert times_made(many, dropout=Dropout(torch.rand(11, 8) > 0.1, 0.1, False)) == 0
    O, I, R, N = 96, 20, 4, 64
    t = draw((O, I, R, N), torch.float32)
    t["x"].requires_grad_()
    total, output = saved_bytes(lambda: plain(t))
    frozen = sum(t[n].numel() * 4 for n in ("W", "A", "B", "gain", "bias"))
    assert (total, output) == (frozen + (N * I + N * R + N * O + O * R) * 4, N * O * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 11, 5000])
def test_sums_over_rows(num_rows, dtype):
    t = draw((7, 5, 3, num_rows), dtype)
    y = torch.randn(num_rows, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    gain, shift = t["gain"].to(F.sum_dtype(dtype)), t["bias"]
    exact = {n: v.double() for n, v in {**t, "y": y}.items()}
    want = (exact["dy"] * (exact["y"] - exact["bias"])).sum(0)
    size = (exact["dy"].abs() * (exact["y"].abs() + exact["bias"].abs())).sum(0)
    eps = torch.finfo(F.sum_dtype(dtype)).eps
    out = torch.ones(num_rows, 5, dtype=dtype)
    for got in (column_dots(t["dy"], y, shift), scaled_product_and_dots(out, t["dy"], y, gain, t["W"], shift)):
        assert got.dtype == F.sum_dtype(dtype)
        assert ((got.double() - want).abs() <= 8 * eps * size).all()
    want = 1 + (exact["gain"] * exact["dy"]) @ exact["W"]
    size = 1 + (exact["gain"] * exact["dy"]).abs() @ exact["W"].abs()
    assert ((out.double() - want).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e2])
def test_the_sweep_of_other_devices_keeps_small_and_large_gains(dtype, size):
    """Exact dropout's is g - 1."""
    t = draw((7, 5, 3, 11), dtype)
    y = torch.randn(11, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    gain = (t["gain"] * size).to(F.sum_dtype(dtype))
    dz, dots = plain_sweep(t["dy"], y, gain, t["bias"])
    want = gain.double() * t["dy"].double()
    assert ((dz.double() - want).abs() <= torch.finfo(dtype).eps * want.abs()).all()
    want = (t["dy"].double() * (y.double() - t["bias"].double())).sum(0)
    torch.testing.assert_close(dots.double(), want, rtol=1e-5, atol=1e-5)


def test_sums_of_no_columns():
    nothing = torch.ones(3, 0)
    out = torch.ones(3, 5)
    assert column_dots(nothing, nothing).shape == (0,)
    assert scaled_product_and_dots(out, nothing, nothing, torch.ones(0), torch.ones(0, 5)).shape == (0,)
    assert torch.equal(out, torch.ones(3, 5))


def zeros_of(x, dropout):
    """Where a draw has zeros, bool."""
    return zeroed(torch.ones_like(x), dropout.drawn) == 0


# up to 0.25 the numbers of the zeroed elements, above it a mask
@pytest.mark.parametrize("p", [0.05, 0.25, 0.3, 0.999, 1e-9, 1e-300])
def test_a_draw_of_dropout(p):
    x = torch.ones(401, 503)
    dropout = draw_dropout(x, p, exact=False)
    assert (dropout.drawn.dtype == torch.bool) == (p > 0.25)
    assert (dropout.p, boost(dropout)) == (p, 1 / (1 - p))
    n, zeros = x.numel(), zeros_of(x, dropout)
    assert abs(int(zeros.sum()) - n * p) <= 5 * (n * p * (1 - p)) ** 0.5
    torch.testing.assert_close(dropped(x, dropout), ~zeros / (1 - p))
    again = draw_dropout(x, 0.2, exact=False)
    assert not torch.equal(zeros_of(x, again), zeros_of(x, draw_dropout(x, 0.2, exact=False)))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_a_draw_is_of_independent_elements_and_follows_the_seed(p):
    x = torch.empty(1000, 1000)
    torch.manual_seed(3)
    zeros = zeros_of(x, draw_dropout(x, p, exact=False))
    torch.manual_seed(3)
    assert torch.equal(zeros, zeros_of(x, draw_dropout(x, p, exact=False)))
    # no correlation between neighbours, up to 5 standard deviations of 1e-3
    centred = (zeros.flatten().float() - p) / (p * (1 - p)) ** 0.5
    for distance in (1, 2, 3, 4, 1000):
        assert abs((centred[:-distance] * centred[distance:]).mean()) < 5e-3
    # every place alike: the first, the last and those between, over the rows of many draws
    torch.manual_seed(4)
    counts = sum(zeros_of(x[0, :9], draw_dropout(x[0, :9], p, exact=False)).double() for _ in range(4000))
    assert ((counts - 4000 * p).abs() <= 5 * (4000 * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_draws_for_nothing_and_for_one(p):
    for shape in ((3, 0), (0, 3), (1, 1)):
        x = torch.ones(shape)
        assert dropped(x, draw_dropout(x, p, exact=True)).shape == shape


def test_a_draw_goes_on_where_the_steps_end_early(monkeypatch):
    """The chance of that is 1e-9: here the steps are all ones."""
    own = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **k: own(*size, **k).zero_())
    assert zeros_of(torch.ones(7, 50), draw_dropout(torch.ones(7, 50), 0.2, exact=False)).all()


@each_dtype
@pytest.mark.parametrize("rows", [slice(None), slice(None, None, 2)])
def test_numbers_and_a_mask_zero_the_same(dtype, rows):
    x = torch.randn(8, 5).to(dtype)[rows]
    x[0, 0] = float("inf")
    keep = torch.rand(x.shape) > 0.4
    keep[0, 0] = True
    numbers = (~keep).flatten().nonzero().flatten()
    assert torch.equal(zeroed(x, numbers), torch.where(keep, x, 0))
    assert torch.equal(zeroed(x, keep), torch.where(keep, x, 0))
    for drawn in (keep, numbers):
        mine = x.contiguous().clone()
        assert zero_(mine, drawn) is mine
        assert torch.equal(mine, torch.where(keep, x, 0))


# the norm


def norm_bound(W, A, B, s, dtype):
    """The expanded square cancels where s B A is about -W; past CANCELLATION the row is summed densely."""
    want = reference.row_norm(W.double(), A.double(), B.double(), s)
    size = W.double().norm(dim=1) + (s * B.double() @ A.double()).norm(dim=1)
    return want, 4 * torch.finfo(dtype).eps * size.square().clamp_max(4 * F.CANCELLATION * want.square()) / want + (
        4 * torch.finfo(dtype).eps * size
    )


@each_seed
@each_shape
@each_dtype
def test_adapted_row_norm(shape, dtype, seed):
    t = draw(shape, dtype, seed)
    norm = LayerCache(Dense(linear_module(t["W"]))).norm
    want, bound = norm_bound(t["W"], t["A"], t["B"], S, dtype)
    got = norm(t["A"], t["B"], S, detach=True)
    assert ((got.double() - want).abs() <= bound).all()
    assert not norm(t["A"].requires_grad_(), t["B"], S, detach=True).requires_grad


@each_seed
def test_a_product_that_is_computed_again_is_the_one_that_dropout_left(seed):
    """The output was written to, or a gain is tiny: dg is Σ dy ∘ z all the same, with z of the dropped input."""
    t = draw((7, 5, 3, 11), torch.float64, seed)
    t["gain"][2] = 1e-300
    keep = torch.rand(11, 5, generator=torch.Generator().manual_seed(seed)) > 0.3
    dropout = Dropout(keep, 0.3, False)
    z = t["x"] @ t["W"].T + S * (dropped(t["x"], dropout) @ t["A"].T) @ t["B"].T
    for write in (lambda y: y, lambda y: y.mul_(1)):
        gain = t["gain"].clone().requires_grad_()
        y = dora_linear(t["x"], t["W"], t["A"], t["B"], gain, S, t["bias"], dropout)
        (got,) = torch.autograd.grad(write(y), gain, t["dy"])
        torch.testing.assert_close(got, (t["dy"] * z).sum(0), rtol=1e-10, atol=1e-12)


@each_seed
@each_dtype
def test_dense_row_norm(dtype, seed):
    t = draw((7, 5, 3, 2), dtype, seed)
    want = reference.row_norm(t["W"].double(), t["A"].double(), t["B"].double(), S)
    size = (t["W"].abs() + S * t["B"].abs() @ t["A"].abs()).double().norm(dim=1)
    error = (F.dense_row_norm(t["W"], t["A"], t["B"], S).double() - want).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * size).all()


def test_the_cheaper_form_of_the_norm_is_taken(monkeypatch):
    assert not F.dense_is_cheaper(576, 576, 64)
    assert F.dense_is_cheaper(576, 576, 128)
    t = draw((7, 5, 3, 2), torch.float64)
    base = Dense(linear_module(t["W"]))
    norms = []
    for cheaper in (True, False):
        monkeypatch.setattr(F, "dense_is_cheaper", lambda *_, cheaper=cheaper: cheaper)
        norms.append(LayerCache(base).norm(t["A"], t["B"], S, detach=True))
    torch.testing.assert_close(*norms)


@each_seed
def test_rows_that_cancel_are_summed_densely(seed):
    """s B A about -W: without the dense sum the relative error is of order 1."""
    t = draw((7, 5, 5, 3), torch.float64, seed)
    target = -t["W"] * (1 - 1e-3)
    B = torch.linalg.solve(t["A"].T, target.T).T / S
    W, A, B = t["W"].float(), t["A"].float(), B.float()
    norm = LayerCache(Dense(linear_module(W))).norm
    want = reference.row_norm(W.double(), A.double(), B.double(), S)
    size = W.double().norm(dim=1) + (S * B.double().abs() @ A.double().abs()).norm(dim=1)
    error = (norm(A, B, S, detach=True).double() - want).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * size).all()


@each_seed
def test_the_norm_over_a_bfloat16_weight_is_a_float32_norm(seed):
    """However far the rows have turned."""
    t = draw((31, 24, 5, 3), torch.bfloat16, seed)
    A, B = (t[n].float() + torch.rand(t[n].shape) / 512 for n in "AB")
    B = B * 10 ** torch.linspace(-3, 1, 31)[:, None]
    got = LayerCache(Dense(linear_module(t["W"]))).norm(A, B, S, detach=True)
    want, bound = norm_bound(t["W"], A, B, S, torch.float32)
    assert got.dtype == torch.float32
    assert ((got.double() - want).abs() <= bound).all()


@each_dtype
def test_autocast_does_not_reach_the_norm(dtype):
    t = draw((31, 24, 5, 3), dtype)
    norms = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            norms.append(LayerCache(Dense(linear_module(t["W"]))).norm(t["A"], t["B"], S, detach=True))
    assert torch.equal(*norms)


@each_seed
def test_full_gradient_of_the_norm(seed):
    t = draw((7, 5, 3, 2), torch.float64, seed)
    norm = LayerCache(Dense(linear_module(t["W"]))).norm
    A, B = t["A"].requires_grad_(), t["B"].requires_grad_()
    ours = torch.autograd.grad(norm(A, B, S, detach=False), (A, B), t["gain"])
    exact = torch.autograd.grad(reference.row_norm(t["W"], A, B, S), (A, B), t["gain"])
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def linear_module(W):
    module = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    module.weight.data = W.clone()
    return module.requires_grad_(False)


def test_zero_rows_have_gain_zero_and_finite_gradients():
    t = draw((7, 5, 3, 4), torch.float64)
    W, B = t["W"].clone(), t["B"].clone()
    W[3], B[3] = 0, 0
    norm = LayerCache(Dense(linear_module(W))).norm
    m, A, B = W.norm(dim=1).requires_grad_(), t["A"].requires_grad_(), B.requires_grad_()
    for detach in (True, False):
        gain = m / norm(A, B, S, detach=detach)
        y = dora_linear(t["x"], W, A, B, gain, S)
        assert (y[:, 3] == 0).all()
        for gradient in torch.autograd.grad(y, (m, A, B), t["dy"]):
            assert torch.isfinite(gradient).all()


def test_norm_is_computed_again_only_when_something_changed(monkeypatch):
    t = draw((7, 5, 3, 2), torch.float32)
    base = Dense(linear_module(t["W"]))
    norm, calls = LayerCache(base).norm, []
    monkeypatch.setattr(base, "times_transposed", lambda a, f=base.times_transposed: calls.append(1) or f(a))
    A, B = nn.Parameter(t["A"]), nn.Parameter(t["B"])
    for _ in range(3):
        norm(A, B, S, detach=True)
    assert len(calls) == 1
    A.data[0, 0] += 1  # no version counter sees this
    norm(A, B, S, detach=True)
    assert len(calls) == 2
    norm(A, B, 2 * S, detach=True)
    assert len(calls) == 3
    base.module.weight.add_(1)
    norm(A, B, 2 * S, detach=True)
    assert len(calls) == 4


def test_a_copied_norm_belongs_to_its_copy():
    t = draw((7, 5, 3, 2), torch.float32)
    base = Dense(linear_module(t["W"]))
    cache = LayerCache(base)
    cache.norm(t["A"], t["B"], S, detach=True)
    twin = copy.deepcopy(cache)
    base.module.weight.mul_(3)
    want = reference.row_norm(t["W"], t["A"], t["B"], S)
    torch.testing.assert_close(twin.norm(t["A"], t["B"], S, detach=True), want)


# functional


@each_seed
@each_dtype
def test_merge_weight_and_compose_agree_with_the_formula(dtype, seed):
    t = draw(SHAPES[0], dtype, seed)
    m = t["gain"].abs()
    want = reference.row_norm(t["W"].double(), t["A"].double(), t["B"].double(), S)
    V = t["W"].double() + S * t["B"].double() @ t["A"].double()
    merged = F.merge_weight(t["W"], t["A"], t["B"], m, S)
    torch.testing.assert_close(
        merged.double(), (m.double() / want)[:, None] * V, rtol=40 * torch.finfo(dtype).eps, atol=1e-6
    )
    lora = S * (t["x"] @ t["A"].T) @ t["B"].T
    base = t["x"] @ t["W"].T + t["bias"]
    torch.testing.assert_close(F.compose(base, lora, t["gain"], t["bias"]), plain_formula(t), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(
        F.compose_exact(base, t["x"] @ t["W"].T, lora, t["gain"]), plain_formula(t), rtol=1e-4, atol=2e-5
    )


def test_row_blocks_cover_and_blocked_sums_agree(monkeypatch):
    t = draw((17, 5, 3, 2), torch.float32)
    whole = F.row_norm_sq(t["W"]), F.times_transposed(t["W"], t["A"]), F.transposed_times(t["W"], t["B"])
    monkeypatch.setattr(F, "BLOCK_ELEMENTS", 20)
    assert [s.indices(17)[:2] for s in F.row_blocks(17, 5)] == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 17)]
    blocks = F.row_norm_sq(t["W"]), F.times_transposed(t["W"], t["A"]), F.transposed_times(t["W"], t["B"])
    for one, many in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, many)
    torch.testing.assert_close(whole[1], t["W"] @ t["A"].T)
    torch.testing.assert_close(whole[2], t["B"].T @ t["W"])
