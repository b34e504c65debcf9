"""The full gradient of the norm, and the norm itself, hold no dense (O, I) temporary, in any kind of layer."""

import pytest
import torch
from adapted import move
from torch import nn

from doralib.config import DoraConfig
from doralib.experiments.bench.counting import allocations, peak
from doralib.layers.base.registry import open_base
from doralib.layers.convolution import DoraConv
from doralib.layers.embedding import DoraEmbedding
from doralib.layers.factors.bank import BankFactors, bank_for
from doralib.layers.linear import DoraLinear
from doralib.layers.magnitude import DoraMagnitude

# 8 to 9 million numbers: 32 MiB in float32, of which a block of rows is 4
BASES = {
    "linear": (DoraLinear, lambda: nn.Linear(4096, 2048, bias=False)),
    "convolution": (DoraConv, lambda: nn.Conv2d(1024, 1024, 3, bias=False)),
    "groups": (DoraConv, lambda: nn.Conv2d(4096, 4096, (20, 26), groups=1024, bias=False)),
    "embedding": (DoraEmbedding, lambda: nn.Embedding(16384, 512)),
    "bank": (DoraLinear, lambda: nn.Linear(4096, 2048, bias=False)),
    "magnitude": (DoraMagnitude, lambda: nn.Linear(4096, 2048, bias=False)),
}
R = 4


def make(kind, dtype, **changes):
    cls, build = BASES[kind]
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu").to(dtype)
    nn.init.normal_(module.weight)
    config = DoraConfig(r=R, method="dvora" if kind == "bank" else "dora", **changes)
    if kind != "bank":
        return move(cls(module, R, 2.0, config))
    base = open_base(module)
    factors = BankFactors(base, bank_for([base], config), config.d_initial)
    return move(cls(module, R, 1.0, config, base, factors))


CASES = [(kind, dtype, "kaiming") for kind in BASES for dtype in (torch.float32, torch.bfloat16)]
CASES += [(kind, torch.float32, "pissa_niter_1") for kind in ("linear", "convolution")]


@pytest.mark.parametrize(("kind", "dtype", "start"), CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("detach", [True, False])
def test_the_norm_and_its_gradient_hold_no_dense_temporary(kind, dtype, start, detach):
    layer = make(kind, dtype, detach_norm=detach, init_lora_weights=start)
    layer.cache.last_norm = None
    sizes = allocations(lambda: layer.gain().sum().backward())
    dense = 4 * layer.out_features * layer.in_features
    assert dense >= 32 * 2**20
    assert 0 < peak(sizes) < dense / 2
    turned = [p for n, p in layer.named_parameters() if p.requires_grad and "magnitude" not in n]
    assert all((p.grad is None) == detach for p in turned)


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_rslora_is_a_scale_by_the_root(kind):
    from doralib.adapters.adapt import adapt

    build = {
        "linear": lambda: nn.Linear(6, 5),
        "convolution": lambda: nn.Conv1d(6, 5, 2),
        "embedding": lambda: nn.Embedding(7, 5),
    }
    model = adapt(nn.Sequential(build[kind]()), DoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=("0",)))
    assert model[0].scale == 3.0
    with torch.no_grad():
        model[0].a_RI.normal_()
        model[0].b_OR.normal_()
    A, B = model[0].a_RI.detach(), model[0].b_OR.detach()
    V = model[0].base.W_OI.detach() + 3.0 * B @ A
    want = (model[0].lora_magnitude_vector / V.norm(dim=1))[:, None] * V
    torch.testing.assert_close(model[0].merged_weight(), want)
