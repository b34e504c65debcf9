"""The adapted layer on every base: identity at the start, merged equals adapted, never a stale norm."""

import copy
import warnings

import pytest
import reference
import torch
from adapted import move
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import doralib
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.layers.base.linear import Dense, Transposed
from doralib.layers.base.opaque import Opaque
from doralib.layers.base.registry import open_base
from doralib.layers.linear import DoraLinear
from doralib.layers.wrapper import TrainedCopy

O, I, N = 13, 10, 7


class Hidden(nn.Module):
    """A storage that nobody registered: its weight cannot be read, only used."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        y = x @ self.packed
        return y if self.bias is None else y + self.bias


def make_base(kind, dtype=torch.float32, bias=True):
    linear = nn.Linear(I, O, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0
        if bias:
            linear.bias.mul_(5)
    if kind == "conv1d":
        module = Conv1D(O, I)
        module.weight.data, module.bias.data = linear.weight.detach().T.contiguous(), linear.bias.detach()
        return module.to(dtype)
    return (Hidden(linear) if kind == "hidden" else linear).to(dtype)


def make(kind="linear", dtype=torch.float32, bias=True, moved=True, **changes):
    config = DoraConfig(r=3, lora_alpha=4, **changes)
    layer = DoraLinear(make_base(kind, dtype, bias), config.r, config.scale_of("layer"), config)
    return move(layer, 0.3) if moved else layer


kinds = pytest.mark.parametrize("kind", ["linear", "conv1d", "hidden"])
methods = pytest.mark.parametrize("method", ["dora", "lora"])


def test_storages_are_found():
    assert type(open_base(make_base("linear"))) is Dense
    assert type(open_base(make_base("conv1d"))) is Transposed
    assert type(open_base(make_base("hidden"))) is Opaque
    assert open_base(nn.LayerNorm(4)) is None


def test_a_subclass_that_computes_in_its_own_way_is_no_layer_unless_its_numbers_are_near():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Rounding(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, (self.weight * 16).round() / 16, self.bias)

    # merged by its weight it would be wrong
    assert open_base(Doubling(3, 4)) is None
    assert type(open_base(Rounding(3, 4))) is Opaque
    patched = nn.Linear(3, 4)
    patched.forward = lambda x: x
    assert type(open_base(patched)) is Opaque


@pytest.mark.same_bits
@kinds
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["adapter", "exact"])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind, method, dtype, mode):
    layer = make(kind, dtype, moved=False, method=method, dropout_mode=mode, lora_dropout=0.4)
    x = torch.randn(2, N, I).to(dtype)
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.same_bits
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("skipped", [1, 2, 5])
def test_a_fresh_adapter_changes_nothing_wherever_the_weight_lies(skipped, kind, method, dtype):
    """As one that is mapped from a file, whose address is no multiple of 64: a CPU may multiply with it differently."""
    layer = make(kind, dtype, moved=False, method=method)
    weight = layer.base_layer.weight
    memory = torch.empty(weight.numel() + skipped, dtype=dtype)[skipped:]
    weight.data = memory.view_as(weight).copy_(weight.detach())
    x = torch.randn(2, N, I, dtype=dtype)
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training):
            assert torch.equal(layer(x), layer.base_layer(x))


@kinds
@methods
@pytest.mark.parametrize("bias", [True, False])
def test_adapted_equals_formula(kind, method, bias):
    if kind == "conv1d" and not bias:
        pytest.skip("Conv1D always has a bias")
    layer, x = make(kind, torch.float64, bias, method=method), torch.randn(N, I, dtype=torch.float64)
    W = open_base(layer.base_layer).dense_rows(torch.arange(O)).double()
    V = W + layer.scale * layer.lora_B @ layer.lora_A
    gain = 1.0
    if method == "dora":
        gain = torch.nan_to_num(layer.lora_magnitude_vector / V.norm(dim=1))
    y = gain * (x @ V.T)
    y = y if layer.bias is None else y + layer.bias
    torch.testing.assert_close(layer(x), y)


@kinds
def test_gradients_equal_the_formulas_on_every_storage(kind):
    layer = make(kind, torch.float64)
    A, B, m = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    x, dy = torch.randn(N, I, dtype=torch.float64, requires_grad=True), torch.randn(N, O, dtype=torch.float64)
    W = open_base(layer.base_layer).dense_rows(torch.arange(O))
    gain = torch.nan_to_num(m / reference.row_norm(W, A, B, layer.scale).detach())
    y = reference.linear(x, W, A, B, gain, layer.scale, layer.bias.detach())
    got, want = (torch.autograd.grad(each, (x, A, B, m), dy) for each in (layer(x), y))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_full_gradient_of_the_norm_on_every_storage(kind):
    layer = make(kind, torch.float64, detach_norm=False)
    W = open_base(layer.base_layer).dense_rows(torch.arange(O))
    A, B = layer.lora_A, layer.lora_B
    x, dy = torch.randn(N, I, dtype=torch.float64), torch.randn(N, O, dtype=torch.float64)
    V = W + layer.scale * B @ A
    n = V.square().sum(1).sqrt()
    y = (layer.lora_magnitude_vector / n) * (x @ V.T) + layer.bias
    alive = torch.arange(O) != 3  # the zero row: sqrt has no gradient at 0, ours is finite
    want = torch.autograd.grad(y, (A, B), dy * alive)
    layer(x).backward(dy * alive)
    torch.testing.assert_close(A.grad, want[0])
    torch.testing.assert_close(B.grad[alive], want[1][alive])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_equals_adapted(kind, method, dtype):
    layer, x = make(kind, dtype, method=method), torch.randn(N, I).to(dtype)
    merged = layer.merged()
    assert type(merged) is type(layer.base_layer)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(merged(x), layer(x), rtol=tolerance, atol=tolerance)
    assert merged.weight.dtype == dtype
    assert merged.bias is layer.base_layer.bias


def test_an_unknown_storage_is_refused_where_its_weight_is_needed():
    with pytest.raises(DoraError, match="merge the saved adapter into the unquantized model"):
        make("hidden").merged()


def test_masters_stay_float32_when_the_model_is_cast():
    layer = make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    for name, value in before.items():
        assert torch.equal(layer.get_parameter(name), value)
    assert layer.double().lora_A.dtype == torch.float64


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(base_dtype):
    layer, x = make(dtype=base_dtype), torch.randn(N, I)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    exact = copy.deepcopy(layer).double()(x.double())
    assert (y.double() - exact).norm() <= 0.02 * exact.norm()


STEPS = {
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.1, fused=True),
}


@pytest.mark.parametrize("make_optimizer", STEPS.values(), ids=STEPS)
def test_the_norm_is_never_stale_after_an_optimizer(make_optimizer):
    layer, x = make(), torch.randn(N, I)
    optimizer = make_optimizer([p for p in layer.parameters() if p.requires_grad])
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        assert_fresh(layer, x)


def test_the_norm_is_never_stale_after_an_8_bit_optimizer():
    bnb = pytest.importorskip("bitsandbytes")
    layer, x = make(), torch.randn(N, I)
    optimizer = bnb.optim.AdamW8bit([p for p in layer.parameters() if p.requires_grad], lr=0.1, min_8bit_size=1)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        assert_fresh(layer, x)


def test_the_norm_is_never_stale_after_other_writes():
    layer, x = make(), torch.randn(N, I)
    layer(x)
    layer.lora_A.data.mul_(3)
    assert_fresh(layer, x)
    layer.lora_B.data = torch.randn_like(layer.lora_B)
    assert_fresh(layer, x)
    layer.scale = 0.1
    assert_fresh(layer, x)
    layer.load_state_dict(make().state_dict())
    assert_fresh(layer, x)
    layer.base_layer.weight.data = torch.randn(O, I)
    assert_fresh(layer, x)
    layer.to(torch.bfloat16).to(torch.float32)
    assert_fresh(layer, x)


@pytest.mark.same_bits
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2 * I], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_without_gradients_the_numbers_are_the_same_and_never_stale(kind, bias, rows, dtype, method):
    layer, x = make(kind, dtype, bias, method=method).eval(), torch.randn(2, rows, I).to(dtype)
    writes = [
        lambda: None,
        lambda: layer.lora_A.data.mul_(3),
        lambda: layer.lora_B.data.add_(1),
        lambda: layer.lora_magnitude_vector is not None and layer.lora_magnitude_vector.data.mul_(2),
        lambda: setattr(layer, "scale", 0.1),
        lambda: layer.load_state_dict(make(kind, dtype, bias, method=method).state_dict()),
    ]
    for write in writes:
        write()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                got = [layer(x), layer(x)]
            if dtype == torch.bfloat16 and rows == 1:
                # the low-rank product of so few rows is in float32, so better
                want = layer(x).detach().float()
                assert (got[0].float() - want).norm() <= 2**-7 * want.norm()
            else:
                assert torch.equal(got[0], layer(x).detach())
            assert torch.equal(got[0], got[1])


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, I), (I,), (1, 2 * I), (8, I), (9, I), (0, I)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_without_gradients_few_rows_equal_the_formula(bias, shape, dtype, method):
    """One row, and few in half precision, have ways of their own."""
    layer, x = make("linear", dtype, bias, method=method).eval(), torch.randn(shape).to(dtype)[..., :: shape[-1] // I]
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    for context in (torch.no_grad(), torch.inference_mode(), doralib.unchanged(layer)):
        with context, torch.no_grad():
            got = [layer(x), layer(x)]
        for y in got:
            assert (y.dtype, y.shape) == (dtype, exact.shape)
            assert (y.double() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@methods
def test_training_goes_on_after_inference_mode(method):
    layer, x = make(method=method), torch.randn(N, I)
    with torch.inference_mode():
        want = layer(x).clone()
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), want.clone())
    assert torch.isfinite(layer.lora_A.grad).all()


def test_a_sharded_parameter_whose_version_stays_zero_is_seen():
    """FSDP2's unsharded parameter: a new tensor over the same memory, version 0 at every step."""
    layer, x = make(), torch.randn(N, I)
    memory = layer.lora_B.detach().clone()
    for _ in range(2):
        layer._parameters["lora_B"] = nn.Parameter(memory.view_as(memory).data)
        assert layer.lora_B._version == 0
        assert_fresh(layer, x)
        memory.data.add_(1)


def assert_fresh(layer, x):
    with torch.no_grad():
        without = layer(x)
    torch.testing.assert_close(without, layer(x).detach())
    W = layer.base_layer.weight
    V = W + layer.scale * layer.lora_B @ layer.lora_A
    y = torch.nan_to_num(layer.lora_magnitude_vector / V.norm(dim=1)) * (x @ V.T) + layer.bias
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_a_weight_that_was_cast_to_the_same_address_is_seen():
    """No key tells it from the old one, as no counter tells a `.data` write."""
    layer, x = make(), torch.randn(N, I)
    layer(x)
    layer.base_layer.weight.data.mul_(1.5)
    layer.float()
    assert_fresh(layer, x)


def test_checkpoint_recomputation_uses_the_same_norm(monkeypatch):
    layer, x, calls = make(), torch.randn(N, I, requires_grad=True), []
    base = layer.base
    monkeypatch.setattr(base, "times_transposed", lambda a, f=base.times_transposed: calls.append(1) or f(a))
    for reentrant in (True, False):
        layer.zero_grad()
        layer(x).square().sum().backward()
        want = layer.lora_A.grad.clone()
        layer.zero_grad()
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(layer.lora_A.grad, want, rtol=0, atol=0)
    assert len(calls) == 1


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_torch_compile_gives_the_same_numbers(method, detach):
    layer, x = make(method=method, detach_norm=detach), torch.randn(N, I, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=detach)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            layer.zero_grad()
            y = compiled(x)
            y.square().sum().backward()
            got = [y.detach(), layer.lora_A.grad.clone()]
            layer.zero_grad()
            y = layer(x)
            y.square().sum().backward()
            for ours, theirs in zip(got, [y.detach(), layer.lora_A.grad], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            move(layer, 0.3)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    for mode in ("adapter", "exact"):
        layer, x = make(lora_dropout=0.5, dropout_mode=mode).train(), torch.randn(N, I)
        torch.testing.assert_close(layer.eval()(x), make_twin(layer)(x))
        layer.train()
        mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
        assert (mean - layer.eval()(x)).abs().max() < 0.5
        assert not torch.equal(layer.train()(x), layer(x))


def make_twin(layer):
    twin = copy.deepcopy(layer)
    twin.dropout = 0.0
    return twin


def test_not_a_linear_layer():
    with pytest.raises(DoraError, match="LayerNorm is not a linear layer"):
        DoraLinear(nn.LayerNorm(3), 2, 1.0, DoraConfig())


def test_a_trained_copy_computes_in_the_originals_dtype_and_merges():
    original = nn.Linear(I, O).to(torch.bfloat16)
    wrapper, x = TrainedCopy(original), torch.randn(N, I).to(torch.bfloat16)
    assert torch.equal(wrapper(x), original(x))
    assert wrapper.trained.weight.dtype == torch.float32
    assert wrapper.in_features == I
    with torch.no_grad():
        wrapper.trained.weight.add_(1)
    changed = wrapper(x)
    assert changed.dtype == torch.bfloat16
    wrapper.enabled = False
    assert torch.equal(wrapper(x), original(x))
    assert torch.equal(wrapper.merged()(x), changed)
