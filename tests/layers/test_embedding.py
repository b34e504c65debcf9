"""Adapted embeddings: one length per dimension, PEFT's numbers and files, scaled embeddings, tied heads refused."""

import copy
import math

import peft
import pytest
import torch
from adapted import move
from conftest import make_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import doralib
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.layers.base.registry import open_base
from doralib.layers.embedding import DoraEmbedding

V, D, R, PAD = 23, 8, 3, 2
KINDS = {
    "plain": lambda: nn.Embedding(V, D),
    "padding": lambda: nn.Embedding(V, D, padding_idx=PAD),
    "gemma": lambda: Gemma3TextScaledWordEmbedding(V, D, PAD, math.sqrt(D)),
    "bart": lambda: BartScaledWordEmbedding(V, D, PAD, embed_scale=math.sqrt(D)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
methods = pytest.mark.parametrize("method", ["dora", "lora"])


def make(kind, dtype=torch.float64, moved=True, **changes):
    module = KINDS[kind]()
    with torch.no_grad():
        module.weight[:, 1] = 0
    config = DoraConfig(r=R, lora_alpha=4, **changes)
    layer = DoraEmbedding(module.to(dtype), config.r, config.scale_of("layer"), config)
    return move(layer, 0.3) if moved else layer


def tokens():
    return torch.tensor([[5, PAD, 7, 5], [0, 22, PAD, 11]])


def formula(layer, x, detach=True):
    base = layer.base_layer
    V_DT = base.weight.T + layer.scale * layer.lora_embedding_B @ layer.lora_embedding_A
    if layer.lora_magnitude_vector is not None:
        n = V_DT.norm(dim=1)
        n = n.detach() if detach else n
        V_DT = V_DT * torch.where(n > 0, layer.lora_magnitude_vector / torch.where(n > 0, n, 1), 0)[:, None]
    y = nn.functional.embedding(x, V_DT.T, base.padding_idx)
    return y if not hasattr(base, "embed_scale") else y * float(base.embed_scale)


@kinds
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [R, 40])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind, method, dtype, r):
    config = DoraConfig(r=r, method=method)
    layer = DoraEmbedding(KINDS[kind]().to(dtype), r, 2.0, config)
    assert torch.equal(layer(tokens()), layer.base_layer(tokens()))
    assert not layer.lora_embedding_A.any()
    assert layer.lora_embedding_B.any()


@kinds
@methods
@pytest.mark.parametrize("detach", [True, False])
def test_output_and_gradients_equal_the_formula(kind, method, detach):
    layer = make(kind, method=method, detach_norm=detach)
    assert_equals(layer, formula(layer, tokens(), detach), kind)


def assert_equals(layer, want, kind):
    """The outputs of `tokens` and the gradients of all that is trained."""
    leaves, y = [p for p in layer.parameters() if p.requires_grad], layer(tokens())
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if kind == "gemma" else {}  # its factor is a float32 buffer
    torch.testing.assert_close(y, want, **tolerance)
    dy = torch.randn_like(y)
    if layer.padding_idx is not None:
        dy[tokens() == PAD] = 0  # torch gives the padding token's row no gradient
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
        assert ours.isfinite().all()


@kinds
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_equals_adapted(kind, method, dtype):
    layer = make(kind, dtype, method=method)
    merged = layer.merged()
    assert type(merged) is type(layer.base_layer)
    torch.testing.assert_close(merged(tokens()), layer(tokens()))


def test_norms_by_blocks_of_tokens(monkeypatch):
    monkeypatch.setattr("doralib.functional.BLOCK_ELEMENTS", 3 * D)
    layer = make("plain")
    base = layer.base
    W, A, B = base.W_OI, torch.randn(R, V).double(), torch.randn(D, R).double()
    torch.testing.assert_close(base.row_norm_sq(), W.square().sum(1))
    torch.testing.assert_close(base.times_transposed(A), W @ A.T)
    torch.testing.assert_close(base.transposed_times(B), B.T @ W)


def trained(layer):
    """The layer after three steps with `tokens`."""
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    for _ in range(3):
        layer(tokens()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


def test_a_padding_row_of_zeros_stays_zero():
    layer = trained(make("padding", torch.float32, moved=False))
    assert not layer(torch.tensor([PAD])).any()
    assert layer(torch.tensor([5])).isfinite().all()


def test_what_cannot_be_adapted_is_refused():
    class Shifted(nn.Embedding):
        def forward(self, x):
            return super().forward(x) + 1

    class Odd(nn.Embedding):
        embed_scale = 2.0

        def forward(self, x):
            return super().forward(x) ** 2

    for module in (Shifted(4, 3), Odd(4, 3)):
        assert open_base(module) is None
    with pytest.raises(DoraError, match="max_norm"):
        doralib.adapt(nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), DoraConfig(target_modules=("0",)))


def config(**changes):
    return DoraConfig(**{"r": R, "lora_alpha": 5, "target_modules": ("embed_tokens", "q_proj")} | changes)


def test_tied_heads_are_refused():
    with pytest.raises(UsageError, match="tied to lm_head"):
        doralib.adapt(make_llama(tie_word_embeddings=True), config())


def test_all_linear_leaves_embeddings_alone():
    model = doralib.adapt(make_llama(), DoraConfig(target_modules="all-linear"))
    assert not any(isinstance(m, DoraEmbedding) for m in model.modules())


@methods
def test_peft_reads_and_computes_the_same(method, tmp_path):
    plain, x = make_llama(), torch.randint(3, 400, (2, 9))
    model = move(doralib.adapt(copy.deepcopy(plain), config(method=method)))
    doralib.save_adapter(model, tmp_path / "ours")
    prefix = "base_model.model.model.embed_tokens."
    shapes = {k.removeprefix(prefix): tuple(v.shape) for k, v in stored(tmp_path / "ours").items() if prefix in k}
    magnitude = {"lora_magnitude_vector": (32,)} if method == "dora" else {}
    twice = {f"{name}.weight": shape for name, shape in magnitude.items()}  # for readers of either name
    assert shapes == {"lora_embedding_A": (R, 400), "lora_embedding_B": (32, R)} | magnitude | twice
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x).logits, model(x).logits, atol=2e-5, rtol=2e-5)
    # PEFT also keeps a copy of the frozen embedding, unless told not to
    theirs.save_pretrained(tmp_path / "theirs")
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in stored(tmp_path / "theirs"))
    again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert torch.equal(again(x).logits, model(x).logits)
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if "embed" in name and p.requires_grad}
    assert names == {"lora_embedding_A", "lora_embedding_B"} | set(magnitude)


def stored(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_merging_on_disk_equals_merging_in_memory(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    move(doralib.adapt(model, config()))
    doralib.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        merged["model.embed_tokens.weight"], doralib.merge(model).model.embed_tokens.weight.detach()
    )


def test_merging_on_disk_refuses_a_tied_head(tmp_path):
    model = make_llama()
    move(doralib.adapt(model, config()))
    doralib.save_adapter(model, tmp_path / "adapter")
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    with pytest.raises(DoraError, match="tied to this embedding"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")


def test_an_embedding_is_not_a_linear_layer_of_its_shape(tmp_path):
    model = doralib.adapt(nn.Sequential(nn.Embedding(V, D)), config(target_modules=("0",)))
    doralib.save_adapter(model, tmp_path)
    with pytest.raises(DoraError, match="embedding in the adapter, linear in the model"):
        doralib.load_adapter(nn.Sequential(nn.Linear(V, D)), tmp_path)
    save_file({k: v[:, :-1].contiguous() if "_A" in k else v for k, v in stored(tmp_path).items()}, tmp_path / "x")
    (tmp_path / "x").replace(tmp_path / "adapter_model.safetensors")
    with pytest.raises(DoraError, match="these shapes differ"):
        doralib.load_adapter(nn.Sequential(nn.Embedding(V, D)), tmp_path)
