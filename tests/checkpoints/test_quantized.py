"""Merging into checkpoints that are stored quantized: dense, or quantized again; transformers reads both."""

import importlib
import re
import shutil

import pytest
import torch
from adapters.test_quantized_models import KINDS, load, logits, quantized
from checkpoints.test_verify import save_turned
from conftest import make_tokenizer
from safetensors import safe_open
from torch import nn

import doralib
from doralib.adapters.merge import dequantize
from doralib.checkpoints.merge import Ingredient, merge_checkpoint
from doralib.checkpoints.quantized import find_quantized
from doralib.checkpoints.safetensors import Checkpoint
from doralib.checkpoints.verify import verify_merge
from doralib.cli.merge import merge_and_show
from doralib.errors import DoraError
from doralib.files import read_json, read_tensors, write_json, write_tensors
from doralib.layers.base.registry import open_base

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_layout = pytest.mark.parametrize("shard_size", ["10GB", "60KB"], ids=["single", "sharded"])
STATED = "weight.quant_state.bitsandbytes__nf4"
HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def bases(even_llama_folder, tmp_path_factory):
    """Quantized checkpoints as transformers saves them, each made once."""
    made = {}

    def base(kind, shard_size="10GB"):
        if (kind, shard_size) not in made:
            path = tmp_path_factory.mktemp("base") / "model"
            load(even_llama_folder, kind).save_pretrained(path, max_shard_size=shard_size)
            make_tokenizer().save_pretrained(path)
            made[kind, shard_size] = path
        return made[kind, shard_size]

    return base


@pytest.fixture(scope="module")
def adapter(even_llama_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    save_turned(even_llama_folder, path, 0.1)
    return path


def stored(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in read_tensors(file).items()}


def weights(model):
    """Dense, by layer."""
    return {
        name: open_base(module).dense_rows(torch.arange(len(module.weight) if module.weight.dim() > 1 else 0))
        if name not in quantized(model)
        else open_base(module).W_OI
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def formula(base_folder, adapter):
    """What every layer should become, in float64, from transformers' own reading of both."""
    model = load(base_folder)
    dequantize(model, torch.float32)
    want = {name: module.weight.double() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        stem = key.removesuffix("lora_A.weight")
        name, B, m = stem.removeprefix("base_model.model.")[:-1], tensors[f"{stem}lora_B.weight"].double(), None
        m = tensors[f"{stem}lora_magnitude_vector"].double()
        V = want[name] + 2 * B @ A.double()
        want[name] = m[:, None] * V / V.norm(dim=1, keepdim=True)
    return want


@each_kind
@pytest.mark.parametrize(
    ("shard_size", "dtype"), [("10GB", "float32"), ("60KB", "bfloat16")], ids=["single", "sharded"]
)
def test_dense(kind, shard_size, dtype, bases, adapter, tmp_path):
    base, out = bases(kind, shard_size), tmp_path / "out"
    seen = []
    summary = merge_checkpoint(adapter, base, out, dtype=dtype, progress=lambda *at: seen.append(at))
    assert summary.layers == 10
    assert summary.requantised == ()
    assert seen[-1] == (summary.bytes, summary.bytes)
    assert "quantization_config" not in read_json(out / "config.json")
    assert read_json(out / "config.json")["dtype"] == dtype
    model = load(out)
    assert not quantized(model)
    eps = torch.finfo(getattr(torch, dtype)).eps
    for name, want in formula(base, adapter).items():
        got = model.get_submodule(name).weight
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=1e-5 * want.abs().max().item(), msg=name)
    before, after = stored(base), stored(out)
    assert torch.equal(after[NORM], before[NORM].to(after[NORM].dtype))
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    assert after.keys() == {name for name, _ in model.named_parameters()}
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard_size != "10GB")
    assert len(Checkpoint.open(out).slots) == len(after)


@each_layout
@each_kind
def test_quantised_again(kind, shard_size, bases, adapter, tmp_path):
    base, out = bases(kind, shard_size), tmp_path / "out"
    summary = merge_checkpoint(adapter, base, out)
    before, after = stored(base), stored(out)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name].shape != before[name].shape or not after[name].equal(before[name])}
    layers = {name.removesuffix(".weight") for name in doralib_layers(adapter)}
    assert {next(layer for layer in layers if name.startswith(layer)) for name in changed} == layers
    assert read_json(out / "config.json") == read_json(base / "config.json")
    model, live = load(out), doralib.load_adapter(load(base), adapter)
    report = {row.layer: row for row in doralib.merge_report(live)}
    assert {row.layer for row in summary.requantised} == report.keys() == layers
    for row in summary.requantised:
        assert row.storage == report[row.layer].storage
        assert row.of_change == pytest.approx(report[row.layer].of_change, rel=1e-3)
    live = merged_live(live)
    assert torch.equal(logits(model), logits(live)), "transformers reads what a live merge makes"
    W, Q = formula(base, adapter), weights(model)
    for row in summary.requantised:
        error = (Q[row.layer].double() - W[row.layer]).norm() / W[row.layer].norm()
        assert row.of_weight == pytest.approx(error.item(), rel=1e-3)
        assert error < 0.2
    text = summary.text()
    assert re.search(r"q_proj +x2 .*of the change.*worst model.layers", text)
    assert len(Checkpoint.open(out).slots) == len(after)


def doralib_layers(adapter):
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        for name in tensors
        if "lora_A" in name
    }


def merged_live(model):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return doralib.merge(model)


@pytest.mark.parametrize("kind", ["nf4 double", pytest.param("int8", marks=pytest.mark.long)])
def test_verify(kind, bases, adapter, tmp_path):
    base = bases(kind)
    merge_checkpoint(adapter, base, tmp_path / "dense", dtype="float32")
    right = verify_merge(tmp_path / "dense", adapter, base)
    assert right.passed, right.text()
    assert right.relative < 1e-5
    assert right.effect > 0.05
    summary = merge_checkpoint(adapter, base, tmp_path / "again")
    again = verify_merge(tmp_path / "again", adapter, base, costs=summary.requantised)
    assert again.relative > right.relative
    if "int8" in kind:
        assert again.passed, again.text()
    plain = verify_merge(base, adapter, base, costs=summary.requantised)
    assert not plain.passed, plain.text()


def test_what_four_bits_swallow_is_said_and_fails_verification(bases, even_llama_folder, tmp_path, capsys):
    base = bases("nf4 double")
    save_turned(even_llama_folder, tmp_path / "small", 0.002)
    options = {"dtype": None, "verify": ("logits",), "overwrite": False}
    with pytest.raises(DoraError, match="does not answer as the adapted one"):
        merge_and_show([Ingredient(tmp_path / "small")], str(base), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    told = " ".join(capsys.readouterr().out.split())
    assert "lost most of what the adapters do; merge with --dtype bfloat16" in told
    merge_and_show([Ingredient(tmp_path / "small")], str(base), tmp_path / "dense", **options | {"dtype": "float32"})


def test_the_layers_are_found(bases):
    found = find_quantized(Checkpoint.open(bases("nf4 double", "60KB")))
    assert len(found) == 14
    layer = found["model.layers.0.mlp.up_proj.weight"]
    assert layer.shape == (128, 64)
    assert layer.storage == "bitsandbytes nf4"
    assert len(layer.slots) == 6


def test_one_layer_is_held_at_a_time(bases, adapter, tmp_path, monkeypatch):
    """Each layer's tensors are read when the one before has been written."""
    from doralib.checkpoints import merge, quantized

    events = []
    read, write = quantized.QuantizedWeight.read, merge.write_at
    monkeypatch.setattr(quantized.QuantizedWeight, "read", lambda self: events.append("read") or read(self))
    monkeypatch.setattr(merge, "write_at", lambda *args: events.append("write") or write(*args))
    merge_checkpoint(adapter, bases("nf4"), tmp_path / "out", dtype="bfloat16")
    # all that is not quantized has been written before
    assert events[events.index("read") :] == ["read", "write"] * 14


def test_the_base_is_looked_through_once_whatever_the_adapters(bases, adapter, tmp_path, monkeypatch):
    from doralib.checkpoints import quantized as packed

    base, looks = bases("nf4 double"), []
    # asked once a look
    monkeypatch.setattr(packed, "is_conv1d_model", lambda config: looks.append(config) or False)
    merge_checkpoint([Ingredient(adapter, 0.5), Ingredient(adapter, 0.5)], base, tmp_path / "out")
    assert len(looks) == 1


def _rewrite(base, damage):
    file = next(base.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = read_tensors(file)
    damage(tensors)
    write_tensors(file, tensors, metadata)


def _put(part, change):
    def damage(tensors):
        name = next(each for each in tensors if each.endswith(f"q_proj.{part}"))
        made = change(tensors.pop(name))
        tensors |= {} if made is None else {name: made}

    return damage


@pytest.mark.parametrize(
    ("kind", "part", "change", "told"),
    [
        ("nf4 double", "weight.absmax", lambda _: None, "absmax (missing for U8 x "),
        ("nf4 double", "weight.absmax", lambda old: old.float(), "absmax (F32 x "),
        ("nf4 double", "weight.quant_map", lambda old: old[:3], "quant_map (F32 x 3 for F32 x 16)"),
        ("nf4 double", "weight.nested_absmax", lambda old: old.repeat(2), "nested_absmax (F32 x 2 for F32 x 1)"),
        ("nf4 double", "weight", lambda old: old[:4], "weight (4 bytes for "),
        ("nf4 double", STATED, lambda old: old[:9], "settings are damaged"),
        ("nf4 double", STATED, lambda old: torch.full_like(old, 255), "settings are damaged"),
        ("nf4 double", STATED, lambda _: torch.tensor([*b'{"quant_type": "nf4"}'], dtype=torch.uint8), "damaged"),
        ("nf4 double", STATED, torch.Tensor.long, "settings are damaged (torch.int64 for bytes)"),
        ("int8", "SCB", lambda old: old[:2], "SCB (F32 x 2 for the rows of"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(kind, part, change, told, bases, adapter, tmp_path):
    base = shutil.copytree(bases(kind), tmp_path / "base")
    _rewrite(base, _put(part, change))
    with pytest.raises(DoraError, match=re.escape(told)) as failed:
        merge_checkpoint(adapter, base, tmp_path / "out", dtype="float32")
    assert "q_proj.weight: " in str(failed.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_understood_is_refused_before_anything_is_written(bases, adapter, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(bases("nf4"), tmp_path / "base")
    config = read_json(tmp_path / "base" / "config.json")
    write_json(tmp_path / "base" / "config.json", {**config, "model_type": "gpt2"})
    with pytest.raises(DoraError, match="quantized Conv1D"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out")
    real = importlib.import_module

    def without(name, *args):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(DoraError, match="pip install bitsandbytes"):
        merge_checkpoint(adapter, bases("nf4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
