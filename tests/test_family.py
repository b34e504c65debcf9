"""The methods beside DoRA and LoRA, magnitudes alone among them, and the parameter counts of the papers."""

import copy

import peft
import pytest
import torch
from conftest import make_llama
from torch import nn

import doralib
from doralib import inject
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.magnitudes import DoraMagnitude
from doralib.merging import merge_checkpoint

QKV, REST = ("q_proj", "k_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def move(module, amount=0.1):
    for p in module.parameters():
        if p.requires_grad:
            p.add_(amount * torch.randn_like(p))
    return module


def ids():
    return torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(2))


def config(**changes):
    return DoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": QKV, "magnitude_modules": REST} | changes)


BASES = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
}


def make(kind, dtype=torch.float64, **changes):
    build, shape = BASES[kind]
    module = build().to(dtype)
    if kind != "transposed":
        with torch.no_grad():
            (module.weight.T if kind == "embedding" else module.weight)[1] = 0
    layer = DoraMagnitude(module, 1, 1.0, DoraConfig(**changes))
    return layer, torch.tensor([[1, 3], [6, 0]]) if shape is None else torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_magnitudes_change_nothing_bit_for_bit(kind, dtype):
    layer, x = make(kind, dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_magnitude_vector"]


@pytest.mark.parametrize("kind", BASES)
def test_magnitudes_equal_the_merged_weight_and_its_gradient(kind):
    layer, x = make(kind)
    move(layer, 0.5)
    torch.testing.assert_close(layer(x), layer.merged()(x))
    dy = torch.randn_like(layer(x))
    (ours,) = torch.autograd.grad(layer(x), layer.lora_magnitude_vector, dy)
    W_OI, m = layer.base.W_OI, layer.lora_magnitude_vector
    n = W_OI.norm(dim=1)
    rows = (torch.where(n > 0, m / torch.where(n > 0, n, 1), 0)[:, None] * W_OI).view(layer.base.row_shape)
    weight = layer.base._stored(rows.flatten(1))
    want = torch.func.functional_call(layer.base_layer, {"weight": weight}, (x,))
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(ours, torch.autograd.grad(want, m, dy)[0])
    assert ours.isfinite().all()


@pytest.mark.parametrize("mode", ["exact", "adapter"])
def test_dropout_falls_on_the_change_of_length(mode):
    layer, x = make("linear", lora_dropout=0.5, dropout_mode=mode)
    move(layer.train(), 0.5)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = x * layer._draw_dropout(x).keep / 0.5 if mode == "exact" else x
    W, g = layer.base.W_OI, layer.gain()
    torch.testing.assert_close(y, layer.base_layer(x) + (g - 1) * (dropped @ W.T))


def test_granularity_on_a_model_saves_loads_merges(tmp_path):
    plain, before = make_llama(), make_llama()(ids()).logits
    plain.save_pretrained(tmp_path / "base")
    model = doralib.adapt(copy.deepcopy(plain), config())
    assert torch.equal(model(ids()).logits, before)
    doralib.save_adapter(move(model), tmp_path / "adapter")
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert isinstance(again.model.layers[0].mlp.up_proj, DoraMagnitude)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    stored = type(plain).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(stored(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
    (tmp_path / "adapter" / "doralib_config.json").unlink()
    bare = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(bare(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(doralib.merge(model)(ids()).logits, bare(ids()).logits, atol=1e-5, rtol=1e-4)


def test_what_turns_rows_does_not_load_into_magnitudes():
    model = doralib.adapt(make_llama(), config())
    other = move(doralib.adapt(make_llama(), config(target_modules=(*QKV, *REST), magnitude_modules=(), r=1)))
    with pytest.raises(DoraError, match="turns its rows"):
        inject.load_into(model, inject.state_of(other))


def test_magnitude_modules_are_checked():
    with pytest.raises(UsageError, match="take dora"):
        config(method="lora")
    with pytest.raises(UsageError, match="'o_prog'"):
        doralib.adapt(make_llama(), config(magnitude_modules=("o_prog",)))
    with pytest.raises(UsageError, match="in magnitude_modules and in target_modules"):
        doralib.adapt(make_llama(), config(magnitude_modules=("q_proj",)))
    model = doralib.adapt(make_llama(), config(target_modules="all-linear"))
    assert type(model.model.layers[1].self_attn.q_proj) is doralib.layers.DoraLinear
    assert type(model.model.layers[1].self_attn.o_proj) is DoraMagnitude
    assert torch.equal(doralib.remove(model)(ids()).logits, make_llama()(ids()).logits)


def llama(size):
    """LLaMA's linear layers alone, without memory."""
    width, inner, depth = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40)}[size]
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    shapes |= {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    with torch.device("meta"):
        layers = [nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in shapes.items()}) for _ in range(depth)]
        return nn.ModuleList(layers)


UD = (*QKV, "up_proj", "down_proj")


# EXPERIMENTS C, D and E
@pytest.mark.parametrize(
    ("size", "settings", "count"),
    [
        ("7B", {"method": "lora", "r": 32, "target_modules": UD}, 56_098_816),
        ("7B", {"method": "dora", "r": 32, "target_modules": UD}, 56_975_360),
        ("7B", {"method": "dora", "r": 16, "target_modules": UD}, 28_925_952),
        ("13B", {"method": "lora", "r": 32, "target_modules": UD}, 87_818_240),
        ("13B", {"method": "dora", "r": 32, "target_modules": UD}, 89_190_400),
        ("13B", {"method": "dora", "r": 16, "target_modules": UD}, 45_281_280),
        ("7B", {"r": 32, "target_modules": QKV, "magnitude_modules": REST}, 26_525_696),
        ("13B", {"r": 32, "target_modules": QKV, "magnitude_modules": REST}, 41_451_520),
        ("7B", {"method": "lora", "r": 64, "target_modules": (*QKV, *REST)}, 159_907_840),
        ("7B", {"method": "dora", "r": 64, "target_modules": (*QKV, *REST)}, 161_267_712),
    ],
)
def test_parameter_counts_of_the_papers(size, settings, count):
    model = doralib.adapt(llama(size), DoraConfig(**settings))
    assert sum(p.numel() for _, p in inject.trainable(model)) == count
