"""The values of an adapter: each kind is a plain value of which a part can be replaced."""

from dataclasses import fields, replace

import pytest
import torch
from adapted import move
from torch import nn

import doralib
from doralib.adapters.registry import state_of
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.state import BankValues, ExpertsValues, FusedValues, LayerAdapter, LowRankValues, MovedValues, map_tensors

SETTINGS = {
    LowRankValues: {},
    MovedValues: {"init_lora_weights": "olora"},
    BankValues: {"method": "dvora"},
    FusedValues: {"fused_modules": {"0": {"parts": ("q", "k", "v"), "adapt": ("q", "v")}}},
}


def adapter_of(kind):
    torch.manual_seed(0)
    if kind is ExpertsValues:
        values = ExpertsValues(torch.randn(3, 2, 5), torch.randn(3, 4, 2), torch.rand(3, 4))
        return LayerAdapter(values=values, scale=0.5)
    model = nn.Sequential(nn.Linear(8, 6))
    config = DoraConfig(r=2, target_modules=("0",), **SETTINGS[kind])
    return state_of(move(doralib.adapt(model, config))).layers["0"]


kinds = pytest.mark.parametrize("kind", [*SETTINGS, ExpertsValues], ids=lambda kind: kind.__name__)


@kinds
def test_every_kind_can_be_replaced(kind):
    adapter = adapter_of(kind)
    assert isinstance(adapter.values, kind)
    twice = replace(adapter, scale=2 * adapter.scale)
    assert (twice.scale, twice.kind, twice.values) == (2 * adapter.scale, adapter.kind, adapter.values)
    for each in fields(kind):
        value = getattr(adapter.values, each.name)
        assert getattr(replace(adapter.values, **{each.name: value}), each.name) is value
    doubled = replace(adapter, values=map_tensors(adapter.values, lambda t: t if t.dtype == torch.long else 2 * t))
    assert all(torch.equal(doubled.tensors()[name], 2 * t) for name, t in adapter.tensors().items())
    with pytest.raises(TypeError, match="replace those"):
        replace(adapter, m_O=adapter.m_O)


@kinds
def test_shape_and_rank_are_those_of_the_change(kind):
    adapter = adapter_of(kind)
    a, b = adapter.factors
    assert adapter.shape == (b @ a).shape
    assert adapter.rank == a.shape[-2]
    assert adapter.kernel == ()
    assert adapter.m_O.shape == adapter.shape[:-1]


@pytest.mark.parametrize("kind", [LowRankValues, BankValues, ExpertsValues], ids=lambda kind: kind.__name__)
def test_shapes_that_do_not_fit_are_refused(kind):
    values = adapter_of(kind).values
    with pytest.raises(DoraError, match="found"):
        replace(values, m_O=values.m_O[:-1])
