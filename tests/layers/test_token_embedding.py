"""Embeddings with a length for each token (MLX's axis): numbers, files of ours and of MLX, what a step computes."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from adapted import ids, logits, move
from conftest import make_llama
from layers.test_embedding import KINDS, PAD, D, R, V, assert_equals, tokens, trained
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import doralib
from doralib.adapters import registry
from doralib.adapters.load import load_into
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.formats import FORMATS
from doralib.formats.base import Hints, RawAdapter
from doralib.formats.files import read_any_format
from doralib.formats.peft import from_peft
from doralib.layers.embedding import DoraEmbedding, DoraTokenEmbedding

kinds = pytest.mark.parametrize("kind", KINDS)
GOLDEN = Path(__file__).parents[1] / "golden" / "mlx_embedding"


def make(kind, dtype=torch.float64, moved=True, **changes):
    module = KINDS[kind]()
    with torch.no_grad():
        module.weight[7] = 0
    config = DoraConfig(**{"r": R, "lora_alpha": 4} | changes)
    layer = DoraTokenEmbedding(module.to(dtype), config.r, config.scale_of("layer"), config)
    return move(layer, 0.3) if moved else layer


def formula(layer, x, detach=True):
    """Over the whole vocabulary, rows are tokens."""
    base = layer.base_layer
    rows = base.weight + layer.scale * layer.lora_embedding_A.T @ layer.lora_embedding_B.T
    n = rows.norm(dim=1)
    n = n.detach() if detach else n
    g = torch.where(n > 0, layer.lora_magnitude_vector / torch.where(n > 0, n, 1), 0)
    y = nn.functional.embedding(x, g[:, None] * rows, base.padding_idx)
    return y if not hasattr(base, "embed_scale") else y * float(base.embed_scale)


@kinds
@pytest.mark.parametrize("detach", [True, False])
def test_output_and_gradients_equal_the_formula(kind, detach):
    layer = make(kind, detach_norm=detach)
    assert [tuple(p.shape) for p in layer.parameters() if p.requires_grad] == [(R, V), (D, R), (V,)]
    assert_equals(layer, formula(layer, tokens(), detach), kind)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [tokens(), torch.tensor([5]), torch.empty(0, 3, dtype=torch.long)], ids=["8", "1", "0"])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind, dtype, x):
    layer = make(kind, dtype, moved=False)
    assert torch.equal(layer(x), layer.base_layer(x))
    if x.numel():
        grads = torch.autograd.grad(layer(x).float().sum(), layer.lora_magnitude_vector)
        assert grads[0].any()


def test_long_rows_start_bit_for_bit_too():
    """A lone row may be summed in another order than the rows of a table."""
    module = nn.Embedding(3, 20000)
    layer = DoraTokenEmbedding(module, 2, 1.0, DoraConfig())
    for x in (torch.tensor([1]), torch.tensor([[0, 1], [2, 2]])):
        assert torch.equal(layer(x), module(x))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_equals_adapted(kind, dtype):
    layer = make(kind, dtype)
    merged = layer.merged()
    assert type(merged) is type(layer.base_layer)
    torch.testing.assert_close(merged(tokens()), layer(tokens()))
    torch.testing.assert_close(
        layer.gain(), layer.lora_magnitude_vector / layer.cache.constant_norm(*rows(layer), layer.scale)
    )


def rows(layer):
    return layer.a_RI, layer.b_OR


class Largest(TorchDispatchMode):
    """Most elements of any tensor that an operator makes anew."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(isinstance(a, torch.Tensor) and shares(a, out) for a in args):
            self.elements = max(self.elements, out.numel())
        return out


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_a_forward_pass_computes_only_the_rows_that_are_looked_up():
    num_tokens, num_dims, x = 1000, 16, torch.tensor([[5, 7, 999]])
    layer = move(DoraTokenEmbedding(nn.Embedding(num_tokens, num_dims), R, 1.0, DoraConfig()), 0.3)
    with Largest() as seen:
        y = layer(x)
    assert seen.elements == x.numel() * num_dims
    with Largest() as seen:
        y.sum().backward()
    # the gradients themselves, which are dense: no (vocabulary, dim)
    assert seen.elements == num_tokens * R


def test_autocast_changes_nothing():
    layer = make("plain", torch.float32)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    want = torch.autograd.grad(layer(tokens()).square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(tokens())
    assert torch.equal(y, layer(tokens()))
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), leaves), want))


def test_a_padding_row_of_zeros_stays_zero():
    layer = trained(make("padding", torch.float32, moved=False))
    assert not layer(torch.tensor([PAD, 7])).any()
    assert layer(torch.tensor([5])).isfinite().all()


def config(**changes):
    settings = {"r": R, "lora_alpha": 5, "target_modules": ("embed_tokens", "q_proj"), "embedding_axis": "token"}
    return DoraConfig(**settings | changes)


def test_a_model_trains_saves_loads_and_merges(tmp_path):
    plain = make_llama()
    plain.save_pretrained(tmp_path / "base")
    model = doralib.adapt(copy.deepcopy(plain), config())
    assert torch.equal(logits(model), logits(plain))
    optimizer = torch.optim.AdamW([p for _, p in registry.trainable(model)], lr=0.02, weight_decay=0)
    losses = []
    for _ in range(3):
        losses.append(loss := model(ids(), labels=ids()).loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    doralib.save_adapter(model, tmp_path / "adapter")
    for _ in range(2):
        again = doralib.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
        assert isinstance(again.model.embed_tokens, DoraTokenEmbedding)
        assert torch.equal(logits(again), logits(model))
        # the axis is in PEFT's files too
        (tmp_path / "adapter" / "doralib_config.json").unlink(missing_ok=True)
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    stored = type(plain).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stored), logits(model), atol=1e-5, rtol=1e-4)
    with doralib.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(doralib.merge(copy.deepcopy(model))), logits(stored), atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(doralib.remove(model)), logits(plain))


def test_peft_refuses_the_file_even_of_a_square_table(tmp_path):
    square = nn.Sequential(nn.Embedding(6, 6))
    doralib.save_adapter(doralib.adapt(square, config(target_modules=("0",))), tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.lora_magnitude_vector"].shape == (6, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Embedding(6, 6)), tmp_path)
    again = doralib.load_adapter(nn.Sequential(nn.Embedding(6, 6)), tmp_path)
    assert type(again[0]) is DoraTokenEmbedding


def test_one_axis_does_not_load_into_the_other(tmp_path):
    by_token = doralib.adapt(nn.Sequential(nn.Embedding(6, 6)), config(target_modules=("0",)))
    by_dimension = doralib.adapt(
        nn.Sequential(nn.Embedding(6, 6)), config(target_modules=("0",), embedding_axis="dimension")
    )
    assert type(by_dimension[0]) is DoraEmbedding
    with pytest.raises(DoraError, match="token embedding in the adapter, embedding in the model"):
        load_into(by_dimension, registry.state_of(by_token))
    doralib.save_adapter(by_token, tmp_path)
    with pytest.raises(DoraError, match=r"\(6, 6\) in the adapter, \(9, 6\) in the model"):
        doralib.load_adapter(nn.Sequential(nn.Embedding(9, 6)), tmp_path)
    with pytest.raises(DoraError, match="token embedding in the adapter, linear in the model"):
        doralib.load_adapter(nn.Sequential(nn.Linear(6, 6)), tmp_path)


def test_lora_has_no_axis_and_magnitudes_alone_have_one():
    model = doralib.adapt(make_llama(), config(method="lora"))
    assert type(model.model.embed_tokens) is DoraEmbedding
    settings = config(target_modules=("q_proj",), magnitude_modules=("embed_tokens",))
    with pytest.raises(UsageError, match="no lengths of tokens"):
        doralib.adapt(make_llama(), settings)


def test_tied_heads_are_refused_and_load_as_they_were_trained(tmp_path):
    with pytest.raises(UsageError, match="tied to lm_head"):
        doralib.adapt(make_llama(tie_word_embeddings=True), config())
    doralib.save_adapter(move(doralib.adapt(make_llama(), config())), tmp_path / "adapter")
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    with pytest.raises(DoraError, match="tied to this embedding"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    # an adapter of the embedding alone leaves the head as it is, as in PEFT
    model = doralib.load_adapter(make_llama(tie_word_embeddings=True), tmp_path / "adapter")
    assert type(model.model.embed_tokens) is DoraTokenEmbedding
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.base_layer.weight


# MLX


def test_mlxs_file_gives_mlxs_numbers():
    expected = load_file(GOLDEN / "expected.safetensors")
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 6), "layers": nn.ModuleList([nn.Module()])})
    model["layers"][0].q_proj = nn.Linear(6, 8)
    model["embed_tokens"].weight.data = expected["base.embed_tokens"].clone()
    doralib.load_adapter(model, GOLDEN)
    assert type(model["embed_tokens"]) is DoraTokenEmbedding
    assert registry.config_of(model).embedding_axis == "token"
    x = expected["base.tokens"].long()
    torch.testing.assert_close(model["embed_tokens"](x), expected["merged.tokens"])
    torch.testing.assert_close(doralib.merge(model)["embed_tokens"].weight.detach(), expected["merged.embed_tokens"])


def test_to_peft_and_back_to_mlx(tmp_path):
    convert_adapter(ConversionRequest(adapter=GOLDEN, to="peft", out=tmp_path / "peft"))
    convert_adapter(ConversionRequest(adapter=tmp_path / "peft", to="mlx", out=tmp_path / "mlx"))
    before, after = (load_file(folder / "adapters.safetensors") for folder in (GOLDEN, tmp_path / "mlx"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_scale_is_folded_into_the_smaller_factor():
    state = read_any_format(GOLDEN, Hints())[1].state
    layers = dict(state.layers)
    first = next(name for name in layers if name != "embed_tokens")
    layers = {first: layers[first], "embed_tokens": layers["embed_tokens"]}
    object.__setattr__(layers["embed_tokens"], "scale", 2.5)
    content = FORMATS["mlx"].write(DoraConfig(), replace(state, layers=layers), Hints())
    again = FORMATS["mlx"].read(RawAdapter(content.tensors, content.settings), Hints()).state.layers["embed_tokens"]
    want = 2.5 * layers["embed_tokens"].b_OR @ layers["embed_tokens"].a_RI
    torch.testing.assert_close(again.scale * again.b_OR @ again.a_RI, want)


@pytest.mark.interop
def test_mlx_reads_and_computes_the_same(tmp_path):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed here")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed here")
    import mlx.nn as mlx_nn
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters

    class Block(mlx_nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = mlx_nn.Linear(6, 8)

    class Model(mlx_nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.layers = mlx_nn.Embedding(9, 6), [Block()]

    theirs = Model()
    ours = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 6), "layers": nn.ModuleList([nn.Module()])})
    ours["layers"][0].q_proj = nn.Linear(6, 8)
    ours["embed_tokens"].weight.data = torch.from_numpy(np.array(theirs.embed_tokens.weight))
    doralib.adapt(ours, config(r=2))
    doralib.save_adapter(move(ours, 0.3), tmp_path / "ours")
    convert_adapter(ConversionRequest(adapter=tmp_path / "ours", to="mlx", out=tmp_path / "mlx"))
    load_adapters(theirs, str(tmp_path / "mlx"))
    x = torch.tensor([[0, 8, 3]])
    got = torch.from_numpy(np.array(theirs.embed_tokens(mx.array(x.numpy()))))
    torch.testing.assert_close(got, ours["embed_tokens"](x).detach())


def test_dimensions_do_not_go_to_mlx_and_mixed_files_are_refused(tmp_path):
    model = move(doralib.adapt(make_llama(), config(embedding_axis="dimension")))
    doralib.save_adapter(model, tmp_path)
    with pytest.raises(UsageError, match=r"embed_tokens \(embedding\)"):
        convert_adapter(ConversionRequest(adapter=tmp_path, to="mlx", out=tmp_path / "mlx"))
    tensors = {}
    for name, shape in (("a", (5,)), ("b", (7, 1))):
        prefix = f"base_model.model.{name}."
        tensors |= {f"{prefix}lora_embedding_A": torch.randn(2, 7), f"{prefix}lora_embedding_B": torch.randn(5, 2)}
        tensors[f"{prefix}lora_magnitude_vector"] = torch.rand(shape)
    settings = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 4, "target_modules": ["a", "b"]}
    with pytest.raises(DoraError, match="a length for each token and others for each dimension"):
        from_peft(tensors, settings)


def test_nearest_lora_of_token_lengths(tmp_path):
    plain = make_llama()
    plain.save_pretrained(tmp_path / "base")
    model = move(doralib.adapt(copy.deepcopy(plain), config()), 0.05)
    doralib.save_adapter(model, tmp_path / "adapter")
    request = ConversionRequest(
        adapter=tmp_path / "adapter", to="lora", rank=32, out=tmp_path / "l", base=str(tmp_path / "base")
    )
    assert max(each.relative for each in convert_adapter(request).errors) < 1e-4
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "l").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-3)
    assert math.isfinite(logits(model).sum())
