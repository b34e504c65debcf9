"""Layers whose weight the model reads without calling them: found, left out of "all-linear", refused by name."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaConfig,
    DebertaModel,
    FalconConfig,
    FalconForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LayoutLMv3Config,
    LayoutLMv3Model,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)

import doralib
from doralib.adapters.bypass import find_bypassed
from doralib.adapters.registry import places_of
from doralib.adapters.scan import Scan
from doralib.config import DoraConfig
from doralib.errors import Note, UsageError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 50}


def wavlm():
    return WavLMModel(WavLMConfig(**SMALL))


def mamba():
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50))


def falcon_mamba():
    return FalconMambaForCausalLM(FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50))


def jamba():
    return JambaForCausalLM(JambaConfig(**TEXT, num_key_value_heads=2))


def siglip():
    return SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=28, patch_size=14))


def layoutlm():
    return LayoutLMv3Model(LayoutLMv3Config(**TEXT))


def bloom(**settings):
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50, **settings))


BYPASSED = {
    wavlm: ("q_proj", "k_proj", "v_proj", "out_proj"),
    mamba: ("dt_proj", "conv1d"),
    falcon_mamba: ("dt_proj", "conv1d"),
    jamba: ("dt_proj", "conv1d"),
    siglip: ("out_proj",),
    layoutlm: ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
}


def adapted(model):
    return {name.rpartition(".")[2] for name, _ in places_of(model)}


@pytest.mark.parametrize("make", BYPASSED, ids=lambda make: make.__name__)
def test_bypassed_layers_are_left_out_with_a_line_and_refused_by_name(make):
    model = make()
    bypassed = {name for name, each in Scan(model).bypassed.items() if each.always}
    assert {name.rpartition(".")[2] for name in bypassed} == set(BYPASSED[make])
    for ending in BYPASSED[make]:
        pattern = rf"({'|'.join(sorted(bypassed))})".replace(".", r"\.")
        with pytest.raises(UsageError, match=rf"{ending}: \w+\.\w+ reads its weight without calling it"):
            doralib.adapt(model, DoraConfig(r=2, target_modules=rf".*\.{ending}|{ending}|{pattern}"))
    with pytest.warns(Note, match="all-linear leaves out .*reads its weight without calling it") as told:
        doralib.adapt(model, DoraConfig(r=2))
    assert len(told) == 1
    assert not {name for name, _ in places_of(model)} & bypassed
    assert adapted(model)


def test_a_fused_kernel_may_take_weights_so_they_are_left_out_and_a_name_warns():
    model = mamba()
    with pytest.warns(Note, match="x_proj, out_proj"):
        doralib.adapt(model, DoraConfig(r=2))
    assert adapted(model) == {"in_proj"}
    doralib.remove(model)
    with pytest.warns(Note, match="out_proj .*MambaMixer.forward also reads its weight"):
        doralib.adapt(model, DoraConfig(r=2, target_modules=("out_proj",)))
    assert adapted(model) == {"out_proj"}


@pytest.mark.parametrize(
    "make",
    [
        bloom,
        lambda: FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)),
        lambda: DebertaModel(DebertaConfig(**TEXT)),
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)),
    ],
    ids=["bloom", "falcon", "deberta", "t5"],
)
def test_a_weight_that_is_only_asked_for_its_dtype_or_read_in_another_branch_is_adapted(make, recwarn):
    model = make()
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}
    doralib.adapt(model, DoraConfig(r=2))
    assert {name for name, _ in places_of(model)} == linear
    assert not [each for each in recwarn if isinstance(each.message, Note)]


def test_branches_follow_the_models_own_settings():
    assert not Scan(bloom()).bypassed
    slow = Scan(bloom(pretraining_tp=2, slow_but_exact=True)).bypassed
    assert {name.rpartition(".")[2] for name in slow} == {"dense", "dense_4h_to_h"}
    assert all(each.always for each in slow.values())


def helper(module, x):
    return F.linear(x, module.by_function.weight)


class Above(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_super = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.by_super.weight)


class Ways(Above):
    """Every way to a weight that is followed."""

    clip = None
    wide = False

    def __init__(self):
        super().__init__()
        for name in ("alias", "by_method", "by_function", "named", "called", "asked", "either", "trained", "dead"):
            setattr(self, name, nn.Linear(4, 4))
        self.looped = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.indexed = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.numbered = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.inner = nn.Module()
        self.inner.deep = nn.Linear(4, 4)
        self.handed = nn.Linear(4, 4)

    def forward(self, x, fast=False):
        layer = self.alias
        x = x.to(self.called.weight.dtype) @ layer.weight.T
        for each in self.looped:
            x = F.linear(x, each.weight)
        for i, each in enumerate(self.numbered):
            x = F.linear(x, each.weight) * i
        x = self.indexed[0].weight @ x
        x = F.linear(self._more(x), getattr(self, "named").weight)  # noqa: B009
        x = helper(self, super().forward(x)) @ self.inner.deep.weight
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight is not None:
            x = self.asked(x)
        x = F.linear(x, self.either.weight) if fast else self.either(x)
        x = F.linear(x, self.trained.weight) if self.training and self.clip is None else self.trained(x)
        if not self.wide:
            return call(self.handed, self.called(x))
        return F.linear(x, self.dead.weight)

    def _more(self, x):
        return F.linear(x, self.by_method.weight)


def call(layer, x):
    return layer(x)


def test_every_way_to_a_weight_is_followed():
    found = find_bypassed(dict(Ways().named_modules()))
    always = {"alias", "by_method", "by_function", "by_super", "named", "looped.0", "looped.1", "numbered.0"}
    always |= {"numbered.1", "indexed.0", "inner.deep", "trained"}
    assert {name for name, each in found.items() if each.always} == always
    assert {name for name, each in found.items() if not each.always} == {"either"}
    assert found["by_method"].where == "Ways._more"
    assert found["by_function"].where == "Ways.helper"


def test_a_module_without_source_says_nothing():
    code = (
        "from torch import nn\n"
        "class A(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.a = nn.Linear(2, 2)\n"
        "    def forward(self, x): return x @ self.a.weight\n"
        "from doralib.adapters.bypass import find_bypassed\n"
        "assert find_bypassed(dict(A().named_modules())) == {}\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Disguised(nn.Linear):
    """x Wᵀ + b, by other words."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class WithoutBias(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Routed(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(1)


class Bent(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Grouped(nn.Linear):
    def forward(self, x):
        return torch.einsum("bgi,goi->bgo", x, self.weight.view(2, -1, self.in_features))


def pruned(layer):
    from torch.nn.utils import prune

    return prune.l1_unstructured(layer, "weight", amount=2)


DERIVED = {
    "old weight_norm": (nn.utils.weight_norm, "weight_g, weight_v"),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig"),
    "pruned": (pruned, "weight_orig"),
    "weight_norm": (nn.utils.parametrizations.weight_norm, "WeightNorm"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "SpectralNorm"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "Orthogonal"),
}
ODD = {kind.__name__: lambda kind=kind: kind(4, 4) for kind in (WithoutBias, Scaled, Routed, Bent, Grouped)}
ODD |= {name: lambda make=make: make(nn.Linear(4, 4)) for name, (make, _) in DERIVED.items()}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("kind", ODD)
def test_layers_that_are_not_what_they_are_called_are_left_out_and_refused(kind):
    model = nn.ModuleDict({"odd": ODD[kind](), "plain": nn.Linear(4, 4)})
    why = f"made anew from others .{DERIVED[kind][1]}." if kind in DERIVED else f"{kind} computes in its own way"
    with pytest.raises(UsageError, match=f"odd: .*{why}"):
        doralib.adapt(model, DoraConfig(r=2, target_modules=("odd",)))
    with pytest.warns(Note, match=f"all-linear leaves out odd: .*{why}"):
        doralib.adapt(model, DoraConfig(r=2))
    assert adapted(model) == {"plain"}


def test_derived_weights_of_convolutions_are_refused():
    model = nn.ModuleDict({"odd": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2))})
    with pytest.raises(UsageError, match=r"odd: .*made anew from others .WeightNorm."):
        doralib.adapt(model, DoraConfig(r=2, target_modules=("odd",)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_is_linear_in_disguise_is_a_linear_layer(bias, dtype):
    model = nn.Sequential(Disguised(5, 4, bias=bias)).to(dtype)
    nn.init.zeros_(model[0].weight)  # what the weight is does not matter
    doralib.adapt(model, DoraConfig(r=2))
    assert adapted(model) == {"0"}
    assert type(doralib.merge(model)[0]) is Disguised


def test_falcon_trains_and_merges():
    model = FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50))
    doralib.adapt(model.eval(), DoraConfig(r=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        ids = torch.arange(8)[None]
        before = model(ids).logits
        torch.testing.assert_close(doralib.merge(model)(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_llama_4():
    model = Llama4ForCausalLM(
        Llama4TextConfig(
            **TEXT, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, pad_token_id=0
        )
    )
    with pytest.raises(UsageError, match="router: Llama4Router computes in its own way"):
        doralib.adapt(model, DoraConfig(r=2, target_modules=("router",)))
    with pytest.raises(UsageError, match="its module does not say which axis is the output; set `is_transposed`"):
        doralib.adapt(model, DoraConfig(target_modules=("q_proj",), target_parameters=("experts.gate_up_proj",)))
    with pytest.raises(UsageError, match=r"q_proj.weight \(32, 32\) is the weight of one layer, .* 'q_proj'"):
        doralib.adapt(model, DoraConfig(target_modules=("k_proj",), target_parameters=("q_proj.weight",)))
    with pytest.warns(Note, match="Llama4Router"):
        doralib.adapt(model, DoraConfig(r=2))
    assert "router" not in adapted(model)
