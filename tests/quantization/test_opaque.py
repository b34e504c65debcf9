"""Storages that doralib does not know (GPTQ, AWQ, HQQ and the like): all that is asked of them is their own call."""

import pytest
import torch
from adapted import move
from torch import nn

import doralib
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.layers.base.opaque import Opaque
from doralib.layers.base.registry import open_base

O, I, GROUP = 12, 16, 8


class Packed(nn.Module):
    """Two numbers of 4 bits in a byte, with scales and zeros for each group, as GPTQ lays them out: no weight."""

    def __init__(self, dtype=torch.float32, *, broken=False):
        super().__init__()
        self.in_features, self.out_features, self.broken = I, O, broken
        self.register_buffer("qweight", torch.randint(0, 256, (O, I // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.rand(O, I // GROUP).to(dtype) / 8)
        self.register_buffer("qzeros", torch.randint(0, 16, (O, I // GROUP), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.randn(O, dtype=dtype), requires_grad=False)

    def dense(self):
        numbers = torch.stack([self.qweight >> 4, self.qweight & 15], -1).view(O, I // GROUP, GROUP)
        return ((numbers - self.qzeros[..., None].float()) * self.scales[..., None]).view(O, I).to(self.scales.dtype)

    def forward(self, x):
        if self.broken:
            raise RuntimeError("needs a kernel that is not here")
        return nn.functional.linear(x.to(self.scales.dtype), self.dense(), self.bias).to(x.dtype)


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second, self.head = Packed(dtype), nn.Linear(O, I, dtype=dtype), Packed(dtype)

    def forward(self, x):
        return self.head(self.second(self.first(x)).relu())


def adapted(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = DoraConfig(r=3, **{"target_modules": ("first", "second"), **settings})
    return doralib.adapt(Model(dtype), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dense_weight_is_read_exactly_through_the_layers_own_call(dtype):
    layer = Packed(dtype)
    base = open_base(layer)
    assert type(base) is Opaque
    assert base.hides_weight
    assert torch.equal(base.W_OI, layer.dense())


@pytest.mark.parametrize("start", ["kaiming", "pissa", "olora"])
def test_a_start_changes_nothing_and_the_gain_is_one(start):
    model, x = adapted(init_lora_weights=start), torch.randn(5, I)
    with doralib.disabled(model):
        want = model(x)
    torch.testing.assert_close(model(x), want, **({"rtol": 0, "atol": 0} if start == "kaiming" else {}))
    gain = model.first.gain().detach()
    torch.testing.assert_close(gain, torch.ones(O), **({"rtol": 0, "atol": 0} if start == "kaiming" else {}))
    torch.testing.assert_close(model.first.lora_magnitude_vector, Packed.dense(model.first.base_layer).norm(dim=1))


def test_it_merges_into_plain_layers_and_says_so_where_that_was_not_asked_for():
    model, x = move(adapted()), torch.randn(5, I)
    want = model(x)
    with pytest.raises(DoraError, match="dequantise=True"):
        doralib.merge(model)
    assert torch.equal(model(x), want)
    doralib.merge(model, dequantise=True)
    assert [type(module) for module in model.children()] == [nn.Linear] * 3
    torch.testing.assert_close(model(x), want)
    assert not list(model.head.buffers())


def test_the_curve_is_that_of_the_dense_twin():
    losses = []
    for dense in (False, True):
        torch.manual_seed(1)
        model = Model()
        if dense:
            for name in ("first", "head"):
                old, plain = getattr(model, name), nn.Linear(I, O)
                plain.weight.data, plain.bias.data = old.dense(), old.bias.data
                setattr(model, name, plain)
        torch.manual_seed(2)
        doralib.adapt(model, DoraConfig(r=3, target_modules=("first", "second", "head")))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        x = torch.randn(9, I)
        losses.append([])
        for _ in range(6):
            loss = model(x).square().mean()
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-6)


def test_a_layer_that_cannot_be_called_here_is_refused_with_its_reason():
    with pytest.raises(DoraError, match="its own call fails: needs a kernel"):
        _ = Opaque(Packed(broken=True)).W_OI


def test_what_compressed_tensors_has_taken_away_is_refused_with_the_remedy():
    layer = nn.Linear(I, O)
    layer.weight_packed, layer.weight_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    layer.quantization_status = "compressed"
    del layer.weight
    with pytest.raises(UsageError, match=r"CompressedTensorsConfig\(dequantize=True\)"):
        doralib.adapt(nn.Sequential(layer), DoraConfig(r=2, target_modules=("0",)))
