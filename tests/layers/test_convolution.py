"""Adapted convolutions of every geometry, against one formula in float64: the change is a change of the weight."""

import copy

import peft
import pytest
import torch
from adapted import move
from safetensors.torch import load_file, save_file
from torch import nn

import doralib
from doralib.adapters import registry
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.kernels.dropout import zeroed
from doralib.layers.base.registry import open_base
from doralib.layers.convolution import DoraConv
from doralib.layers.linear import DoraLinear

# geometry by name: class, (in, out, kernel), other arguments, input size
GEOMETRIES = {
    "1d": (nn.Conv1d, (6, 10, 3), {}, (2, 6, 11)),
    "2d": (nn.Conv2d, (6, 10, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}, (2, 6, 9, 8)),
    "3d": (nn.Conv3d, (4, 5, 2), {"padding": 1}, (2, 4, 4, 5, 3)),
    "pointwise": (nn.Conv2d, (6, 10, 1), {}, (2, 6, 4, 5)),
    "no bias": (nn.Conv2d, (6, 10, 3), {"bias": False}, (2, 6, 7, 7)),
    "dilated": (nn.Conv2d, (6, 10, 3), {"dilation": (2, 1), "padding": 2}, (2, 6, 9, 8)),
    "same": (nn.Conv1d, (6, 10, 4), {"padding": "same", "dilation": 2}, (2, 6, 11)),
    "groups": (nn.Conv2d, (6, 10, 3), {"groups": 2, "padding": 1}, (2, 6, 7, 7)),
    "depthwise": (nn.Conv1d, (6, 12, 5), {"groups": 6, "padding": 2}, (2, 6, 11)),
    "circular": (nn.Conv2d, (6, 10, 3), {"padding": 1, "padding_mode": "circular"}, (2, 6, 7, 7)),
    "reflect": (nn.Conv1d, (6, 10, 3), {"padding": 2, "padding_mode": "reflect", "dilation": 2}, (2, 6, 11)),
    "replicate": (nn.Conv2d, (6, 10, 3), {"padding": "same", "padding_mode": "replicate"}, (2, 6, 7, 7)),
    "unbatched": (nn.Conv2d, (6, 10, 3), {"padding": 1}, (6, 7, 7)),
    "transposed 1d": (nn.ConvTranspose1d, (6, 10, 3), {"stride": 2, "output_padding": 1}, (2, 6, 5)),
    "transposed 2d": (nn.ConvTranspose2d, (6, 10, (3, 2)), {"stride": 2, "padding": 1, "dilation": 2}, (2, 6, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d, (4, 5, 2), {}, (2, 4, 2, 3, 3)),
    "transposed groups": (nn.ConvTranspose2d, (6, 10, 3), {"groups": 2, "stride": 2}, (2, 6, 4, 4)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
methods = pytest.mark.parametrize("method", ["dora", "lora"])
R = 3


def make(geometry, dtype=torch.float64, moved=True, zero=True, **changes):
    cls, sizes, settings, shape = GEOMETRIES[geometry]
    module = cls(*sizes, **settings)
    if zero:
        with torch.no_grad():
            W = module.weight.transpose(0, 1) if "transposed" in geometry and module.groups == 1 else module.weight
            W[1] = 0
            if module.bias is not None:
                module.bias.mul_(5)
    config = DoraConfig(r=R, lora_alpha=4, **changes)
    layer = DoraConv(module.to(dtype), config.r, config.scale_of("layer"), config)
    return (move(layer, 0.3) if moved else layer), torch.randn(shape, dtype=torch.float64).to(dtype)


def formula(layer, x, detach=True):
    """The layer of torch with the weight ``m (W + s B A) / |W + s B A|``, written by output channel."""
    base = layer.base_layer
    A, B, m, s = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.scale
    groups = base.groups
    change = torch.einsum("or,ri...->oi...", B.flatten(1), A)
    if isinstance(base, nn.modules.conv._ConvTransposeNd):
        # torch keeps (in, out / groups): move each group's block over
        blocks = [block.transpose(0, 1) for block in change.chunk(groups)]
        change = torch.cat(blocks)
        W = base.weight + s * change
        by_channel = torch.cat([block.transpose(0, 1) for block in W.chunk(groups)])
    else:
        W = by_channel = base.weight + s * change
    if m is not None:
        n = by_channel.flatten(1).norm(dim=1)
        n = n.detach() if detach else n
        g = torch.where(n > 0, m / torch.where(n > 0, n, 1), 0)
        if isinstance(base, nn.modules.conv._ConvTransposeNd):
            share = g.chunk(groups)
            taps = (1,) * (W.dim() - 2)
            W = torch.cat([w * g_k.view(1, -1, *taps) for w, g_k in zip(W.chunk(groups), share, strict=True)])
        else:
            W = W * g.view(-1, *(1,) * (W.dim() - 1))
    return torch.func.functional_call(base, {"weight": W}, (x,))


@geometries
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(geometry, method, dtype):
    layer, x = make(geometry, dtype, moved=False, method=method, lora_dropout=0.4)
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.lora_A.dtype == torch.float32


@geometries
@methods
@pytest.mark.parametrize("detach", [True, False])
def test_output_and_gradients_equal_the_formula(geometry, method, detach):
    layer, x = make(geometry, method=method, detach_norm=detach)
    x.requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(leaves) == (4 if method == "dora" else 3)
    y, want = layer(x), formula(layer, x, detach)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.isfinite().all()


@geometries
@methods
def test_merged_equals_adapted_and_has_the_same_geometry(geometry, method):
    layer, x = make(geometry, method=method)
    merged = layer.merged()
    assert type(merged) is type(layer.base_layer)
    assert merged.weight.shape == layer.base_layer.weight.shape
    assert repr(merged) == repr(layer.base_layer)
    torch.testing.assert_close(merged(x), layer(x))


@pytest.mark.parametrize("geometry", ["2d", "groups", "circular", "same", "transposed 2d", "transposed groups"])
@pytest.mark.parametrize("mode", ["exact", "adapter"])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_falls_on_the_change(geometry, mode, p):
    layer, x = make(geometry, lora_dropout=p, dropout_mode=mode)
    torch.manual_seed(4)
    y = layer.train()(x)
    torch.manual_seed(4)
    dropped = zeroed(x, layer._draw_dropout(x).drawn) / (1 - p)
    base, merged = layer.base_layer, layer.eval().merged()
    if mode == "exact":
        want = base(x) + merged(dropped) - base(dropped)
    else:
        change = layer.gain()[:, None] * layer.scale * layer.b_OR @ layer.a_RI
        change = change.view(layer.base.row_shape)
        want = merged(x) + layer.base.product(dropped - x, change)
    torch.testing.assert_close(y, want)


def test_a_channel_of_length_zero_stays_finite():
    layer, x = make("2d", torch.float32, moved=False)
    assert layer.lora_magnitude_vector[1] == 0
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    move(layer, 0.1)
    assert layer(x).isfinite().all()


def test_output_size_reaches_a_transposed_convolution():
    layer, x = make("transposed 2d")
    size = [s + 1 for s in layer(x).shape[2:]]
    assert layer(x, size).shape[2:] == torch.Size(size)
    torch.testing.assert_close(layer(x, size), layer.merged()(x, size))


def test_autocast():
    layer, x = make("2d", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("fullgraph", [True])
def test_compiles_in_one_graph(fullgraph):
    layer, x = make("groups", torch.float32)
    compiled = torch.compile(layer, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_model_code_reads_is_there():
    layer, _ = make("2d")
    assert (layer.stride, layer.kernel_size, layer.in_channels) == ((2, 1), (3, 2), 6)
    with pytest.raises(AttributeError, match="no_such"):
        _ = layer.no_such


class Standardised(nn.Conv2d):
    def forward(self, x):
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, W, self.bias)


def test_a_convolution_that_computes_in_its_own_way_is_refused():
    assert open_base(Standardised(3, 4, 2)) is None
    with pytest.raises(UsageError, match="Standardised"):
        doralib.adapt(nn.Sequential(Standardised(3, 4, 2)), DoraConfig(target_modules=("0",)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 8, 5, padding="same", groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.up(self.wide(self.stem(x).relu()).relu()).mean((-1, -2)))


def config(**changes):
    return DoraConfig(**{"r": R, "lora_alpha": 5, "target_modules": ("stem", "wide", "up", "head")} | changes)


@methods
def test_whole_models_save_load_merge_remove(tmp_path, method):
    model, x = Net(), torch.randn(2, 3, 8, 8)
    before = model(x)
    plain = copy.deepcopy(model)
    doralib.adapt(model, config(method=method))
    assert torch.equal(model(x), before)
    move(model, 0.3)
    doralib.save_adapter(model, tmp_path)
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path)
    assert torch.equal(again(x), model(x))
    merged = doralib.merge(copy.deepcopy(model))
    assert [type(m) for m in merged.children()] == [type(m) for m in plain.children()]
    torch.testing.assert_close(merged(x), model(x))
    assert torch.equal(doralib.remove(model)(x), before)


@methods
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merging_on_disk_equals_merging_in_memory(tmp_path, method, dtype):
    model = Net()
    model.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
    model.head = nn.Linear(12, 4)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "net"}')
    move(doralib.adapt(model, config(method=method)), 0.3)
    doralib.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    want = doralib.merge(model).to(getattr(torch, dtype or "float32")).state_dict()
    assert stored.keys() == want.keys()
    for name, tensor in want.items():
        # two orders of summing in float32 may round to neighbours
        torch.testing.assert_close(stored[name], tensor)


def test_merging_on_disk_refuses_another_shape(tmp_path):
    model = Net()
    doralib.save_adapter(doralib.adapt(model, config()), tmp_path / "adapter")
    other = Net()
    other.stem, other.up = nn.Conv2d(3, 8, (9, 1)), nn.ConvTranspose2d(8, 16, 2)
    (tmp_path / "base").mkdir()
    save_file(other.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "net"}')
    with pytest.raises(DoraError, match="2 problems") as error:
        merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert "stem.weight" in str(error.value)
    assert "up.weight" in str(error.value)


def test_all_linear_leaves_convolutions_alone():
    model = doralib.adapt(Net(), config(target_modules="all-linear"))
    assert [type(m) for m in model.children()][-1] is DoraLinear
    assert not any(isinstance(m, DoraConv) for m in model.modules())


def test_another_kernel_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, (1, 3)))
    doralib.save_adapter(doralib.adapt(model, config(target_modules=("0",))), tmp_path)
    for other in (nn.Conv2d(3, 4, (3, 1)), nn.Linear(9, 4), nn.Conv1d(3, 4, 3)):
        with pytest.raises(DoraError, match="in the adapter"):
            doralib.load_adapter(nn.Sequential(other), tmp_path)
    adapted = doralib.adapt(nn.Sequential(nn.Conv2d(3, 4, (3, 1))), config(target_modules=("0",)))
    with pytest.raises(DoraError, match="does not fit"):
        doralib.load_adapter(adapted, tmp_path)


# where PEFT is right: no groups, no dilation, zero padding
@pytest.mark.parametrize("geometry", ["1d", "2d", "3d", "pointwise", "no bias"])
@methods
def test_peft_reads_and_computes_the_same(geometry, method, tmp_path):
    cls, sizes, settings, shape = GEOMETRIES[geometry]
    plain, x = nn.Sequential(cls(*sizes, **settings)), torch.randn(shape)
    model = move(doralib.adapt(copy.deepcopy(plain), config(method=method, target_modules=("0",))), 0.3)
    doralib.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), model(x), atol=2e-5, rtol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert torch.equal(again(x), model(x))
    want, got = registry.state_of(model).layers["0"], registry.state_of(again).layers["0"]
    assert (want.kind, want.kernel, want.shape) == (got.kind, got.kernel, got.shape)


def test_peft_cannot_read_what_it_would_compute_wrongly(tmp_path):
    """PEFT's grouped adapter is no change of the grouped weight: its tensors have other shapes, and it says so."""
    plain = nn.Sequential(nn.Conv2d(6, 6, 3, groups=3))
    doralib.save_adapter(doralib.adapt(copy.deepcopy(plain), config(target_modules=("0",))), tmp_path / "ours")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    settings = peft.LoraConfig(r=3, use_dora=True, target_modules=["0"])
    peft.get_peft_model(copy.deepcopy(plain), settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(DoraError, match="grouped convolution"):
        doralib.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
