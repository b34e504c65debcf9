"""The main job on a base that is quantized while it is loaded: train, resume, evaluate, generate, merge."""

import json

import pytest
import torch

from doralib.checkpoints.load import load_base, load_model
from doralib.errors import UsageError
from doralib.layers.base.opaque import Quantized
from doralib.layers.base.registry import open_base
from doralib.recipe import ModelSettings, Recipe
from doralib.training.job import fine_tune, train

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


STEPS = {"max_steps": 5, "per_device_train_batch_size": 8}


def make(folder, tmp_path, quantization, out="run", **training):
    data = tmp_path / "train.jsonl"
    lines = [{"text": f"a {word} film {i % 10}", "label": word} for i in range(16) for word in ("good", "bad")]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Recipe(
        model={"path": str(folder), "quantization": quantization, "dtype": "float32"},
        data={"train": str(data), "validation": 0.2, "prompt": "Review: {text}\nSentiment:", "target": " {label}"},
        adapter={"r": 3, "target_modules": ["q_proj", "down_proj"]},
        training={"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "logging_steps": 1}
        | training,
        out=str(tmp_path / out),
    )


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train" and "loss" in line]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_run(quantization, even_llama_folder, tmp_path):
    job = train if quantization == "nf4" else fine_tune
    run = job(make(even_llama_folder, tmp_path, quantization, eval_strategy="steps", eval_steps=2, save_steps=2))
    curve = losses(run)
    assert curve[-1] < curve[0] - 0.2
    assert {path.name for path in run.iterdir()} >= {"adapter_model.safetensors", "config.yaml"}
    model, _ = load_model(str(run), dtype="float32")
    assert isinstance(model.model.layers[0].self_attn.q_proj.base, Quantized)
    plain, _ = load_model(str(run), base=str(even_llama_folder), dtype="float32")
    assert not isinstance(plain.model.layers[0].self_attn.q_proj.base, Quantized)


def test_the_curve_is_the_same_with_evaluations_between(even_llama_folder, tmp_path):
    """bitsandbytes would repack its weights at the first of them."""
    one = fine_tune(make(even_llama_folder, tmp_path, "nf4", "one"))
    two = fine_tune(make(even_llama_folder, tmp_path, "nf4", "two", eval_strategy="steps", eval_steps=1))
    assert losses(one) == losses(two)


@pytest.mark.parametrize(("quantization", "storage"), [("nf4", "nf4"), ("fp4", "fp4"), ("int8", "int8")])
def test_loading(quantization, storage, even_llama_folder):
    model, _ = load_base(ModelSettings(path=str(even_llama_folder), quantization=quantization))
    layer = open_base(model.model.layers[0].mlp.up_proj)
    assert layer.storage.name == f"bitsandbytes {storage}"
    if quantization != "int8":
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert state.nested
        assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert not isinstance(open_base(model.lm_head), Quantized)


def test_what_cannot_be(even_llama_folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="quantization"):
        ModelSettings(path="m", quantization="nf5")
    recipe = make(even_llama_folder, tmp_path, "nf4")
    with pytest.raises(UsageError, match="method full trains the weights themselves"):
        Recipe(**recipe.model_dump() | {"adapter": {"method": "full"}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        load_base(recipe.model)
