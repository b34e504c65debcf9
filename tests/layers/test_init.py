"""PiSSA and OLoRA start as a part of the weight: nothing changes, PEFT's numbers, files for the base as it is."""

import copy

import peft
import pytest
import torch
from adapted import ids, move
from conftest import make_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import doralib
from doralib.adapters import registry
from doralib.adapters.load import load_into
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.layers.convolution import DoraConv
from doralib.layers.linear import DoraLinear

O, I, N, R = 13, 10, 7, 3
TARGETS = ("q_proj", "v_proj", "down_proj")
starts = pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
methods = pytest.mark.parametrize("method", ["dora", "lora"])


class Hidden(nn.Module):
    """A storage that nobody registered: its weight cannot be read, only used."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed, self.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias

    def forward(self, x):
        return x @ self.packed + self.bias


def conv1d():
    module = Conv1D(O, I)
    nn.init.normal_(module.weight)
    return module


BASES = {
    "linear": (lambda: nn.Linear(I, O), (N, I)),
    "conv1d": (conv1d, (N, I)),
    "hidden": (lambda: Hidden(nn.Linear(I, O)), (N, I)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
}
bases = pytest.mark.parametrize("kind", BASES)


def make(kind="linear", dtype=torch.float64, **changes):
    torch.manual_seed(3)
    build, shape = BASES[kind]
    module = build().to(dtype)
    if kind in ("linear", "convolution"):
        with torch.no_grad():
            module.weight[1] = 0
    config = DoraConfig(**{"r": R, "lora_alpha": 4, "init_lora_weights": "pissa"} | changes)
    cls = DoraLinear if len(shape) == 2 else DoraConv
    return cls(module, R, config.scale_of("layer"), config), torch.randn(shape, dtype=torch.float64).to(dtype)


def weight(layer):
    """The rows of the frozen weight, as the base gives them."""
    return layer.base.dense_rows(torch.arange(layer.out_features))


@bases
@starts
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind, start, method, dtype):
    layer, x = make(kind, dtype, init_lora_weights=start, method=method)
    before = weight(layer).clone()
    assert layer.lora_B.abs().sum() > 0
    for grad in (torch.enable_grad, torch.no_grad):
        with grad():
            assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(weight(layer), before)


def test_it_changes_nothing_where_the_norm_is_summed_densely():
    """At this rank the norm is a dense sweep: A and B are not zero, so the layer cannot see that it is fresh."""
    layer = DoraLinear(nn.Linear(40, 40), 38, 2.0, DoraConfig(r=38, init_lora_weights="pissa"))
    x = torch.randn(N, 40)
    assert torch.equal(layer(x), layer.base_layer(x))


@bases
def test_it_starts_as_the_principal_part_of_the_weight(kind):
    layer, _ = make(kind)
    A, B, s = layer.lora_A.flatten(1), layer.lora_B.flatten(1), layer.scale
    U, S, V = torch.linalg.svd(weight(layer), full_matrices=False)
    torch.testing.assert_close(s * B @ A, (U[:, :R] * S[:R]) @ V[:R])
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
    assert not B[weight(layer).norm(dim=1) == 0].any()
    assert [n for n, p in layer.named_parameters() if not p.requires_grad and "base" not in n] == ["start_A", "start_B"]


@bases
@methods
@pytest.mark.parametrize("detach", [True, False])
def test_adapted_equals_the_formula_on_the_residual_and_its_gradients(kind, method, detach):
    """PiSSA as it is written: the weight without its principal part, frozen, plus s B A."""
    layer, x = make(kind, method=method, detach_norm=detach)
    W, s = weight(layer).clone(), layer.scale
    residual = W - s * layer.lora_B.detach().flatten(1) @ layer.lora_A.detach().flatten(1)
    move(layer, 0.3)
    V = residual + s * layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)
    if method == "dora":
        n = V.norm(dim=1)
        V = (layer.lora_magnitude_vector / (n.detach() if detach else n))[:, None] * V
    if kind == "hidden":
        want = x @ V.T + layer.bias
    else:
        want = torch.func.functional_call(layer.base_layer, {"weight": layer.base._stored(V)}, (x,))
        torch.testing.assert_close(layer.merged()(x), want)
    torch.testing.assert_close(layer(x), want)
    leaves, dy = [p for n, p in layer.named_parameters() if n.startswith("lora")], torch.randn_like(want)
    grads = torch.autograd.grad(layer(x), leaves, dy), torch.autograd.grad(want, leaves, dy)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("mode", ["adapter", "exact"])
def test_dropout_falls_on_the_change_and_never_on_the_principal_part(mode):
    layer, x = make(lora_dropout=0.5, dropout_mode=mode)
    assert torch.equal(layer.train()(x), layer.base_layer(x))


@methods
def test_zero_rows_stay_zero(method):
    layer, x = make(method=method)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        (layer(x) - 1).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)
        optimizer.step()
    if method == "dora":
        assert torch.equal(layer(x)[:, 1], layer.bias[1].expand(N))


def peft_twin(start, **changes):
    """PEFT's model and ours from the same A and B."""
    plain = make_llama().float()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "init_lora_weights": start} | changes
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**settings))
    method = "dora" if changes.get("use_dora") else "lora"
    config = DoraConfig(method=method, r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start)
    return plain, theirs, doralib.adapt(copy.deepcopy(plain), config)


def pairs(ours, theirs):
    for name, layer in ours.named_modules():
        if isinstance(layer, DoraLinear):
            yield layer, theirs.get_submodule(f"base_model.model.{name}")


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_training_goes_as_in_peft(start, use_dora):
    """The same factors and, over several steps of AdamW, the same losses: float32 rounds PEFT's residual little."""
    _, theirs, ours = peft_twin(start, use_dora=use_dora)
    for layer, other in pairs(ours, theirs):
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, B @ A, atol=1e-5, rtol=1e-4)
        # singular vectors have no sign
        signs = (layer.lora_A * A).sum(1).sign()
        torch.testing.assert_close(layer.lora_A, signs[:, None] * A, atol=1e-4, rtol=1e-3)
    curves = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        curve = []
        for _ in range(6):
            loss = model(ids(2), labels=ids(2)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)
    assert curves[0][-1] < curves[0][0] - 0.1


def test_where_peft_is_not_right():
    """In bfloat16 PEFT's start rounds the residual, so that its fresh model is another one; disabled, it is broken."""
    plain = make_llama().to(torch.bfloat16)
    want = plain(ids()).logits
    config = peft.LoraConfig(r=4, target_modules=list(TARGETS), init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    ours = doralib.adapt(copy.deepcopy(plain), DoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
    assert torch.equal(ours(ids()).logits, want)
    assert not torch.equal(theirs(ids()).logits, want)
    with doralib.disabled(move(ours, 0.3)), theirs.disable_adapter():
        assert torch.equal(ours(ids()).logits, want)
        assert (theirs(ids()).logits - want).abs().max() > 0.1


@starts
@methods
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_is_a_plain_adapter_of_the_base_as_it_is(start, method, rslora, tmp_path):
    plain = make_llama()
    plain.save_pretrained(tmp_path / "base")
    before = plain(ids()).logits
    config = DoraConfig(
        method=method, r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start, use_rslora=rslora,
        rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 5.0},
    )  # fmt: skip
    model = doralib.adapt(copy.deepcopy(plain), config)
    assert torch.equal(model(ids()).logits, before)
    want = move(model)(ids()).logits
    assert (want - before).abs().max() > 0.05
    doralib.save_adapter(model, tmp_path / "adapter")
    close = {"atol": 2e-5, "rtol": 1e-4}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(ids()).logits, want, **close)
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(again(ids()).logits, want, **close)
    assert again.model.layers[0].self_attn.q_proj.r == 8
    assert again.model.layers[0].self_attn.v_proj.r == 4
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(type(plain).from_pretrained(tmp_path / "out")(ids()).logits, want, **close)
    torch.testing.assert_close(doralib.merge(copy.deepcopy(model))(ids()).logits, want, **close)
    assert torch.equal(doralib.remove(model)(ids()).logits, before)


def test_states_go_from_model_to_model_and_files_do_not(tmp_path):
    config = DoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_1")
    other = make_llama()
    model = move(doralib.adapt(make_llama(), config), 0.3)
    doralib.adapt(other, config)  # from other random numbers
    assert not torch.equal(*(m.model.layers[0].self_attn.q_proj.start_A for m in (model, other)))
    load_into(other, registry.state_of(model))
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    doralib.save_adapter(model, tmp_path)
    with pytest.raises(DoraError, match=r"'pissa_niter_1'.*load it into a plain model"):
        doralib.load_adapter(other, tmp_path)


def test_pefts_unconverted_file_is_refused(tmp_path):
    _, theirs, _ = peft_twin("pissa", use_dora=True)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(DoraError, match=r"init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion"):
        doralib.load_adapter(make_llama(), tmp_path)


def test_pefts_converted_file_is_read(tmp_path):
    _, theirs, _ = peft_twin("pissa")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    want = move(theirs, 0.3)(ids()).logits
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = doralib.load_adapter(make_llama(), tmp_path / "plain")
    torch.testing.assert_close(ours(ids()).logits, want, atol=1e-4, rtol=1e-3)


def test_a_cast_model_keeps_the_start_in_float32():
    model = doralib.adapt(make_llama(), DoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.start_A.detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.start_A, before)
    plain = make_llama().to(torch.bfloat16)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert (model(ids()).logits - plain(ids()).logits).abs().max() < 0.02


def test_starts_are_checked():
    for wrong in ("pizza", "pissa_niter_", "eva"):
        with pytest.raises(UsageError, match="init_lora_weights"):
            DoraConfig(init_lora_weights=wrong)
    with pytest.raises(UsageError, match="method 'vera' has no place for 'pissa'"):
        DoraConfig(method="vera", init_lora_weights="pissa")
    model = nn.Sequential(nn.Linear(4, 9), nn.Embedding(5, 4)).requires_grad_(True)
    with pytest.raises(DoraError, match="r is 5, but a weight of 9x4 has 4 directions"):
        doralib.adapt(model, DoraConfig(r=5, target_modules=("0",), init_lora_weights="pissa"))
    with pytest.raises(DoraError, match="an embedding has no start 'olora'"):
        doralib.adapt(model, DoraConfig(r=2, target_modules=("1",), init_lora_weights="olora"))
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_is_decomposed_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4096, 4096))
    model = doralib.adapt(net, DoraConfig(r=8, target_modules=("0",), init_lora_weights="pissa"))
    assert sum(p.numel() for _, p in registry.trainable(model)) == 8 * 2 * 4096 + 4096


@pytest.mark.parametrize("start", ["kaiming", "pissa", "olora"])
def test_a_layer_that_is_filled_with_nothing_is_the_base_layer(start):
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 5), torch.randn(3, 6)
    want = linear(x)
    layer = DoraLinear(linear, 2, 1.5, DoraConfig(r=2, init_lora_weights=start))
    move(layer)
    assert not torch.allclose(layer(x), want)
    layer.fill(None)
    torch.testing.assert_close(layer(x), want)
