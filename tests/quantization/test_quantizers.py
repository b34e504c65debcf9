"""Models that other tools have quantized, and their own layers: gptqmodel (GPTQ and AWQ), HQQ, compressed-tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer
from quantized_trial import STEPS, try_storage
from torch import nn

SCRIPT = Path(__file__).with_name("by_gptqmodel.py")
pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A model whose every size is a multiple of 64, as AWQ wants them."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    make_llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def check(found, storage, rounding=1e-4):
    """What is promised of every storage, whose own product may round."""
    assert storage in found["storage"]
    assert found["start is exact"]
    assert found["gain at the start"] == 0
    assert found["plain at the start"] < rounding
    assert len(found["losses"]) == STEPS
    assert found["losses"][-1] < found["losses"][0] - 0.1
    losses, dense = map(torch.tensor, (found["losses"], found["dense losses"]))
    torch.testing.assert_close(losses, dense, rtol=rounding, atol=rounding)
    assert found["merged"] < rounding


@pytest.fixture
def script(tmp_path):
    """Run a script, or a module, in a process of its own, which leaves its logs in a folder of the test."""
    pytest.importorskip("gptqmodel")

    def call(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    return call


@pytest.mark.parametrize(
    ("kind", "storage", "rounding"),
    [
        ("gptq", "TorchLinear", 1e-4),
        ("gptq-act-order", "TorchLinear", 1e-4),
        # multiplies in float16
        ("awq", "AwqTorchLinear", 2e-3),
    ],
)
def test_models_of_gptqmodel(script, plain_folder, tmp_path, kind, storage, rounding):
    script(SCRIPT, "quantize", kind, plain_folder, tmp_path / "model")
    script(SCRIPT, "try", kind, tmp_path / "model", tmp_path / "found.json")
    check(json.loads((tmp_path / "found.json").read_text()), storage, rounding)


def test_a_recipe_on_a_gptq_model(script, plain_folder, tmp_path):
    script(SCRIPT, "quantize", "gptq-8", plain_folder, tmp_path / "model")
    run = train_recipe(tmp_path, lambda file: script("-m", "doralib", "train", file))
    script("-m", "doralib", "generate", run, "--prompt", "good film", "--max-new-tokens", "3")
    merged = tmp_path / "merged"
    script("-m", "doralib", "merge", run, "--base", plain_folder, "--out", merged)
    assert (merged / "model.safetensors").is_file()


def train_recipe(folder, train):
    """Train a few steps on the model in a folder; returns the run."""
    rows = [{"text": f"{word} film", "label": label} for word, label in (("good", "yes"), ("bad", "no")) * 8]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "prompt": "{text}", "target": " {label}"},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "training": {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1},
        "out": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(str(folder / "recipe.yaml"))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    return folder / "run"


@pytest.mark.parametrize(("nbits", "axis"), [(8, 1), (4, 1), (4, 0), (2, 1)])
def test_layers_of_hqq(nbits, axis):
    quantize = pytest.importorskip("hqq.core.quantize")
    quantize.HQQLinear.set_backend(quantize.HQQBackend.PYTORCH)

    def load():
        model = make_llama(hidden_size=64, intermediate_size=128)
        for name, module in list(model.model.layers.named_modules()):
            if type(module) is nn.Linear:
                settings = quantize.BaseQuantizeConfig(nbits=nbits, group_size=32, axis=axis)
                packed = quantize.HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu")
                parent, _, child = name.rpartition(".")
                setattr(model.model.layers.get_submodule(parent), child, packed)
        return model

    check(try_storage(load), "HQQLinear")


def test_a_recipe_on_a_model_of_compressed_tensors(plain_folder, tmp_path, run):
    compress_model(plain_folder, tmp_path / "model")

    def train(file):
        assert run("train", file)[0] == 0

    folder = train_recipe(tmp_path, train)
    assert run("generate", str(folder), "--prompt", "good film", "--max-new-tokens", "3")[0] == 0


def compress_model(plain, out):
    """Write a checkpoint of 4 bits in groups of 32."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, scheme = AutoModelForCausalLM.from_pretrained(plain), preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = 32
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, 32))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    AutoTokenizer.from_pretrained(plain).save_pretrained(out)
