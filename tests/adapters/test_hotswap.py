"""Another adapter's values in a loaded one's place: its numbers, what does not fit, and no compilation."""

import pytest
import torch
from adapted import ids, move
from adapters.test_multiple import CONFIGS
from conftest import make_llama
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import doralib
from doralib import DoraConfig, DoraError
from doralib.adapters import registry

TARGETS = ("q_proj", "v_proj", "up_proj")
SLOT = DoraConfig(r=6, lora_alpha=12, target_modules=TARGETS)
GIVEN = {
    "same rank, same scale": DoraConfig(r=6, lora_alpha=12, target_modules=TARGETS),
    "smaller rank, scale": DoraConfig(r=4, lora_alpha=3, target_modules=TARGETS, rank_pattern={"v_proj": 1}),
    "fewer layers": DoraConfig(r=2, lora_alpha=8, target_modules=("v_proj",)),
    "lora": DoraConfig(method="lora", r=3, lora_alpha=3, target_modules=TARGETS),
    "lengths alone": DoraConfig(r=2, target_modules=("v_proj",), magnitude_modules=("q_proj",)),
    "dvora": DoraConfig(method="dvora", r=5, target_modules=("q_proj",)),
}


def saved(tmp_path, config, seed=0):
    """A moved adapter's folder and its model."""
    model = move(doralib.adapt(make_llama(), config), seed=seed)
    doralib.save_adapter(model, tmp_path / str(seed))
    return tmp_path / str(seed), model


@pytest.mark.parametrize("config", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("beside", [False, True])
def test_the_numbers_are_the_new_adapters(tmp_path, config, beside):
    folder, want = saved(tmp_path, config)
    model = move(doralib.adapt(make_llama(), SLOT), seed=5)
    if beside:
        doralib.add_adapter(model, "other", CONFIGS["code"])
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    scales = {name: layer.scale for name, layer in registry.layers_of(model, "default").items()}
    for _ in range(2):
        assert doralib.hotswap_adapter(model, folder) is model
        torch.testing.assert_close(model(ids()).logits, want(ids()).logits, rtol=1e-5, atol=1e-5)
    assert before == {name: (id(p), p.shape) for name, p in model.named_parameters()}
    assert scales == {name: layer.scale for name, layer in registry.layers_of(model, "default").items()}
    doralib.save_adapter(model, tmp_path / "back")
    again = doralib.load_adapter(make_llama(), tmp_path / "back")
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_powers_of_two_and_equal_scales_are_exact(tmp_path):
    folder, want = saved(tmp_path, DoraConfig(r=3, lora_alpha=12, target_modules=TARGETS))
    model = doralib.hotswap_adapter(move(doralib.adapt(make_llama(), SLOT), seed=5), folder)
    for name, layer in registry.layers_of(model, "default").items():
        theirs = registry.state_of(want).layers[name]
        assert torch.equal(layer.lora_B[:, :3] * layer.scale, theirs.b_OR * theirs.scale)
        assert not layer.lora_B[:, 3:].any()
        assert not layer.lora_A[3:].any()


def test_layers_that_the_file_lacks_are_the_base_models(tmp_path):
    folder, _ = saved(tmp_path, DoraConfig(r=2, target_modules=("v_proj",)))
    model = move(doralib.adapt(make_llama(), SLOT), seed=5)
    doralib.hotswap_adapter(model, folder)
    q = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    assert torch.equal(q(x), q.base_layer(x))
    assert not q.lora_B.any()


def test_whole_modules_and_biases(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))

    config = DoraConfig(r=2, target_modules=("0", "2"), bias="lora_only", modules_to_save=("1",))
    x = torch.randn(4, 5)
    model = doralib.adapt(base(), config)
    doralib.add_adapter(model, "other", config)
    move(model, seed=4)
    other = doralib.set_adapter(model, "other")(x)
    for seed, changes in enumerate(({}, {"bias": "none"}, {"modules_to_save": ()})):
        one = move(doralib.adapt(base(), config.model_copy(update=changes)), seed=seed)
        doralib.save_adapter(one, tmp_path / str(seed))
        doralib.hotswap_adapter(model, tmp_path / str(seed), "default")
        assert torch.equal(model(x), other)
        torch.testing.assert_close(doralib.set_adapter(model, "default")(x), one(x))
        doralib.set_adapter(model, "other")
    move(doralib.set_adapter(model, "default"), seed=8)
    doralib.hotswap_adapter(model, tmp_path / "0")
    torch.testing.assert_close(model(x), doralib.load_adapter(base(), tmp_path / "0")(x))


@pytest.mark.parametrize(
    ("slot", "given", "message"),
    [
        ({}, {"r": 7}, r"q_proj: rank 7 is larger than the loaded 6"),
        ({"method": "lora"}, {}, r"q_proj: has a magnitude, and the loaded adapter has none"),
        ({}, {"target_modules": (*TARGETS, "o_proj")}, r"o_proj: default has no such layer"),
        ({}, {"modules_to_save": ("lm_head",)}, r"lm_head\.weight: default has no such tensor"),
        ({"target_modules": ("v_proj",), "magnitude_modules": ("q_proj",)}, {"target_modules": ("q_proj",)}, "lengths"),
        ({"method": "dvora"}, {"method": "dvora", "projection_prng_key": 1}, "random A and B"),
        ({"method": "dvora"}, {}, "random matrices"),
        ({"init_lora_weights": "pissa"}, {}, "began as a part of the weight"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path, slot, given, message):
    folder, _ = saved(tmp_path, SLOT.model_copy(update=given))
    model = move(doralib.adapt(make_llama(), SLOT.model_copy(update=slot)), seed=5)
    before = model(ids()).logits
    with pytest.raises(DoraError, match=message):
        doralib.hotswap_adapter(model, folder)
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_model_is_not_compiled_again(tmp_path, grad):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    model = doralib.adapt(base(), DoraConfig(r=4, lora_alpha=8, target_modules=("0", "2")), "slot")
    doralib.add_adapter(model, "other", DoraConfig(method="lora", r=2, target_modules=("2",)))
    move(model, seed=5)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, backend=counter), torch.randn(6, 5)

    def same(want):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), want(x), rtol=1e-5, atol=1e-5)

    for name in ("slot", "other", None):
        doralib.set_adapter(model, name)
        same(model)
    assert counter.frame_count == 3
    for name in ("other", "slot", None, "slot"):
        doralib.set_adapter(model, name)
        same(model)
    for seed, changes in enumerate(
        ({"r": 4}, {"r": 2, "lora_alpha": 3}, {"target_modules": ("0",)}, {"method": "lora"})
    ):
        one = move(doralib.adapt(base(), DoraConfig(**{"r": 3, "target_modules": ("0", "2")} | changes)), seed=seed)
        doralib.save_adapter(one, tmp_path / str(seed))
        doralib.hotswap_adapter(model, tmp_path / str(seed))
        same(one)
    assert counter.frame_count == 3
