"""The methods beside DoRA and LoRA, magnitudes alone among them."""

import copy

import peft
import pytest
import torch
from adapted import ids, move
from conftest import make_llama
from torch import nn

import doralib
from doralib.adapters import registry
from doralib.adapters.load import load_into
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.kernels.dropout import zeroed
from doralib.layers.magnitude import DoraMagnitude

QKV, REST = ("q_proj", "k_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")


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
    dropped = zeroed(x, layer._draw_dropout(x).drawn) / 0.5 if mode == "exact" else x
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
        load_into(model, registry.state_of(other))


def test_magnitude_modules_are_checked():
    with pytest.raises(UsageError, match="go with method dora"):
        config(method="lora")
    with pytest.raises(UsageError, match="'o_prog'"):
        doralib.adapt(make_llama(), config(magnitude_modules=("o_prog",)))
    with pytest.raises(UsageError, match="in magnitude_modules and in target_modules"):
        doralib.adapt(make_llama(), config(magnitude_modules=("q_proj",)))
    model = doralib.adapt(make_llama(), config(target_modules="all-linear"))
    assert type(model.model.layers[1].self_attn.q_proj) is doralib.layers.linear.DoraLinear
    assert type(model.model.layers[1].self_attn.o_proj) is DoraMagnitude
    assert torch.equal(doralib.remove(model)(ids()).logits, make_llama()(ids()).logits)


banks = pytest.mark.parametrize("method", ["vera", "dvora"])


def banked(method, **changes):
    settings = {"method": method, "r": 24, "target_modules": (*QKV, "down_proj"), "projection_prng_key": 5}
    return DoraConfig(**settings | changes)


@banks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_bank_changes_nothing_bit_for_bit(method, dtype):
    model = make_llama().to(dtype)
    before = model(ids()).logits
    doralib.adapt(model, banked(method))
    assert torch.equal(model(ids()).logits, before)
    magnitude = {"lora_magnitude_vector"} if method == "dvora" else set()
    trained = {name.rpartition(".")[2] for name, _ in registry.trainable(model)}
    assert trained == {"vera_lambda_d", "vera_lambda_b"} | magnitude


@banks
@pytest.mark.parametrize("detach", [True, False])
def test_a_bank_equals_the_formula_and_its_gradients(method, detach):
    net = nn.ModuleList([nn.Linear(6, 5), nn.Linear(9, 4, bias=False)]).double()
    with torch.no_grad():
        net[0].weight[1] = 0
    doralib.adapt(net, banked(method, target_modules=("0", "1"), detach_norm=detach))
    move(net, 0.4)
    for layer, x in ((net[0], torch.randn(3, 6).double()), (net[1], torch.randn(3, 9).double())):
        O, I = layer.base_layer.weight.shape
        A, B = layer.bank.A[:, :I].double(), layer.bank.B[:O].double()
        V = layer.base_layer.weight + torch.diag(layer.vera_lambda_b) @ B @ torch.diag(layer.vera_lambda_d) @ A
        m = layer.lora_magnitude_vector
        if m is not None:
            V = (m / (V.norm(dim=1).detach() if detach else V.norm(dim=1)))[:, None] * V
        want = nn.functional.linear(x, V, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer.merged()(x), want)
        leaves, dy = [p for p in layer.parameters() if p.requires_grad], torch.randn_like(want)
        grads = torch.autograd.grad(layer(x), leaves, dy), torch.autograd.grad(want, leaves, dy)
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


@banks
def test_a_bank_saves_loads_merges(method, tmp_path):
    plain = make_llama()
    plain.save_pretrained(tmp_path / "base")
    model = move(doralib.adapt(copy.deepcopy(plain), banked(method)))
    doralib.save_adapter(model, tmp_path / "adapter")
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    stored = type(plain).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(stored(ids()).logits, model(ids()).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(doralib.merge(copy.deepcopy(model))(ids()).logits, stored(ids()).logits)
    assert torch.equal(doralib.remove(model)(ids()).logits, plain(ids()).logits)
    other = doralib.adapt(copy.deepcopy(plain), banked(method, projection_prng_key=6))
    with pytest.raises(DoraError, match="random A and B"):
        doralib.load_adapter(other, tmp_path / "adapter")


def test_a_bank_is_the_same_after_a_cast():
    model = doralib.adapt(make_llama(), banked("dvora"))
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.bank.A.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.bank.A, before)
    assert layer.vera_lambda_d.dtype == torch.float32


def test_peft_reads_vera_and_refuses_dvora(tmp_path):
    plain = make_llama()
    model = move(doralib.adapt(copy.deepcopy(plain), banked("vera")))
    doralib.save_adapter(model, tmp_path / "vera")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "vera").eval()
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    doralib.save_adapter(doralib.adapt(copy.deepcopy(plain), banked("dvora")), tmp_path / "dvora")
    with pytest.raises(KeyError, match="DVORA"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "dvora")


def test_vera_trains_as_pefts():
    """The gradients of d and b, and the losses of three steps."""
    plain = make_llama()
    ours = doralib.adapt(copy.deepcopy(plain), banked("vera", r=8, lora_dropout=0.0)).train()
    settings = peft.VeraConfig(r=8, target_modules=[*QKV, "down_proj"], projection_prng_key=5, d_initial=0.1)
    theirs = peft.get_peft_model(copy.deepcopy(plain), settings).train()
    losses = []
    for model in (ours, theirs):
        vectors = sorted((n.split("model.layers.")[1].replace(".default", ""), p) for n, p in registry.trainable(model))
        optimizer = torch.optim.AdamW([p for _, p in vectors], lr=0.05)
        for _ in range(3):
            loss = model(ids(), labels=ids()).loss
            loss.backward()
            losses.append([loss.item(), *((n, p.grad.clone()) for n, p in vectors)])
            optimizer.step()
            optimizer.zero_grad()
    for mine, his in zip(losses[:3], losses[3:], strict=True):
        assert mine[0] == pytest.approx(his[0], rel=1e-5)
        for (name, grad), (its, other) in zip(mine[1:], his[1:], strict=True):
            assert name == its
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-6)
    assert losses[2][0] < losses[0][0]


def test_banks_are_checked():
    with pytest.raises(UsageError, match="rank_pattern: method 'vera' has no place") as error:
        banked("vera", rank_pattern={"q_proj": 3}, modules_to_save=("lm_head",), bias="all")
    assert "modules_to_save" in str(error.value)
    assert "bias" in str(error.value)
    with pytest.raises(UsageError, match="go with method dora"):
        banked("dvora", magnitude_modules=("o_proj",))
    with pytest.raises(UsageError, match="loraplus_lr_ratio: method 'dvora' trains no B"):
        banked("dvora", loraplus_lr_ratio=4)
    with pytest.raises(DoraError, match="linear layers only"):
        doralib.adapt(nn.Sequential(nn.Conv1d(3, 4, 2)), banked("vera", target_modules=("0",)))


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(512, 8), lambda: nn.Conv2d(128, 8, 2)], ids=["linear", "conv"])
def test_starts(start, build):
    """The spread that PEFT's own start has, and nothing changed."""
    settings = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=start == "kaiming" or start)
    theirs = peft.get_peft_model(nn.Sequential(build()), settings).base_model.model[0].lora_A["default"].weight
    model = doralib.adapt(nn.Sequential(build()), DoraConfig(r=16, target_modules=("0",), init_lora_weights=start))
    assert model[0].lora_A.shape == theirs.shape
    A, theirs = model[0].lora_A.detach(), theirs.detach()
    assert A.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert (A.abs().max() / A.std() > 2.5) == (start == "gaussian")
    assert not model[0].lora_B.any()
