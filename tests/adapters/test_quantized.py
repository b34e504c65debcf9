"""Quantized bases with what else a model may have: several adapters, undone merges, starts, files of any format."""

import shutil

import pytest
import torch
from adapted import move
from adapters.test_quantized_models import CONFIG, IDS, each_kind, load, logits, quantized, train
from checkpoints.test_quantized import adapter as adapter
from checkpoints.test_quantized import bases as bases
from checkpoints.test_quantized import stored, weights
from layers.test_experts import PARAMETERS
from layers.test_fused import MODELS as FUSED
from quantization.test_storages import bits4
from safetensors.torch import save_file
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, Phi3Config, Phi3ForCausalLM

import doralib
from doralib.adapters import registry
from doralib.adapters.merge import dequantize
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import Ingredient, merge_checkpoint
from doralib.checkpoints.quantized import find_quantized
from doralib.checkpoints.safetensors import Checkpoint
from doralib.checkpoints.verify import verify_merge
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.formats.base import Hints
from doralib.layers.base.opaque import Quantized
from doralib.layers.base.registry import open_base

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:quantizing the merged weights again")

OTHER = DoraConfig(method="lora", r=3, target_modules=("q_proj", "up_proj"))
VECTORS = DoraConfig(method="dvora", r=8, target_modules=("q_proj", "o_proj"))
LENGTHS = DoraConfig(r=2, target_modules=("k_proj",), magnitude_modules=("q_proj",))
ALL = {"turned": CONFIG, "other": OTHER, "vectors": VECTORS, "lengths": LENGTHS}


def moved(model, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place in registry.layers_of(model, name).values():
            for key, p in place.named_parameters(recurse=False):
                by = torch.randn(p.shape, generator=generator)
                p.copy_(p * (1 + 0.1 * by) if "magnitude" in key else 0.2 * by)


def several(folder, kind):
    model = doralib.adapt(load(folder, kind), ALL["turned"], "turned")
    for name in ("other", "vectors", "lengths"):
        doralib.add_adapter(model, name, ALL[name])
    for seed, name in enumerate(ALL):
        moved(model, name, seed)
    return model


@each_kind
def test_several_adapters_share_a_quantised_base(kind, even_llama_folder):
    model = several(even_llama_folder, kind)
    plain = logits(doralib.set_adapter(model, None))
    assert torch.equal(plain, logits(load(even_llama_folder, kind)))
    alone = {None: plain}
    for seed, (name, config) in enumerate(ALL.items()):
        one = doralib.adapt(load(even_llama_folder, kind), config, name)
        moved(one, name, seed)
        alone[name] = logits(doralib.set_adapter(model, name))
        assert torch.equal(alone[name], logits(one))
        assert (alone[name] - plain).abs().max() > 0.01
    names = ["vectors", None, "turned", "lengths", "other"]
    batch = torch.cat([IDS[:1]] * len(names))
    with doralib.adapter_rows(model, names), torch.no_grad():
        got = model.train()(batch).logits
    want = torch.stack([alone[name][0] for name in names])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    doralib.add_weighted_adapter(model, {"turned": 0.5, "vectors": -0.7}, "sum")
    doralib.set_adapter(model, "sum")
    twin = several(even_llama_folder, kind)
    changes = {}
    for name, weight in {"turned": 0.5, "vectors": -0.7}.items():
        for place, layer in registry.layers_of(twin, name).items():
            W = layer.base.W_OI.double()
            changes[place] = changes.get(place, 0) + weight * (layer.merged_weight().double() - W)
    for place, layer in registry.layers_of(model, "sum").items():
        want = layer.base.W_OI.double() + changes[place]
        torch.testing.assert_close(layer.merged_weight().double(), want, rtol=1e-4, atol=1e-5)


@each_kind
def test_the_last_of_several_merges_as_it_would_alone(kind, even_llama_folder):
    for dense in (False, True):
        model = several(even_llama_folder, kind)
        for name in ("other", "vectors", "lengths"):
            doralib.delete_adapter(model, name)
        one = doralib.adapt(load(even_llama_folder, kind), ALL["turned"], "turned")
        moved(one, "turned")
        assert doralib.merge_report(model) == doralib.merge_report(one)
        assert len(doralib.merge_report(one)) == 4
        doralib.merge(model, dequantise=dense)
        doralib.merge(one, dequantise=dense)
        assert bool(quantized(model)) is not dense
        assert torch.equal(logits(model), logits(one))


def bits(model):
    """All that the quantized weights are made of."""
    return {
        f"{name}.{i}": (id(module.weight), tensor.clone())
        for name, module in model.named_modules()
        if name in quantized(model)
        for i, tensor in enumerate(open_base(module).storage.tensors())
    }


@each_kind
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_merge_is_undone_bit_for_bit(kind, many, even_llama_folder, tmp_path):
    if many:
        model = doralib.set_adapter(several(even_llama_folder, kind), "other")
    else:
        model = doralib.adapt(load(even_llama_folder, kind), CONFIG)
        moved(model, "default")
    want, before, report = logits(model), bits(model), doralib.merge_report(model)
    layers = registry.layers_of(model, doralib.active_adapter(model))
    assert [row.layer for row in report] == list(layers)
    W = {name: layer.base.W_OI for name, layer in layers.items()}
    values = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or "vera_" in name}
    with pytest.raises(DoraError, match="a file cannot hold"):
        doralib.merge_adapter(model, tmp_path / "frozen.safetensors")
    assert torch.equal(logits(model), want)
    for _ in range(2):
        doralib.merge_adapter(model)
        assert len(quantized(model)) == 14
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(torch.equal(open_base(model.get_submodule(name)).W_OI, old) for name, old in W.items())
        assert not torch.equal(logits(model), want)
        doralib.unmerge_adapter(model)
        now = bits(model)
        assert now.keys() == before.keys()
        assert all(now[key][0] == before[key][0] and torch.equal(now[key][1], before[key][1]) for key in now)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in values.items())
        assert torch.equal(logits(model), want)
    losses = train(model)
    assert losses[-1] < losses[0]


def test_a_swallowed_change_is_said_when_it_is_folded_in_for_a_while(even_llama_folder):
    model = doralib.adapt(load(even_llama_folder, "nf4"), CONFIG)
    train(model, steps=1, rate=1e-4)
    with pytest.warns(UserWarning, match="lost most of the change"):
        doralib.merge_adapter(model)


def test_an_adapter_beside_another_keeps_the_weights_readable(even_llama_folder):
    """Layers that were quantized after the first adapter came are switched off too."""
    model = doralib.adapt(load(even_llama_folder, "nf4"), CONFIG)
    fresh = load(even_llama_folder, "nf4").model.layers[0].self_attn.o_proj
    model.model.layers[0].self_attn.o_proj = fresh
    doralib.add_adapter(model, "other", OTHER)
    assert fresh.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_a_part_of_the_dense_weight(start, even_llama_folder, tmp_path):
    config = CONFIG.model_copy(update={"init_lora_weights": start})
    model = doralib.adapt(load(even_llama_folder, "nf4 double"), config)
    torch.testing.assert_close(logits(model), logits(load(even_llama_folder, "nf4 double")), rtol=1e-4, atol=1e-4)
    losses = train(model, rate=0.01)
    assert losses[-1] < losses[0]
    doralib.save_adapter(model, tmp_path)
    again = doralib.load_adapter(load(even_llama_folder, "nf4 double"), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    want = logits(model)
    torch.testing.assert_close(logits(doralib.merge(model, dequantise=True)), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["dora", "dvora", "magnitude"])
def test_quantised_inputs_are_refused_by_every_kind_of_layer_and_by_rows(method, even_llama_folder):
    q = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    q.quantize_(model, q.Int8DynamicActivationInt8WeightConfig())
    config = {
        "dora": DoraConfig(r=2, target_modules=("1",)),
        "dvora": DoraConfig(method="dvora", r=2, target_modules=("1",)),
        "magnitude": DoraConfig(r=2, target_modules=("0",), magnitude_modules=("1",)),
    }[method]
    doralib.adapt(model, config)
    doralib.add_adapter(model, "other", config)
    x = torch.randn(4, 16)
    with torch.no_grad():
        model[1](x)
    with pytest.raises(DoraError, match="train on weight-only"):
        model[1](x.requires_grad_())
    with doralib.adapter_rows(model, ["default", "other", None, "other"]):
        model[1](x.detach())
        with pytest.raises(DoraError, match="train on weight-only"):
            model[1](x)


def test_plain_layers_have_the_models_dtype_whatever_adapters_are_in():
    layers = [bits4(torch.randn(64, 64).bfloat16(), "nf4", nested=True), nn.Linear(64, 64, dtype=torch.bfloat16)]
    model = doralib.adapt(nn.Sequential(*layers), DoraConfig(r=2, target_modules=("0",)), "one")
    doralib.add_adapter(model, "two", DoraConfig(r=3, target_modules=("0", "1")))
    doralib.delete_adapter(model, "two")
    doralib.merge(model, dequantise=True)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.bfloat16


# checkpoints


@pytest.fixture(scope="module")
def second(even_llama_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("second")
    model = doralib.adapt(load(even_llama_folder), VECTORS)
    moved(model, "default", 9)
    doralib.save_adapter(model, path)
    return path


def live_sum(base, ingredients):
    """W + Σ w (V - W) by layer, each V in float64 from the live layers on the same base."""
    total = {}
    for each in ingredients:
        model = doralib.load_adapter(load(base), each.path)
        for name, layer in registry.layers_of(model, "default").items():
            W = layer.base.W_OI.double()
            total[name] = total.get(name, W) + each.weight * (layer.merged_weight().double() - W)
    return total


@each_kind
def test_several_into_one_quantised_checkpoint(kind, bases, adapter, second, tmp_path):
    base = bases(kind, "60KB")
    parts = [Ingredient(adapter, 0.8), Ingredient(second, -0.6)]
    want = live_sum(base, parts)
    dense = merge_checkpoint(parts, base, tmp_path / "dense", dtype="float32")
    assert dense.layers == len(want) == 12
    got = stored(tmp_path / "dense")
    for name, V in want.items():
        torch.testing.assert_close(got[f"{name}.weight"].double(), V, rtol=1e-4, atol=1e-5 * V.abs().max().item())
    summary = merge_checkpoint(parts, base, tmp_path / "again")
    assert {row.layer for row in summary.requantised} == want.keys()
    Q = weights(load(tmp_path / "again"))
    for row in summary.requantised:
        V = want[row.layer]
        assert row.of_weight == pytest.approx(((Q[row.layer].double() - V).norm() / V.norm()).item(), rel=1e-3)
    if kind == "int8":
        check = verify_merge(tmp_path / "again", parts, base, costs=summary.requantised)
        assert check.passed, check.text()
        assert verify_merge(tmp_path / "dense", parts, base).relative < 1e-5
        assert not verify_merge(tmp_path / "dense", parts[:1], base).passed


def test_blocks_of_rows_are_the_whole(bases, adapter, tmp_path, monkeypatch):
    base = bases("nf4 double")
    for name, elements in (("whole", 1 << 20), ("blocks", 300)):
        monkeypatch.setattr("doralib.functional.BLOCK_ELEMENTS", elements)
        for dtype in (None, "float32"):
            merge_checkpoint(adapter, base, tmp_path / f"{name} {dtype}", dtype=dtype)
    for dtype in (None, "float32"):
        whole, blocks = stored(tmp_path / f"whole {dtype}"), stored(tmp_path / f"blocks {dtype}")
        for key, tensor in whole.items():
            torch.testing.assert_close(blocks[key].double(), tensor.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_a_format_that_needs_the_bases_names_and_shapes(kind, bases, adapter, even_llama_folder, tmp_path):
    base = bases(kind)
    convert_adapter(ConversionRequest(adapter, "kohya", tmp_path / "kohya.safetensors", base=str(even_llama_folder)))
    merge_checkpoint(adapter, base, tmp_path / "ours", dtype="float32")
    merge_checkpoint(tmp_path / "kohya.safetensors", base, tmp_path / "theirs", dtype="float32")
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-6) for key in ours)
    model, _ = load_model(str(tmp_path / "kohya.safetensors"), base=str(base), dtype="float32", given=Hints())
    assert isinstance(model.model.layers[0].self_attn.q_proj.base, Quantized)
    want = logits(load(tmp_path / "ours"))
    dequantize(model, torch.float32)
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)


def test_a_module_trained_whole_that_is_stored_quantised(bases, even_llama_folder, tmp_path):
    config = DoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("o_proj",))
    doralib.save_adapter(doralib.adapt(load(even_llama_folder), config), tmp_path / "adapter")
    with pytest.raises(DoraError, match="trained whole, but quantized in the base"):
        merge_checkpoint(tmp_path / "adapter", bases("int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_inspect_and_convert_read_quantised_bases(kind, bases, adapter, tmp_path, run):
    base = bases(kind)
    status, out, err = run("inspect", adapter, "--base", base)
    assert status == 0, err
    assert "direction moved" in " ".join(out.split())
    request = ConversionRequest(adapter, "lora", tmp_path / "lora", base=str(base), rank=64)
    assert max(each.relative for each in convert_adapter(request).errors) < 1e-4, "of full rank nothing is lost"
    plain = doralib.load_adapter(load(base), adapter)
    lora = doralib.load_adapter(load(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(plain), rtol=1e-3, atol=1e-3)


EVEN = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# with the weights that an adapter changes, and how many of them are quantized; transformers leaves experts as they are
SPECIAL = {
    "fused": (
        lambda: Phi3ForCausalLM(Phi3Config(**EVEN)),
        {"target_modules": ("qkv_proj", "gate_up_proj"), "fused_modules": FUSED["phi3"][2]},
        (4, 4),
    ),
    "experts": (
        lambda: OlmoeForCausalLM(OlmoeConfig(**EVEN, num_experts=3, num_experts_per_tok=2)),
        {"target_modules": ("q_proj",), "target_parameters": PARAMETERS},
        (20, 2),
    ),
}


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """Folders of a quantized base and of an adapter of it, and the adapted model; each made once."""
    made = {}

    def base_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(1)
            SPECIAL[name][0]().save_pretrained(folder / "plain")
            load(folder / "plain", "nf4 double").save_pretrained(folder / "base")
            model = doralib.adapt(load(folder / "base"), DoraConfig(r=3, lora_alpha=5, **SPECIAL[name][1]))
            doralib.save_adapter(move(model, 0.2, share=0.2, seed=2), folder / "adapter")
            made[name] = folder
        return made[name]

    return base_of


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("name", SPECIAL)
def test_fused_projections_and_experts_become_on_disk_what_they_become_live(name, dtype, special, tmp_path):
    folder, (layers, anew) = special(name), SPECIAL[name][2]
    summary = merge_checkpoint(folder / "adapter", folder / "base", tmp_path, dtype=dtype)
    assert (summary.layers, len(summary.requantised)) == (layers, 0 if dtype else anew)
    model = doralib.load_adapter(load(folder / "base"), folder / "adapter")
    adapted = logits(model)
    with doralib.disabled(model):
        assert (logits(model) - adapted).abs().max() > 0.1
    merged, again = doralib.merge(model, dequantise=dtype is not None), load(tmp_path)
    assert quantized(again) == quantized(merged)
    assert len(quantized(again)) == (0 if dtype else 8)
    assert torch.equal(logits(again), logits(merged))
    if dtype:
        torch.testing.assert_close(logits(again), adapted, rtol=1e-4, atol=1e-5)


def test_experts_that_are_quantised_one_by_one(special, tmp_path):
    """As older transformers stored them; each is read, changed and quantized again like any other weight."""
    folder = special("experts")
    tensors = {}
    for key, value in stored(folder / "base").items():
        if ".experts." not in key:
            tensors[key] = value
            continue
        layer = bits4(value, "nf4", nested=True)
        tensors[key] = layer.weight.data
        tensors |= {f"{key}.{part}": t for part, t in layer.weight.quant_state.as_dict(packed=True).items()}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    shutil.copy(folder / "base" / "config.json", tmp_path / "base")
    for out, dtype in (("dense", "float32"), ("again", None)):
        summary = merge_checkpoint(folder / "adapter", tmp_path / "base", tmp_path / out, dtype=dtype)
        assert (summary.layers, len(summary.requantised)) == (20, 0 if dtype else 20)
    before, dense = find_quantized(Checkpoint.open(tmp_path / "base")), stored(tmp_path / "dense")
    after = find_quantized(Checkpoint.open(tmp_path / "again"))
    state = doralib.adapters.load.read_for_model(folder / "adapter")[1]
    for e in range(3):
        share = state.layers["model.layers.1.mlp.experts.down_proj"]
        name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        V = before[name].dequantize().double() + share.scale * share.b_OR[e].double() @ share.a_RI[e].double()
        V *= share.m_O[e].double()[:, None] / V.norm(dim=1, keepdim=True)
        torch.testing.assert_close(dense[name].double(), V, rtol=1e-5, atol=1e-5)
        error = (after[name].dequantize().double() - V).norm() / V.norm()
        row = next(row for row in summary.requantised if f"{row.layer}.weight" == name)
        assert row.of_weight == pytest.approx(error.item(), rel=1e-3)
        assert error < 0.2
