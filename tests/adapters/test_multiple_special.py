"""Fused projections, token embeddings and experts beside other adapters: rows, switching, hot-swap, sums, merges."""

import copy

import pytest
import torch
from adapted import ids, logits, move
from layers.test_experts import build, config
from torch import nn

import doralib
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError

SPECIAL = {
    "fused": {
        "target_modules": ("qkv",),
        "fused_modules": {"qkv": {"parts": {"q": 1, "k": 1, "v": 1}, "adapt": ("q", "v")}},
    },
    "token": {"target_modules": ("emb", "qkv"), "embedding_axis": "token"},
}
special = pytest.mark.parametrize("name", SPECIAL)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.qkv = nn.Embedding(11, 5), nn.Linear(5, 12)

    def forward(self, input_ids):
        return self.qkv(self.emb(input_ids))


def net(name):
    torch.manual_seed(3)
    plain = Net().double()
    model = move(doralib.adapt(copy.deepcopy(plain), DoraConfig(r=3, **SPECIAL[name])), 0.3)
    doralib.add_adapter(model, "other", DoraConfig(r=2, target_modules=("qkv", "emb"), **axis(name)))
    doralib.set_adapter(model, "other")
    return plain, move(model, 0.3), torch.arange(8).view(4, 2)


def axis(name):
    return {"embedding_axis": "token"} if name == "token" else {}


def alone(model, name, x):
    doralib.set_adapter(model, name)
    return model(x).detach()


@special
def test_rows_go_through_their_own_adapters(name):
    _, model, x = net(name)
    want = [alone(model, each, x) for each in ("default", "other", None)]
    with doralib.adapter_rows(model, ["default", "other", None, "default"]):
        got = model(x)
    torch.testing.assert_close(got, torch.stack([want[i][row] for row, i in enumerate((0, 1, 2, 0))]))


@special
def test_sums_are_exact_and_merges_undone(name):
    plain, model, x = net(name)
    doralib.add_weighted_adapter(model, {"default": 0.6, "other": -0.3}, "sum")
    weights = {}
    for each in ("default", "other", "sum"):
        doralib.set_adapter(model, each)
        y = model(x)
        doralib.merge_adapter(model)
        torch.testing.assert_close(model(x), y)
        weights[each] = [model.emb.weight.clone(), model.qkv.weight.clone()]
        doralib.unmerge_adapter(model)
        assert torch.equal(model(x), y)
    for base, one, two, total in zip([plain.emb.weight, plain.qkv.weight], *weights.values(), strict=True):
        torch.testing.assert_close(total, base + 0.6 * (one - base) - 0.3 * (two - base))


@special
def test_hotswap_takes_a_smaller_rank(name, tmp_path):
    plain, model, x = net(name)
    small = move(doralib.adapt(copy.deepcopy(plain), DoraConfig(r=2, **SPECIAL[name])), 0.3)
    doralib.save_adapter(small, tmp_path / "small")
    doralib.hotswap_adapter(model, tmp_path / "small", "default")
    torch.testing.assert_close(alone(model, "default", x), small(x), rtol=1e-6, atol=1e-6)


def test_a_whole_change_does_not_go_into_parts(tmp_path):
    plain, model, _ = net("fused")
    whole = move(doralib.adapt(copy.deepcopy(plain), DoraConfig(r=2, target_modules=("qkv",))), 0.3)
    doralib.save_adapter(whole, tmp_path / "whole")
    with pytest.raises(DoraError, match="parts"):
        doralib.hotswap_adapter(model, tmp_path / "whole", "default")


def test_experts_switch_swap_and_merge_but_have_no_rows_and_no_sum(tmp_path):
    plain = build("olmoe")
    one = move(doralib.adapt(copy.deepcopy(plain), config()))
    two = move(doralib.adapt(copy.deepcopy(plain), config(r=2, target_parameters=("experts.down_proj",))))
    for each, model in (("one", one), ("two", two)):
        doralib.save_adapter(model, tmp_path / each)
    both = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "one")
    doralib.load_adapter(both, tmp_path / "two", "two")
    for each, model in (("default", one), ("two", two), (None, plain)):
        assert torch.equal(logits(doralib.set_adapter(both, each)), logits(model))
    doralib.set_adapter(both, "two")
    torch.testing.assert_close(logits(doralib.merge_adapter(both)), logits(two), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(doralib.unmerge_adapter(both)), logits(two))
    with pytest.raises(UsageError, match="experts"), doralib.adapter_rows(both, ["default", "two"]):
        both(ids())
    with pytest.raises(DoraError, match="stack of experts"):
        doralib.add_weighted_adapter(both, {"default": 1.0, "two": 1.0}, "sum")
    doralib.set_adapter(doralib.hotswap_adapter(both, tmp_path / "two", "default"), "default")
    torch.testing.assert_close(logits(both), logits(two), rtol=1e-4, atol=1e-5)
