"""The audit of the first step: what is trained in vain is named, with the reason."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LongformerConfig, LongformerModel

import doralib
from doralib.adapters.audit import Audit
from doralib.config import DoraConfig


class Model(nn.Module):
    """One layer of each fate."""

    def __init__(self):
        super().__init__()
        for name in ("trained", "read", "unused", "dropped"):
            setattr(self, name, nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.which = ["read"]

    def forward(self, x):
        self.dropped(x)
        (name,) = self.which  # a name that only the run knows
        return F.linear(self.norm(self.trained(x)), self._modules[name].weight)


FATES = {
    "read": "bypassed: the model reads its weight without calling it",
    "unused": "unused: nothing called it",
    "dropped": "it is called, and there is no path from it to the loss",
}


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


def make(**settings):
    model = doralib.adapt(Model(), DoraConfig(r=2, **settings))
    return model, torch.optim.AdamW(doralib.parameter_groups(model, 1e-2))


def test_layers_without_a_gradient_are_named_with_the_reason():
    model, optimizer = make()
    told = []
    watch = doralib.audit(model, optimizer, tell=told.append)
    step(model, optimizer)
    assert {each.name for each in watch.findings} == FATES.keys()
    for each in watch.findings:
        assert each.reason.startswith(FATES[each.name])
    (line,) = told
    assert "3 trained in vain: these got no gradient in the first backward pass" in line
    assert not any(place._forward_pre_hooks for place in model.children())
    step(model, optimizer)
    assert len(told) == 1


def test_without_listening_the_source_and_the_gradients_speak():
    model, optimizer = make()
    watch = doralib.audit(model, optimizer, tell=lambda _: None, listen=False)
    step(model, optimizer)
    assert {each.name for each in watch.findings} == FATES.keys()


def test_a_message_is_a_warning_by_default():
    model, optimizer = make()
    doralib.audit(model, optimizer)
    with pytest.warns(UserWarning, match="dropped: it is called"):
        step(model, optimizer)


def test_trained_parameters_that_the_optimizer_lacks_are_named():
    model, _ = make(target_modules=("trained",), bias="all")
    told = []
    watch = doralib.audit(model, torch.optim.SGD([model.trained.lora_A], 0.1), tell=told.append)
    names = {"trained.lora_B", "trained.lora_magnitude_vector", "trained.base_layer.bias"}
    assert names <= {each.name for each in watch.findings}
    assert "trained.lora_A" not in {each.name for each in watch.findings}
    assert "none of the optimizer's groups" in told[0]


@pytest.mark.parametrize("warmup", [0, 2])
def test_what_a_step_does_not_change_is_named(warmup):
    model, optimizer = make(target_modules=("trained",))
    length = model.trained.lora_magnitude_vector
    length.data = torch.full_like(length, 1.5).bfloat16()
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if warmup else 1e-4
    told = []
    watch = doralib.audit(model, optimizer, tell=told.append)
    for _ in range(warmup):
        step(model, optimizer)
    assert not watch.findings
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    step(model, optimizer)
    (found,) = watch.findings
    assert found.name == "trained.lora_magnitude_vector"
    assert "small steps are lost in torch.bfloat16" in found.reason
    assert "the first step changed nothing of these" in told[0]


def test_nothing_is_told_of_a_sound_run():
    # A has a gradient of zero while B is zero, and does not move: that is as it should be
    model, optimizer = make(target_modules=("trained",))
    watch = doralib.audit(model, optimizer, tell=pytest.fail)
    step(model, optimizer)
    step(model, optimizer)
    assert not watch.findings


def test_other_adapters_on_the_model_are_no_finding():
    model, _ = make(target_modules=("trained",))
    doralib.add_adapter(model, "second", DoraConfig(r=2, target_modules=("trained", "dropped")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    watch = doralib.audit(model, optimizer, tell=pytest.fail)
    step(model, optimizer)
    assert not watch.findings


def test_an_audit_can_be_read_by_hand():
    model, _ = make()
    watch = Audit(model)
    model(torch.randn(3, 4)).sum().backward()
    watch.stop()
    assert {each.name for each in watch.find_without_gradient()} == FATES.keys()


def test_probe_names_them_and_leaves_the_model_as_it_was():
    model = Model()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    rng = torch.get_rng_state()
    found = doralib.probe(model, {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))})
    assert {each.name: each.reason.partition(":")[0] for each in found if each.name in FATES} == {
        name: reason.partition(":")[0] for name, reason in FATES.items()
    }
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_longformers_global_layers_are_the_inputs_choice():
    config = LongformerConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        attention_window=4,
    )
    model = doralib.adapt(LongformerModel(config), DoraConfig(r=2, target_modules=("query", "query_global")))
    optimizer = torch.optim.AdamW(doralib.parameter_groups(model, 1e-2))
    watch = doralib.audit(model, optimizer, tell=lambda _: None)
    model(torch.arange(8)[None] + 3).last_hidden_state.sum().backward()
    optimizer.step()
    (found,) = watch.findings
    assert found.name.endswith("query_global")
    assert "where the input decides, other rows may" in found.reason
