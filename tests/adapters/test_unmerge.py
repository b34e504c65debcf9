"""Merges that can be undone: bit for bit, values and flags, from memory and from a file."""

import copy

import pytest
import torch
from adapted import ids, move
from adapters.test_multiple import CONFIGS, MODELS, OwnLinear, of_kind, outputs
from conftest import make_llama
from safetensors.torch import load_file
from torch import nn

import doralib
from doralib import DoraConfig, DoraError, UsageError
from doralib.adapters import registry
from doralib.layers.linear import DoraLinear
from doralib.layers.multi_adapter import MultiAdapter
from doralib.layers.wrapper import TrainedCopy


def snapshot(model):
    return {
        name: (id(p), p.detach().clone(), p.requires_grad, p.device) for name, p in model.named_parameters()
    }, model.state_dict().keys()


def assert_same(model, before):
    now = snapshot(model)
    assert now[1] == before[1]
    assert now[0].keys() == before[0].keys()
    for name, (identity, value, flag, device) in before[0].items():
        assert now[0][name][0] == identity
        assert torch.equal(now[0][name][1].view(torch.uint8), value.view(torch.uint8))
        assert now[0][name][2:] == (flag, device)


def assert_same_outputs(got, want, keep):
    """The same bits where the weights never moved.

    From a file they come back to other memory. A CPU may sum a product over a tensor with another alignment in another
    order, and these models then differ by a few units in the last place of their largest output.
    """
    if keep == "cpu":
        assert torch.equal(got, want)
    else:
        ulp = torch.finfo(want.dtype).eps * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=16 * ulp)


@pytest.fixture(params=["cpu", "file"])
def keep(request, tmp_path):
    return "cpu" if request.param == "cpu" else tmp_path / "frozen.safetensors"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(name, keep, dtype):
    model = move(doralib.adapt(make_llama().to(dtype), CONFIGS[name], name))
    model.model.norm.weight.requires_grad_(True)
    registry.layers_of(model, name)[
        "model.layers.0.self_attn.v_proj"
        if name in ("maths", "lengths")
        else next(iter(registry.layers_of(model, name)))
    ].requires_grad_(False)
    logits, before = model(ids()).logits, snapshot(model)
    plain = doralib.merge(copy.deepcopy(model))
    for _ in range(2):
        assert doralib.merge_adapter(model, keep) is model
        assert not any(isinstance(m, DoraLinear | TrainedCopy | MultiAdapter) for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model(ids()).logits, plain(ids()).logits)
        assert doralib.unmerge_adapter(model) is model
        assert_same(model, before)
        assert_same_outputs(model(ids()).logits, logits, keep)
        if keep != "cpu":
            keep.unlink()
    doralib.remove(model)
    assert torch.equal(model(ids()).logits, make_llama().to(dtype)(ids()).logits)


@pytest.mark.same_bits
def test_training_goes_on_after_it(keep):
    model, twin = (move(doralib.adapt(make_llama(), CONFIGS["words"]), seed=3) for _ in range(2))
    for i, each in enumerate((model, twin)):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            if not i and step == 1:
                doralib.unmerge_adapter(doralib.merge_adapter(each, keep))
            optimizer.zero_grad()
            each(ids(), labels=ids()).loss.backward()
            optimizer.step()
    assert torch.equal(model(ids()).logits, twin(ids()).logits)


def test_several_stay_with_the_model(keep):
    model = doralib.adapt(make_llama(), CONFIGS["maths"], "maths")
    for name in ("code", "words"):
        doralib.add_adapter(model, name, CONFIGS[name])
    move(model)
    want = {name: doralib.set_adapter(model, name)(ids()).logits for name in ("maths", "code", "words")}
    before = snapshot(model)
    for name, logits in want.items():
        doralib.set_adapter(model, name)
        doralib.merge_adapter(model, keep)
        torch.testing.assert_close(model(ids()).logits, logits, rtol=1e-4, atol=1e-5)
        for call in (
            lambda: doralib.set_adapter(model, "code"),
            lambda: doralib.save_adapter(model, "nowhere"),
            lambda: doralib.remove(model),
            lambda: doralib.merge(model),
            lambda: doralib.merge_adapter(model),
            lambda: doralib.disable(model),
        ):
            with pytest.raises(UsageError, match="adapter is merged"):
                call()
        doralib.unmerge_adapter(model)
        assert_same_outputs(model(ids()).logits, logits, keep)
        if keep != "cpu":
            keep.unlink()
    assert_same(model, before)


def test_trained_biases(keep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, base = torch.randn(4, 5), copy.deepcopy(model)
    move(doralib.adapt(model, DoraConfig(r=2, target_modules=("0",), bias="all")))
    want, before = model(x), snapshot(model)
    doralib.merge_adapter(model, keep)
    torch.testing.assert_close(model(x), want)
    doralib.unmerge_adapter(model)
    assert_same(model, before)
    with doralib.disabled(model):
        assert torch.equal(model(x), base(x))


@pytest.mark.same_bits
@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"opaque"}))
def test_every_kind_of_layer(model, keep):
    model, targets, x = of_kind(model)
    move(doralib.adapt(model, DoraConfig(r=2, target_modules=targets)))
    want, before = outputs(model, x), snapshot(model)
    doralib.merge_adapter(model, keep)
    torch.testing.assert_close(outputs(model, x), want, rtol=1e-4, atol=1e-5)
    doralib.unmerge_adapter(model)
    assert_same(model, before)
    assert_same_outputs(outputs(model, x), want, keep)


def test_with_a_file_the_frozen_weights_are_in_no_memory(tmp_path):
    model = move(doralib.adapt(make_llama(), CONFIGS["maths"]))
    frozen = {name: layer.base_layer.weight for name, layer in registry.layers_of(model, "default").items()}
    values = {name: p.detach().clone() for name, p in frozen.items()}
    doralib.merge_adapter(model, tmp_path / "frozen.safetensors")
    assert sum(p.numel() for p in frozen.values()) == 0
    stored = load_file(tmp_path / "frozen.safetensors")
    assert all(torch.equal(stored[f"{name}.weight"], value) for name, value in values.items())
    with pytest.raises(UsageError, match="adapter is merged"):
        doralib.merge_adapter(model)
    (tmp_path / "frozen.safetensors").rename(tmp_path / "moved")
    with pytest.raises(DoraError, match="no file"):
        doralib.unmerge_adapter(model)
    (tmp_path / "moved").rename(tmp_path / "frozen.safetensors")
    doralib.unmerge_adapter(model)
    assert all(torch.equal(frozen[name], value) for name, value in values.items())


@pytest.mark.same_bits
def test_what_comes_back_from_a_file_is_in_memory_of_its_own(tmp_path):
    """Not mapped from the file, at an address where a CPU may multiply in another way than with torch's own tensors."""
    model = doralib.adapt(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), DoraConfig(r=2))
    doralib.unmerge_adapter(doralib.merge_adapter(model, tmp_path / "frozen.safetensors"))
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes
        assert p.data_ptr() % 64 == 0


def test_refusals(tmp_path):
    model = make_llama()
    with pytest.raises(UsageError, match="no adapter is merged"):
        doralib.unmerge_adapter(model)
    doralib.adapt(model, CONFIGS["maths"])
    with pytest.raises(UsageError, match="no adapter is merged"):
        doralib.unmerge_adapter(model)
    (tmp_path / "there").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        doralib.merge_adapter(model, tmp_path / "there")
    with doralib.adapter_rows(model, ["default"]), pytest.raises(UsageError, match="inside a block"):
        doralib.merge_adapter(model)
    with doralib.disabled(model), pytest.raises(UsageError, match="is disabled"):
        doralib.merge_adapter(model)
    doralib.set_adapter(model, None)
    with pytest.raises(UsageError, match="no adapter is active"):
        doralib.merge_adapter(model)
    full = doralib.adapt(make_llama(), DoraConfig(method="full"))
    with pytest.raises(UsageError, match="nothing to merge"):
        doralib.merge_adapter(full)


def test_a_storage_that_cannot_be_merged_leaves_the_model_as_it_was(keep):
    model = move(doralib.adapt(nn.Sequential(nn.Linear(5, 7), OwnLinear(7, 3)), DoraConfig(r=2)))
    x, before = torch.randn(2, 5), snapshot(model)
    want = model(x)
    with pytest.raises(DoraError, match="dequantise=True"):
        doralib.merge_adapter(model, keep)
    assert_same(model, before)
    assert torch.equal(model(x), want)
