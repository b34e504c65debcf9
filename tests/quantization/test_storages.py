"""Adapted layers on quantized storages: the formula on the dequantised weight, and merging by requantising."""

import copy
import warnings

import pytest
import reference
import torch
from adapted import move
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from doralib import functional as F
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.layers.base.opaque import Opaque, Quantized
from doralib.layers.base.registry import open_base
from doralib.layers.linear import DoraLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

# rows and columns divide neither bitsandbytes' blocks of 64 nor each other; row 3 is zero
O, I, N, R = 21, 36, 7, 3


def weight(dtype=torch.float32, shape=(O, I)):
    W = torch.randn(*shape) * torch.rand(shape[0], 1)
    W[3] = 0
    return W.to(dtype)


def bits4(W, quant_type, nested, storage=torch.uint8):
    layer = bnb.nn.Linear4bit(
        W.shape[1],
        W.shape[0],
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    settings = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    layer.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, module=layer, **settings)
    return layer.to("cpu")


def bits8(W):
    layer = bnb.nn.Linear8bitLt(W.shape[1], W.shape[0], has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def torchao(W, config):
    q = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    layer.weight.data = W.clone()
    if config == "nf4":
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        layer.weight = nn.Parameter(to_nf4(W, 36, 7), requires_grad=False)
        return layer
    made = {
        "int8": lambda: q.Int8WeightOnlyConfig(),
        "int8 groups": lambda: q.Int8WeightOnlyConfig(granularity=q.PerGroup(12)),
        "int8 tensor": lambda: q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
        "int4": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "int4 shifted": lambda: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=q.PerGroup(12), mapping_type=q.MappingType.ASYMMETRIC
        ),
        "float8": lambda: q.Float8WeightOnlyConfig(),
        "int8 inputs": lambda: q.Int8DynamicActivationInt8WeightConfig(),
    }
    q.quantize_(layer, made[config]())
    return layer


MAKERS = {
    "nf4": lambda W: bits4(W, "nf4", nested=False),
    "nf4 double": lambda W: bits4(W, "nf4", nested=True),
    "fp4 double": lambda W: bits4(W, "fp4", nested=True),
    "nf4 in bfloat16": lambda W: bits4(W, "nf4", nested=True, storage=torch.bfloat16),
    "int8": bits8,
    **{
        f"torchao {name}": lambda W, name=name: torchao(W, name)
        for name in ("int8", "int8 groups", "int8 tensor", "int4", "int4 shifted", "float8", "nf4")
    },
}
storages = pytest.mark.parametrize("storage", MAKERS)


def make_base(storage, W=None):
    W = weight() if W is None else W
    # torchao cannot make a row of zeros float8
    return MAKERS[storage](W + 0.1 * (storage == "torchao float8")).train()


def dense(module):
    """The weight as the package itself makes it dense."""
    if isinstance(module, bnb.nn.Linear4bit):
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(module.weight.data, state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        CB, SCB = module.state.CB, module.state.SCB
        return bnb.functional.int8_vectorwise_dequant(
            *((module.weight.CB, module.weight.SCB) if CB is None else (CB, SCB))
        )
    w = module.weight.detach()
    return w.get_original_weight() if hasattr(w, "get_original_weight") else w.dequantize()


def make(storage, moved=True, base=None, **changes):
    config = DoraConfig(r=R, lora_alpha=4, **changes)
    layer = DoraLinear(make_base(storage) if base is None else base, R, config.scale_of("layer"), config)
    return (move(layer, 0.2) if moved else layer).train()


@storages
def test_the_dense_weight_is_the_packages_own_by_any_block_of_rows(storage, monkeypatch):
    module = make_base(storage)
    base, W = open_base(module), dense(module)
    assert type(base) is Quantized
    assert base.shape == (O, I)
    assert base.W_OI.dtype == base.dtype == torch.float32
    torch.testing.assert_close(base.W_OI, W, rtol=2e-7, atol=0)
    for rows in (slice(0, 1), slice(5, 6), slice(4, 17), slice(20, 21), slice(0, O), slice(7, 7)):
        torch.testing.assert_close(base.rows[rows], W[rows], rtol=2e-7, atol=0)
    index = torch.tensor([20, 3, 3, 0, 11])
    A, C = torch.randn(R, I), torch.randn(O, R)
    for elements in (1 << 20, 100):
        monkeypatch.setattr(F, "BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(base.dense_rows(index), W[index], rtol=2e-7, atol=0)
        torch.testing.assert_close(base.row_norm_sq(), W.double().square().sum(1).float())
        torch.testing.assert_close(base.times_transposed(A), (W.double() @ A.double().T).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(base.transposed_times(C), (C.double().T @ W.double()).float(), rtol=1e-5, atol=1e-5)


@storages
@pytest.mark.parametrize("mode", ["adapter", "exact"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(storage, mode, method):
    for dtype in (torch.float32, torch.bfloat16):
        base = make_base(storage, weight(dtype))
        layer = make(storage, moved=False, base=base, method=method, dropout_mode=mode, lora_dropout=0.4)
        x = torch.randn(2, N, I).to(dtype)
        for training in (True, False):
            layer.train(training)
            assert torch.equal(layer(x), layer.base_layer(x))


@storages
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_outputs_and_gradients_are_the_formula_on_the_dense_weight(storage, detach, seed):
    torch.manual_seed(seed)
    layer = make(storage, detach_norm=detach)
    x, dy = torch.randn(2, N, I, requires_grad=True), torch.randn(2, N, O)
    y = layer(x)
    y.backward(dy)
    got = [y, x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.lora_magnitude_vector.grad]
    W, bias = dense(layer.base_layer).double(), layer.bias.detach().double()
    A, B, m, x64 = (
        t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, x)
    )
    n = reference.row_norm(W, A, B, layer.scale)
    y64 = reference.linear(x64, W, A, B, m / (n.detach() if detach else n), layer.scale, bias)
    y64.backward(dy.double())
    for ours, want in zip(got, [y64, x64.grad, A.grad, B.grad, m.grad], strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@storages
def test_a_row_of_zeros_stays_zero_and_nothing_is_nan(storage):
    if storage == "torchao float8":
        pytest.skip("torchao itself makes NaN of a row of zeros")
    layer = make(storage, moved=False)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B[:3].normal_()
    x = torch.randn(N, I, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y[:, 3], layer.bias[3].expand(N), rtol=0, atol=1e-6)
    assert all(t.grad.isfinite().all() for t in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    merged = dense(layer.merged())
    assert not merged[3].any()
    assert merged.isfinite().all()


@storages
def test_merging_quantises_the_dense_merged_weight_as_the_package_would(storage):
    layer = make(storage)
    layer.eval()(torch.randn(2, I))
    W, V = dense(layer.base_layer), layer.merged_weight()
    n = reference.row_norm(W.double(), layer.lora_A.double(), layer.lora_B.double(), layer.scale)
    gain = torch.where(n > 0, layer.lora_magnitude_vector / n, 0)[:, None]
    formula = gain * (W.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double())
    torch.testing.assert_close(V.double(), formula, rtol=1e-5, atol=1e-5)
    merged = layer.merged()
    assert type(merged) is type(layer.base_layer)
    assert type(merged.weight) is type(layer.base_layer.weight)
    assert merged.bias is layer.base_layer.bias
    torch.testing.assert_close(dense(merged), dense(MAKERS[storage](V)), rtol=1e-6, atol=1e-6)
    assert torch.equal(dense(layer.base_layer), W), "the frozen layer is as it was"
    x = torch.randn(N, I)
    merged.train()
    torch.testing.assert_close(merged(x), x @ dense(merged).T + merged.bias, rtol=1e-4, atol=1e-4)
    if isinstance(merged, bnb.nn.Linear4bit):
        old, new = layer.base_layer.weight.quant_state, merged.weight.quant_state
        assert merged.quant_state is new
        assert (new.dtype, new.nested, new.blocksize, new.shape) == (old.dtype, old.nested, old.blocksize, old.shape)
        assert merged.weight.dtype == layer.base_layer.weight.dtype
        assert merged.state_dict().keys() == layer.base_layer.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_four_bits_remember_what_they_were_made_from(dtype):
    merged = make("nf4", base=bits4(weight(dtype), "nf4", nested=True)).merged()
    assert merged.weight.quant_state.dtype == open_base(merged).storage.plain_dtype == dtype


@pytest.mark.parametrize("storage", ["torchao float8"])
def test_a_row_of_zeros_can_be_merged_into_float8(storage):
    layer = make(storage)
    with torch.no_grad():
        layer.lora_magnitude_vector[5] = 0
    merged = dense(layer.merged())
    assert merged.isfinite().all()
    assert not merged[5].any()


@storages
def test_the_norm_is_not_stale_when_the_weight_changes(storage):
    layer = make(storage)
    x = torch.randn(N, I)
    before, key = layer(x), layer.base.key()
    layer.eval()(x)
    layer.train()
    assert layer.base.key() == key, "a forward pass is no change"
    assert torch.equal(layer(x), before)
    other = make_base(storage, weight())
    if isinstance(other, bnb.nn.Linear8bitLt):
        layer.base_layer.state.CB, layer.base_layer.state.SCB = other.weight.CB, other.weight.SCB
    else:
        layer.base_layer.weight = other.weight
    W = dense(layer.base_layer)
    n = reference.row_norm(W, layer.lora_A, layer.lora_B, layer.scale)
    gain = torch.where(n > 0, layer.lora_magnitude_vector / n, 0)
    torch.testing.assert_close(
        layer(x),
        reference.linear(x, W, layer.lora_A, layer.lora_B, gain, layer.scale, layer.bias),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed_before", [False, True])
def test_an_evaluation_does_not_repack_the_weight(nested, packed_before):
    """bitsandbytes does so on CPUs with bfloat16 units: gradients and saved files are garbage afterwards."""
    base = bits4(weight(shape=(64, 128)), "nf4", nested=nested)
    W = dense(base)
    if packed_before:
        base.support_avx512bf16_for_cpu = True
        try:
            base.eval()(torch.randn(2, 128))
        except (AttributeError, RuntimeError, OSError):
            pytest.skip("bitsandbytes has no such kernel here")
        assert base.weight.quant_state.packing_format_for_cpu
        with pytest.warns(UserWarning, match="repacked"):
            layer = make("nf4", base=base.train())
        torch.testing.assert_close(dense(base), W, rtol=2**-8, atol=0)
    else:
        layer = make("nf4", base=base)
        layer.eval()(torch.randn(2, 128))
        layer.train()
        assert torch.equal(dense(base), W)
    x = torch.randn(N, 128, requires_grad=True)
    base(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(base).sum(0).expand(N, -1), rtol=1e-4, atol=1e-4)
    y = layer.eval()(x.detach())
    merged = layer.merged_weight()
    torch.testing.assert_close(y, x.detach() @ merged.T + layer.bias, rtol=1e-4, atol=1e-3)


def test_int8_before_and_after_its_first_forward_pass():
    fresh = make_base("int8")
    assert fresh.weight.CB is not None
    W = open_base(fresh).W_OI
    fresh(torch.randn(2, I))
    assert fresh.weight.CB is None
    assert torch.equal(open_base(fresh).W_OI, W)
    with_floats = bnb.nn.Linear8bitLt(I, O, has_fp16_weights=True)
    assert type(open_base(with_floats)) is Opaque


def test_a_layer_that_is_not_quantised_yet_says_so():
    with pytest.raises(DoraError, match="not quantized yet"):
        make("nf4", base=bnb.nn.Linear4bit(I, O))


def test_a_cpu_kernel_that_multiplies_by_another_weight_is_refused():
    base = bits4(weight(shape=(8, 32)), "nf4", nested=False)
    right = open_base(base).W_OI
    if torch.allclose(dense(base), right):
        pytest.skip("this CPU's kernel is right")
    with pytest.raises(DoraError, match="another weight than it stores"):
        make("nf4", base=base)
    data, state = base.weight.data.flatten(), base.weight.quant_state
    numbers = state.code[torch.stack([data >> 4, data & 15], 1).flatten().long()]
    assert torch.equal(right, (numbers.view(-1, 64) * state.absmax[:, None]).view(8, 32)), "read as it is stored"


def test_too_large_for_int8():
    layer = make("int8")
    with torch.no_grad():
        layer.lora_magnitude_vector.fill_(1e6)
    with pytest.raises(DoraError, match="too large for bitsandbytes int8"):
        layer.merged()


def test_a_call_of_its_own_is_opaque():
    class Doubling(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    assert type(open_base(Doubling(I, O))) is Opaque
    patched = make_base("nf4")
    patched.forward = lambda x: x
    assert type(open_base(patched)) is Opaque


def test_quantised_inputs_pass_no_gradient_and_say_so():
    layer = make("", base=torchao(weight(torch.bfloat16), "int8 inputs"))
    x = torch.randn(N, I, dtype=torch.bfloat16)
    with torch.no_grad():
        assert layer(x).shape == (N, O)
    layer(x).sum().backward()
    with pytest.raises(DoraError, match="train on weight-only"):
        layer(x.requires_grad_())


def test_a_torchao_tensor_that_cannot_be_made_anew_says_what_to_do(monkeypatch):
    layer = make("torchao int8")
    monkeypatch.setattr("doralib.quantization.torchao._MAKE", {})
    with pytest.raises(DoraError, match="dequantise=True"):
        layer.merged()


@storages
def test_a_copied_layer_is_its_own(storage):
    if storage == "torchao nf4":
        pytest.skip("torchao clones it into blocks of its own default size")
    layer = make(storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(layer)
    x = torch.randn(N, I)
    assert torch.equal(twin(x), layer(x))
    assert twin.base.storage.module is twin.base_layer


class CountDequantizing(TorchDispatchMode):
    """How often bitsandbytes makes a 4-bit weight dense, by itself or on the way of its own product."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("bitsandbytes::dequantize_4bit", "bitsandbytes::gemm_4bit")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["adapter", "exact"])
@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_step_dequantizes_once_forward_and_once_backward_and_never_for_the_norm(mode, method, detach):
    layer = make("nf4 double", method=method, dropout_mode=mode, lora_dropout=0.3, detach_norm=detach)
    x = torch.randn(2, N, I, requires_grad=True)
    layer(x).sum().backward()
    for _ in range(2):
        with torch.no_grad():
            for p in filter(lambda p: p.requires_grad, layer.parameters()):
                p.add_(torch.randn_like(p) * 0.01)
        with CountDequantizing() as forward:
            loss = layer(x).square().sum()
        assert forward.count == 1
        with CountDequantizing() as backward:
            loss.backward()
        # the norm's own gradient asks for two more products with the weight
        assert backward.count == 1 + 2 * (method == "dora" and not detach)
        with torch.no_grad(), CountDequantizing() as evaluation:
            layer.eval()(x)
        assert evaluation.count == 1
        layer.train()


def test_nothing_dense_is_kept_for_the_backward_pass():
    layer, x = make("nf4"), torch.randn(2, N, I, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert kept
    assert (O, I) not in kept
