"""Putting adapters on models and taking them off; every refusal; PEFT's numbers and PEFT's files."""

import copy
import json

import pytest
import torch
from adapted import ids, move
from safetensors.torch import load_file, save_file
from torch import nn

import doralib
from doralib.adapters import registry
from doralib.adapters.scan import Scan
from doralib.adapters.targets import choose
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.kernels.dropout import Dropout
from doralib.layers.linear import DoraLinear
from doralib.layers.wrapper import TrainedCopy

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def config(**changes):
    return DoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | changes)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama[0]


methods = pytest.mark.parametrize("method", ["dora", "lora"])


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapt_changes_nothing_and_freezes_the_rest(model, method, dtype):
    model.to(dtype)
    before = model(ids()).logits
    assert doralib.adapt(model, config(method=method)) is model
    assert torch.equal(model(ids()).logits, before)
    trained = {name.rpartition(".")[2] for name, _ in registry.trainable(model)}
    assert trained == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if method == "dora" else set())
    assert all(p.dtype == torch.float32 for _, p in registry.trainable(model))


def test_full_fine_tuning_is_the_third_method(model):
    doralib.adapt(model, config(method="full", target_modules=None))
    assert all(p.requires_grad for p in model.parameters())
    doralib.remove(model)
    doralib.adapt(model, config(method="full", target_modules=("q_proj",)))
    assert {name for name, _ in registry.trainable(model)} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }


@methods
def test_disable_enable_remove_merge(model, method):
    before = model(ids()).logits
    trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
    doralib.adapt(model, config(method=method, modules_to_save=("lm_head",), bias="none"))
    adapted = move(model)(ids()).logits
    assert (adapted - before).abs().max() > 0.01
    with doralib.disabled(model):
        assert torch.equal(model(ids()).logits, before)
    assert torch.equal(model(ids()).logits, adapted)
    twin = doralib.merge(copy.deepcopy(model))
    torch.testing.assert_close(twin(ids()).logits, adapted, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, DoraLinear | TrainedCopy) for m in twin.modules())
    doralib.remove(model)
    assert torch.equal(model(ids()).logits, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable_before


def test_disabled_is_over_after_an_error(model):
    move(doralib.adapt(model, config()))
    want = model(ids()).logits
    with pytest.raises(ZeroDivisionError), doralib.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(ids()).logits, want)


def test_trained_biases_are_switched_and_restored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    before = model(x)
    doralib.adapt(model, DoraConfig(r=2, target_modules=("0",), bias="all"))
    assert sum(name.endswith("bias") for name, _ in registry.trainable(model)) == 2
    adapted = move(model)(x)
    with doralib.disabled(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), adapted)
    adapted.sum().backward()
    assert model[0].base_layer.bias.grad is not None
    assert set(registry.state_of(model).extra) == {"0.bias", "2.bias"}
    assert torch.equal(doralib.remove(model)(x), before)


# targets


def test_all_linear_leaves_the_head_alone(model):
    chosen = choose(Scan(model), config(target_modules="all-linear"))
    assert len(chosen) == 14
    assert "lm_head" not in chosen
    assert "lm_head" in Scan(model).shapes


def test_regular_expressions_patterns_and_exclusions(model):
    doralib.adapt(
        model,
        config(
            target_modules=r".*layers\.\d+\..*(q|up)_proj",
            exclude_modules=r".*layers\.0\..*up_proj",
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
            alpha_pattern={"q_proj": 10},
        ),
    )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, DoraLinear)}
    assert {name: (m.r, m.scale) for name, m in layers.items()} == {
        "model.layers.0.self_attn.q_proj": (2, 5.0),
        "model.layers.1.self_attn.q_proj": (2, 5.0),
        "model.layers.1.mlp.up_proj": (5, 6 / 5),
    }


def test_rslora_scale(model):
    doralib.adapt(model, config(use_rslora=True))
    assert model.model.layers[0].self_attn.q_proj.scale == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("q_porj", "v_proj")}, r"'q_porj' this model has: q_proj \(x2\)"),
        ({"target_modules": "nothing.*"}, "no module's whole name matches"),
        ({"target_modules": ("self_attn",)}, "not a linear layer; inside it: q_proj, k_proj, v_proj, o_proj"),
        ({"target_modules": ("input_layernorm",)}, "is a LlamaRMSNorm"),
        ({"exclude_modules": ("w_proj",)}, "exclude_modules: no module is named 'w_proj'"),
        ({"modules_to_save": ("lm_haed",)}, "lm_head"),
        ({"modules_to_save": ("q_proj",)}, "is in target_modules too"),
        ({"modules_to_save": ("mlp",)}, r"layers\.0\.mlp is trained whole, and model\.layers\.0\.mlp\.up_proj"),
        ({"exclude_modules": TARGETS}, "no layer is left"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refusals_change_nothing(model, changes, message):
    before = model.state_dict().keys()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UsageError, match=message):
        doralib.adapt(model, config(**changes))
    assert model.state_dict().keys() == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_tied_bypassed_and_adapted_layers_are_refused(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UsageError, match=r"lm_head is tied to model\.embed_tokens"):
        doralib.adapt(model, config(target_modules=("lm_head",)))
    with pytest.raises(UsageError, match="would break the tie"):
        doralib.adapt(model, config(modules_to_save=("lm_head",)))
    doralib.adapt(model, config())
    with pytest.raises(UsageError, match="adapted already"):
        doralib.adapt(model, config())
    with pytest.raises(UsageError, match="reads its weight without calling it"):
        doralib.adapt(nn.TransformerEncoderLayer(8, 2), config(target_modules=("out_proj",)))


def test_a_refusal_by_a_layer_itself_changes_nothing():
    """VeRA takes linear layers only, which it finds out when it is made."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv1d(7, 3, 2))
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(DoraError, match="linear layers only"):
        doralib.adapt(model, DoraConfig(method="vera", r=2, target_modules=("0", "1")))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model[0]) is nn.Linear


def test_bias_training_needs_float32():
    model = nn.Sequential(nn.Linear(5, 7)).to(torch.bfloat16)
    with pytest.raises(UsageError, match="load the model in float32"):
        doralib.adapt(model, DoraConfig(r=2, target_modules=("0",), bias="lora_only"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r: input should be greater than or equal to 1, got 0"),
        ({"lora_droput": 0.1}, "did you mean 'lora_dropout'"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"method": "dura", "lora_alpha": -1}, "2 problems"),
    ],
    ids=str,
)
def test_config_is_checked_completely(values, message):
    with pytest.raises(UsageError, match=message):
        DoraConfig(**values)


# settings that must not change the numbers


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_numbers(model, reentrant):
    move(doralib.adapt(model, config(lora_dropout=0.0))).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in registry.trainable(model)})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-6, atol=1e-8)


# the numbers and the files of PEFT


def peft_twin(model, **changes):
    """PEFT's adapter on a copy of the model, moved from its start."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "use_dora": True, "lora_dropout": 0.0}
    twin = get_peft_model(copy.deepcopy(model), LoraConfig(**settings | changes)).eval()
    return move(twin)


CASES = {
    "dora": {},
    "lora": {"use_dora": False},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_files_written_by_peft_load_here(model, tmp_path, changes):
    twin = peft_twin(model, **changes)
    twin.save_pretrained(tmp_path)
    doralib.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids()).logits, twin(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_files_written_here_load_in_peft(model, tmp_path, changes):
    from peft import PeftModel

    plain, untouched = copy.deepcopy(model), copy.deepcopy(model)
    changes = {"method": "dora" if changes.get("use_dora", True) else "lora"} | changes
    changes.pop("use_dora", None)
    move(doralib.adapt(model, config(**changes)))
    doralib.save_adapter(model, tmp_path)
    twin = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(twin(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-5)
    back = doralib.load_adapter(untouched, tmp_path)
    torch.testing.assert_close(back(ids()).logits, model(ids()).logits, rtol=0, atol=0)
    assert registry.config_of(back) == registry.config_of(model)


def test_biases_in_pefts_files(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=20, n_embd=12, n_layer=2, n_head=2)).eval()
    from peft import LoraConfig, PeftModel, get_peft_model

    for bias in ("lora_only", "all"):
        settings = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], use_dora=True, bias=bias, fan_in_fan_out=True)
        twin = move(get_peft_model(copy.deepcopy(model), settings).eval())
        twin.save_pretrained(tmp_path / bias)
        ours = doralib.load_adapter(copy.deepcopy(model), tmp_path / bias)
        want = twin(ids()).logits
        torch.testing.assert_close(ours(ids()).logits, want, rtol=1e-4, atol=1e-5)
        doralib.save_adapter(ours, tmp_path / f"{bias}-back")
        back = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"{bias}-back").eval()
        torch.testing.assert_close(back(ids()).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", [True, False])
def test_gradients_equal_pefts(model, tmp_path, use_dora):
    twin = peft_twin(model, use_dora=use_dora)
    twin.save_pretrained(tmp_path)
    doralib.load_adapter(model, tmp_path)
    for each in (model, twin):
        each(ids(), labels=ids()).loss.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    checked = 0
    for name, p in registry.trainable(model):
        layer, _, field = name.rpartition(".")
        key = f"base_model.model.{layer}.{field}.default.weight"
        torch.testing.assert_close(p.grad, theirs[key], rtol=1e-3, atol=1e-6)
        checked += 1
    assert checked == len(theirs) == 8 * (2 + use_dora)


def test_exact_dropout_equals_pefts_with_the_same_mask(monkeypatch):
    """One layer in training mode, the mask fixed: PEFT's output and gradients."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = nn.Linear(10, 13)
    settings = LoraConfig(r=3, lora_alpha=4, lora_dropout=0.4, use_dora=True, target_modules=["x"])
    theirs = Linear(copy.deepcopy(base), "default", config=settings, r=3, lora_alpha=4)
    move(theirs)
    ours = DoraLinear(base, 3, 4 / 3, DoraConfig(r=3, lora_alpha=4, lora_dropout=0.4, dropout_mode="exact"))
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
        ours.lora_B.copy_(theirs.lora_B["default"].weight)
        ours.lora_magnitude_vector.copy_(theirs.lora_magnitude_vector["default"].weight)
        base.bias.copy_(theirs.base_layer.bias)
        base.weight.copy_(theirs.base_layer.weight)
    keep = torch.rand(7, 10) > 0.4

    class Fixed(nn.Module):
        def forward(self, x):
            return x * keep / 0.6

    theirs.lora_dropout["default"] = Fixed()
    monkeypatch.setattr(ours, "_draw_dropout", lambda x: Dropout(keep, 0.4, True))
    x, dy = torch.randn(7, 10), torch.randn(7, 13)
    results = []
    for layer in (ours.train(), theirs.train()):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        results.append([y.detach(), leaf.grad])
    results[0] += [ours.lora_A.grad, ours.lora_B.grad, ours.lora_magnitude_vector.grad]
    results[1] += [
        theirs.lora_A["default"].weight.grad,
        theirs.lora_B["default"].weight.grad,
        theirs.lora_magnitude_vector["default"].weight.grad,
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_adapter_from_peft_goes_on_in_exact_dropout(model, tmp_path):
    peft_twin(model, lora_dropout=0.3).save_pretrained(tmp_path)
    doralib.load_adapter(model, tmp_path)
    assert registry.config_of(model).dropout_mode == "exact"
    assert model.model.layers[0].self_attn.q_proj.exact_dropout


def test_unknown_settings_are_taken_and_unknown_tensors_are_not(model, tmp_path):
    peft_twin(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"a_field_of_tomorrow": 3}))
    doralib.load_adapter(copy.deepcopy(model), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn"
    del tensors[f"{layer}.q_proj.lora_magnitude_vector"], tensors[f"{layer}.v_proj.lora_B.weight"]
    tensors[f"{layer}.q_proj.lora_C.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DoraError) as error:
        doralib.load_adapter(model, tmp_path)
    text = str(error.value)
    assert "3 problems" in text
    assert "q_proj: lacks lora_magnitude_vector" in text
    assert "v_proj: lacks lora_B.weight" in text
    assert "lora_C" in text


def test_a_magnitude_in_a_lora_adapter_is_refused(model, tmp_path):
    peft_twin(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": False}))
    with pytest.raises(DoraError, match="use_dora is false"):
        doralib.load_adapter(model, tmp_path)


def test_an_adapter_of_another_model_is_refused_with_every_layer(tmp_path):
    from conftest import make_llama

    doralib.save_adapter(doralib.adapt(make_llama(), config()), tmp_path)
    wide = make_llama(hidden_size=40)
    with pytest.raises(DoraError, match=r"shapes differ[\s\S]*q_proj: \(32, 32\) in the adapter, \(40, 40\)"):
        doralib.load_adapter(wide, tmp_path)
    assert not hasattr(wide, "_doralib")
    with pytest.raises(DoraError, match=r"has no[\s\S]*layers\.1\.self_attn\.q_proj"):
        doralib.load_adapter(make_llama(num_hidden_layers=1), tmp_path)
    other = doralib.adapt(make_llama(), config(target_modules=("q_proj",)))
    with pytest.raises(DoraError, match=r"v_proj\.A: the model has no such tensor"):
        doralib.load_adapter(other, tmp_path)


def test_missing_adapter_and_model_without_one(model, tmp_path):
    with pytest.raises(UsageError):
        doralib.load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no adapter"):
        doralib.save_adapter(model, tmp_path)
    with pytest.raises(UsageError, match="save_pretrained"):
        doralib.save_adapter(doralib.adapt(model, config(method="full", target_modules=None)), tmp_path)
