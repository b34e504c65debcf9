"""Inside `doralib.unchanged` a model computes the same without comparing, and is told of what we write ourselves."""

import copy
import pickle

import pytest
import torch
from adapted import ids, logits, move
from conftest import make_llama

import doralib
from doralib import DoraConfig
from doralib.kernels.copies import Copy
from doralib.layers.linear import DoraLinear


def make(dtype=torch.float32, **settings):
    settings = {"r": 3, "target_modules": "all-linear"} | settings
    return move(doralib.adapt(make_llama().to(dtype), DoraConfig(**settings)), 0.3).eval()


@pytest.fixture
def comparisons(monkeypatch):
    counted, own = [], Copy.equals
    monkeypatch.setattr(Copy, "equals", lambda copy, now: counted.append(1) or own(copy, now))
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_same_numbers_and_nothing_compared(method, dtype, comparisons):
    model = make(dtype, method=method)
    with torch.no_grad():
        want = [model(ids()[:, :n]).logits for n in (9, 1)] + [model(ids()[:1, :1]).logits]
        with doralib.unchanged(model) as inside:
            assert inside is model
            model(ids())
            comparisons.clear()
            got = [model(ids()[:, :n]).logits for n in (9, 1)] + [model(ids()[:1, :1]).logits]
            assert not comparisons
        model(ids())
        assert comparisons
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_was_changed_inside_is_seen_after_the_end():
    model = make()
    with doralib.unchanged(model):
        logits(model)
        move(model)
    fresh = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(fresh))


def test_training_inside_the_block_computes_as_outside():
    model = make()
    with doralib.unchanged(model):
        logits(model)
        move(model.train())
        got = model(ids()).logits
        got.square().mean().backward()
    torch.testing.assert_close(got.detach(), logits(model))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("swap", ["load_adapter", "hotswap_adapter"])
def test_what_we_write_is_seen(tmp_path, swap):
    other, model = make(), make()
    move(other)
    doralib.save_adapter(other, tmp_path)
    with doralib.unchanged(model):
        logits(model)
        getattr(doralib, swap)(model, tmp_path)
        torch.testing.assert_close(logits(model), logits(other))


def test_adapters_take_turns_and_come_inside_the_block(tmp_path):
    model, other = make(), move(make())
    doralib.save_adapter(other, tmp_path)
    first = logits(model)
    with doralib.unchanged(model):
        with doralib.unchanged(model):
            torch.testing.assert_close(logits(model), first)
        doralib.load_adapter(model, tmp_path, "two")
        torch.testing.assert_close(logits(doralib.set_adapter(model, "two")), logits(other))
        torch.testing.assert_close(logits(doralib.set_adapter(model, "default")), first)
        with doralib.disabled(model):
            assert torch.equal(logits(model), logits(make_llama()))


def test_a_plain_model_is_left_alone():
    plain = make_llama()
    want = logits(plain)
    with doralib.unchanged(plain):
        assert torch.equal(logits(plain), want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_the_block_made_no_promise(copied):
    model = make()
    with doralib.unchanged(model):
        logits(model)
        twin = copied(model)
    before = logits(twin)
    assert torch.equal(before, logits(model))
    assert not torch.allclose(logits(move(twin)), before)


def test_no_second_copy_of_a_weight_is_held():
    """Under autocast a call casts the weight; only the frozen weight itself may stay."""
    model = make()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with doralib.unchanged(model), torch.no_grad():
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(ids())
        held = [W for m in model.modules() if isinstance(m, DoraLinear) for W, *_ in m.cache.trusted.values()]
        assert held
        assert {W.untyped_storage().data_ptr() for W in held} <= weights


def test_an_error_inside_ends_the_promise():
    model = make()

    def fail():
        with doralib.unchanged(model):
            logits(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    before = logits(model)
    assert not torch.allclose(logits(move(model)), before)
