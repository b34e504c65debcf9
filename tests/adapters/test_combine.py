"""Adapters combined in weight space, against float64 sums of dense merges; and as PEFT reads them."""

import copy

import pytest
import torch
from adapted import ids, move
from adapters.test_multiple import CONFIGS, MODELS, of_kind, outputs
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import doralib
from doralib import DoraConfig, DoraError, UsageError
from doralib import functional as F
from doralib.adapters import registry
from doralib.layers.base.registry import open_base
from doralib.layers.wrapper import TrainedCopy


def dense(W, a, b, m, s):
    """The merged weight in float64, from the paper."""
    V = W.double() + s * b.double() @ a.double()
    if m is None:
        return V
    n = V.square().sum(1, keepdim=True).sqrt()
    return torch.where(n > 0, m.double()[:, None] * V / torch.where(n > 0, n, 1), 0)


@settings(max_examples=60, deadline=None)
@given(
    O=st.integers(1, 7),
    I=st.integers(1, 6),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    lora=st.integers(0, 7),
    seed=st.integers(0, 10**6),
)
def test_the_formula(O, I, ranks, lora, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    W = draw(O, I)
    W[0] = 0
    want, parts = W.clone(), []
    for i, r in enumerate(ranks):
        a, b, s, w = draw(r, I), draw(O, r), float(draw(1).abs()), float(draw(1))
        b[0] *= seed % 2  # rows of length zero stay so, or get a direction
        m = None if lora >> i & 1 else draw(O)
        gain = None if m is None else F.gain(m, (W + s * b @ a).norm(dim=1))
        parts.append(F.Share(w, a, b, gain, s))
        want += w * (dense(W, a, b, m, s) - W)
    a, b, G = F.combined_factors(parts)
    assert a.shape == (sum(ranks), I)
    V = G[:, None] * (W + b @ a)
    torch.testing.assert_close(V, want, rtol=1e-9, atol=1e-9)
    m = G * (W + b @ a).norm(dim=1)
    torch.testing.assert_close(dense(W, a, b, m, 1.0), want, rtol=1e-9, atol=1e-9)


WEIGHTS = {"maths": 0.7, "code": -0.4, "vera": 1.3, "dvora": 0.5, "lengths": 0.8, "words": 0.6}


@pytest.fixture
def several():
    model = doralib.adapt(make_llama(), CONFIGS["maths"], "maths")
    for name in list(CONFIGS)[1:]:
        doralib.add_adapter(model, name, CONFIGS[name])
    return move(model)


def by_hand(model, weights):
    """W + Σ w (V - W) in float64, as a plain model."""
    plain = doralib.remove(copy.deepcopy(model)).double()
    changes = {}
    for name, weight in weights.items():
        for place, layer in registry.layers_of(model, name).items():
            if isinstance(layer, TrainedCopy):
                change = layer.trained.weight.double() - layer.base_layer.weight.double()
            else:
                W = layer.base.W_OI
                s, (a, b), m = layer.scale, layer.state().factors, layer.lora_magnitude_vector
                change = dense(W, a, b, m, s) - W.double()
            changes[place] = changes.get(place, 0) + weight * change.detach()
    for place, change in changes.items():
        module = plain.get_submodule(place)
        base = open_base(module)
        module.weight.data = base.with_weight(base.W_OI + change).weight.data
    return plain


def test_every_method_together(several, tmp_path):
    want = by_hand(several, WEIGHTS)(ids()).logits
    doralib.add_weighted_adapter(several, WEIGHTS, "all")
    q = registry.layers_of(several, "all")["model.layers.0.self_attn.q_proj"]
    assert q.r == 4 + 3 + 5  # the lengths alone add no rank
    assert doralib.active_adapter(several) == "maths"
    doralib.set_adapter(several, "all")
    got = several(ids()).logits
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
    # as an adapter like any other
    doralib.save_adapter(several, tmp_path)
    again = doralib.load_adapter(make_llama(), tmp_path)
    assert torch.equal(again(ids()).logits, got)
    again(ids(), labels=ids()).loss.backward()
    assert all(p.grad.isfinite().all() for _, p in registry.trainable(again))
    torch.testing.assert_close(doralib.merge(again)(ids()).logits.double(), want, rtol=1e-4, atol=2e-5)


def test_peft_reads_a_combination(several, tmp_path):
    from peft import PeftModel

    weights = {name: WEIGHTS[name] for name in ("maths", "code", "lengths", "dvora", "words")}
    want = by_hand(several, weights)(ids()).logits
    doralib.add_weighted_adapter(several, weights, "all")
    doralib.save_adapter(several, tmp_path, "all")
    twin = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    torch.testing.assert_close(twin(ids()).logits.double(), want, rtol=1e-4, atol=2e-5)


def test_lora_alone_stays_lora(several, tmp_path):
    from peft import PeftModel

    weights = {"code": 1.5, "vera": -0.5}
    want = by_hand(several, weights)(ids()).logits
    doralib.add_weighted_adapter(several, weights, "both")
    assert registry.config_of(several, "both").method == "lora"
    assert all(layer.lora_magnitude_vector is None for layer in registry.layers_of(several, "both").values())
    torch.testing.assert_close(doralib.set_adapter(several, "both")(ids()).logits.double(), want, rtol=1e-4, atol=2e-5)
    doralib.save_adapter(several, tmp_path)
    twin = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    torch.testing.assert_close(twin(ids()).logits.double(), want, rtol=1e-4, atol=2e-5)


def test_one_adapter_with_weight_one_is_itself(several):
    for name in CONFIGS:
        doralib.add_weighted_adapter(several, {name: 1.0}, f"{name}2")
        want = doralib.set_adapter(several, name)(ids()).logits
        torch.testing.assert_close(doralib.set_adapter(several, f"{name}2")(ids()).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_layer(model, tmp_path):
    base, targets, x = of_kind(model)
    model = doralib.adapt(copy.deepcopy(base), DoraConfig(r=2, target_modules=targets), "a")
    doralib.add_adapter(model, "b", DoraConfig(r=3, method="lora", target_modules=targets[:1]))
    move(model)
    doralib.add_weighted_adapter(model, {"a": 0.6, "b": 1.2}, "c")
    doralib.save_adapter(model, tmp_path, "c")
    again = doralib.load_adapter(copy.deepcopy(base), tmp_path)
    got = outputs(doralib.set_adapter(model, "c"), x)
    assert torch.equal(outputs(again, x), got)
    if "OwnLinear" in str(base):
        # its dense weight is 1.05 times what is stored, and cannot be read there
        for place, module in ((place, base.get_submodule(place)) for place in targets):
            module.weight.data *= 1.05
            module.__class__ = nn.Linear
            for name in "ab":
                if place in registry.layers_of(model, name):
                    layer = registry.layers_of(model, name)[place]
                    layer.base = layer.factors.base = open_base(module)
    for place in registry.layers_of(model, "a"):
        module = base.get_submodule(place)
        W = open_base(module).W_OI.detach().double().clone()
        change = 0.6 * (registry.layers_of(model, "a")[place].merged_weight() - W)
        if place in registry.layers_of(model, "b"):
            change = change + 1.2 * (registry.layers_of(model, "b")[place].merged_weight() - W)
        module.weight.data = open_base(module).with_weight(W + change).weight.data
    torch.testing.assert_close(got, outputs(base, x), rtol=1e-4, atol=1e-5)


def small(**changes):
    torch.manual_seed(0)
    model = doralib.adapt(nn.Sequential(nn.Linear(5, 4)), DoraConfig(r=2, target_modules=("0",)), "a")
    return move(doralib.add_adapter(model, "b", DoraConfig(**{"r": 3, "target_modules": ("0",)} | changes)))


def test_rows_that_cannot_be_said_are_refused_by_name():
    model = small()
    layers = {name: registry.layers_of(model, name)["0"] for name in "ab"}
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_magnitude_vector.copy_(layer.cache.norm(layer.a_RI, layer.b_OR, layer.scale, detach=True))
            layer.lora_magnitude_vector[2] *= 2  # gains of 2: W + 0.5 (2 W - W) ... - 1.5 (...) cancels W
    with pytest.raises(DoraError, match=r"cancel whole rows of W and leave a change[\s\S]*0: 1 rows"):
        doralib.add_weighted_adapter(model, {"a": 0.5, "b": -1.5}, "c")
    assert doralib.adapter_names(model) == ("a", "b")
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B[2] = 0
            layer.lora_magnitude_vector[2] = 2 * model[0].weight[2].norm()
    doralib.add_weighted_adapter(model, {"a": 0.5, "b": -1.5}, "c")
    y = doralib.set_adapter(model, "c")(torch.randn(3, 5))
    torch.testing.assert_close(y[:, 2], model[0].bias[2].expand(3))


@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_length_zero(turned):
    torch.manual_seed(0)
    base = nn.Linear(5, 4)
    base.weight.data[1] = 0
    model = doralib.adapt(nn.Sequential(base), DoraConfig(r=2, target_modules=("0",)), "a")
    doralib.add_adapter(model, "b", DoraConfig(r=3, target_modules=("0",)))
    if turned:
        move(model)
    doralib.add_weighted_adapter(model, {"a": 0.5, "b": 0.25}, "c")
    want = base.weight.double()
    for name, weight in {"a": 0.5, "b": 0.25}.items():
        want = want + weight * (registry.layers_of(model, name)["0"].merged_weight() - base.weight)
    c = registry.layers_of(model, "c")["0"]
    torch.testing.assert_close(c.merged_weight().double(), want.detach(), rtol=1e-5, atol=1e-6)
    y = doralib.set_adapter(model, "c")(torch.randn(3, 5))
    y.sum().backward()
    assert y.isfinite().all()
    assert c.lora_A.grad.isfinite().all()
    assert c.lora_B.grad.isfinite().all()


def test_biases_and_whole_modules_are_combined_linearly(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    configs = {
        "a": DoraConfig(r=2, target_modules=("0",), bias="all", modules_to_save=("1",)),
        "b": DoraConfig(r=2, target_modules=("2",), bias="lora_only"),
        "c": DoraConfig(r=2, target_modules=("2",), modules_to_save=("1",)),
    }
    model = doralib.adapt(copy.deepcopy(base), configs.pop("a"), "a")
    for name, config in configs.items():
        doralib.add_adapter(model, name, config)
        doralib.set_adapter(model, name)
        move(model, seed=ord(name))
    weights = {"a": 0.5, "b": -2.0, "c": 1.5}
    states = {name: registry.state_of(model, name).extra for name in weights}
    doralib.add_weighted_adapter(model, weights, "d")
    for key, T in {"0.bias": base[0].bias, "2.bias": base[2].bias, "1.weight": base[1].weight}.items():
        want = T + sum(w * (states[name][key] - T) for name, w in weights.items() if key in states[name])
        torch.testing.assert_close(registry.state_of(model, "d").extra[key], want.detach())
    doralib.save_adapter(model, tmp_path, "d")
    x = torch.randn(4, 5)
    again = doralib.load_adapter(base, tmp_path)
    assert torch.equal(again(x), doralib.set_adapter(model, "d")(x))


def test_refusals(several):
    with pytest.raises(UsageError, match="finite weight"):
        doralib.add_weighted_adapter(several, {}, "x")
    with pytest.raises(UsageError, match="finite weight"):
        doralib.add_weighted_adapter(several, {"maths": float("nan")}, "x")
    with pytest.raises(UsageError, match="no adapter 'math'; did you mean 'maths'"):
        doralib.add_weighted_adapter(several, {"math": 1.0}, "x")
    with pytest.raises(UsageError, match="'code' already"):
        doralib.add_weighted_adapter(several, {"maths": 1.0}, "code")
    doralib.add_adapter(several, "head", DoraConfig(r=2, target_modules=("lm_head",)))
    with pytest.raises(DoraError, match=r"cannot be combined[\s\S]*lm_head"):
        doralib.add_weighted_adapter(several, {"words": 1.0, "head": 1.0}, "x")
    assert doralib.adapter_names(several) == (*CONFIGS, "head")
