"""The main job on a base that is quantized while it is loaded: train, resume, evaluate, generate, merge."""

import json

import pytest
import torch

import doralib
from doralib.adapters.merge import dequantize
from doralib.checkpoints.load import load_model
from doralib.checkpoints.models import load_base
from doralib.errors import UsageError
from doralib.layers.base.opaque import Quantized
from doralib.layers.base.registry import open_base
from doralib.recipe import ModelSettings, Recipe
from doralib.training.job import fine_tune, train

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:MatMul8bitLt")]


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


@pytest.mark.parametrize(
    ("quantization", "storage"),
    [
        ("nf4", "bitsandbytes nf4"),
        ("fp4", "bitsandbytes fp4"),
        ("int8", "bitsandbytes int8"),
        ("torchao-int8", "torchao Int8Tensor"),
        ("torchao-float8", "torchao Float8Tensor"),
    ],
)
@pytest.mark.parametrize("double", [True, False])
def test_loading(quantization, storage, double, even_llama_folder):
    settings = ModelSettings(path=str(even_llama_folder), quantization=quantization, double_quantization=double)
    model, _ = load_base(settings)
    layer = open_base(model.model.layers[0].mlp.up_proj)
    assert layer.storage.name == storage
    if quantization in ("nf4", "fp4"):
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert state.nested == double
        assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert not isinstance(open_base(model.lm_head), Quantized)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_small_optimizers_train_as_on_the_dense_twin(optim, checkpointing, even_llama_folder, tmp_path):
    """Of rank 64, so that bitsandbytes keeps A's and B's moments in 8 bits: it leaves what is under 4096 numbers."""
    dense, _ = load_base(ModelSettings(path=str(even_llama_folder), quantization="nf4", dtype="float32"))
    dequantize(dense, torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    for file in even_llama_folder.glob("token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    runs = []
    for folder, quantization in ((even_llama_folder, "nf4"), (tmp_path / "dense", None)):
        more = {"optim": optim, "gradient_checkpointing": checkpointing, "max_steps": 5}
        recipe = make(folder, tmp_path, quantization, str(quantization), **more)
        runs.append(fine_tune(recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"r": 64})})))
    assert losses(runs[0])[-1] < losses(runs[0])[0] - 0.2
    # an 8-bit moment may be rounded the other way
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-2 if "8bit" in optim else 2e-4)


def test_a_run_on_a_base_that_is_stored_quantized(even_llama_folder, tmp_path):
    stored, tokenizer = load_base(ModelSettings(path=str(even_llama_folder), quantization="nf4", dtype="float32"))
    stored.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    run = fine_tune(make(tmp_path / "stored", tmp_path, None, "on-stored"))
    assert losses(run) == pytest.approx(
        losses(fine_tune(make(even_llama_folder, tmp_path, "nf4", "on-plain"))), rel=1e-5
    )
    with pytest.raises(UsageError, match=r"stored quantized already \(bitsandbytes\).*leave model.quantization out"):
        load_base(ModelSettings(path=str(tmp_path / "stored"), quantization="nf4"))


def test_trls_cast_spares_the_lengths(even_llama_folder):
    """TRL makes what a 4-bit model trains bfloat16, unless it is called lora_magnitude_vector (REPORTS 2.4)."""
    model, _ = load_base(ModelSettings(path=str(even_llama_folder), quantization="nf4", dtype="float32"))
    doralib.adapt(model, doralib.DoraConfig(r=4, target_modules=("q_proj", "down_proj")))
    assert model.is_loaded_in_4bit
    # SFTTrainer.__init__ of TRL 1.16
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_magnitude_vector" not in name:
            p.data = p.data.to(torch.bfloat16)
    layer, ids = model.model.layers[0].mlp.down_proj, torch.arange(3, 20)[None]
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert torch.equal(layer.gain(), torch.ones_like(layer.lora_magnitude_vector))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    first = model.train()(ids, labels=ids).loss
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss < first
    for p, old in zip(trained, before, strict=True):
        if p.dtype == torch.float32:
            assert (p != old).float().mean() > 0.9


def test_what_cannot_be(even_llama_folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="quantization"):
        ModelSettings(path="m", quantization="nf5")
    recipe = make(even_llama_folder, tmp_path, "nf4")
    with pytest.raises(UsageError, match="method full trains the weights themselves"):
        Recipe(**recipe.model_dump() | {"adapter": {"method": "full"}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        load_base(recipe.model)
