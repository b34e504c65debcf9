"""What is planned: bytes of models of published sizes from config.json alone, and what is done with the answer."""

import json

import pytest
import torch
import yaml
from transformers import AutoConfig, LlamaConfig

from doralib import process
from doralib.errors import UsageError
from doralib.recipe import Recipe
from doralib.training.plan.estimate import estimate_run
from doralib.training.plan.growth import Growth
from doralib.training.plan.parts import GIB
from doralib.training.plan.skeleton import Skeleton, weigh
from doralib.training.plan.trace import trace_step

pytestmark = pytest.mark.estimates

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16"}
SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
# what Meta's model cards and files say of Llama 3
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496}
ATTENTION_AND_UP = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Folders that hold a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("llamas")
    for name, sizes in SIZES.items():
        LlamaConfig(**LLAMA, **sizes, architectures=["LlamaForCausalLM"]).save_pretrained(folder / name)
    return folder


def recipe(path, *, distributed=None, **groups):
    model = {"path": str(path)} | groups.pop("model", {})
    data = {"train": "no.jsonl", "max_length": 1024} | groups.pop("data", {})
    adapter = {"r": 16, "target_modules": ATTENTION_AND_UP} | groups.pop("adapter", {})
    training = {"per_device_train_batch_size": 2, "gradient_checkpointing": True} | groups
    more = {"distributed": distributed} if distributed else {}
    return Recipe(model=model, data=data, adapter=adapter, training=training, out="runs/none", **more)


def parts(found):
    return {part.name: part.bytes for part in found.parts}


def test_weights_of_an_8b_are_as_published(llamas):
    dense = estimate_run(recipe(llamas / "8b"), gpus=1, gpu_memory=24)
    assert parts(dense)["weights"] == 2 * PARAMETERS["8b"]
    adapter = parts(dense)["adapter"]
    # A, B and m in float32 of five layers in each of 32 blocks
    q, kv, up, down = (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)
    assert adapter == 32 * 4 * sum(16 * (i + o) + o for i, o in (q, kv, kv, up, down))
    assert parts(dense)["optimizer"] == 2 * adapter
    nf4 = estimate_run(recipe(llamas / "8b", model={"quantization": "nf4"}), gpus=1, gpu_memory=24)
    blocks = PARAMETERS["8b"] - 2 * 128256 * 4096 - 65 * 4096
    bits = 4 + (8 + 32 / 256) / 64
    kept = 2 * (PARAMETERS["8b"] - blocks)
    assert parts(nf4)["weights"] == pytest.approx(blocks * bits / 8 + kept, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "model", "distributed", "gpus", "memory", "length"),
    [
        ("8b", {"quantization": "nf4"}, None, 1, 24, 1024),
        pytest.param(
            *("70b", {"quantization": "nf4"}, {"strategy": "fsdp2", "cpu_offload": True}, 2, 24, 1024),
            marks=pytest.mark.long,
        ),
        pytest.param("70b", {}, {"strategy": "fsdp2"}, 8, 80, 2048, marks=pytest.mark.long),
        pytest.param("70b", {}, {"strategy": "fsdp2"}, 32, 80, 4096, marks=pytest.mark.long),
    ],
)
def test_the_recipes_of_the_page_fit(llamas, size, model, distributed, gpus, memory, length):
    asked = recipe(
        llamas / size, model=model, distributed=distributed, data={"max_length": length}, per_device_train_batch_size=1
    )
    found = estimate_run(asked, gpus=gpus, gpu_memory=memory)
    assert found.fits
    assert found.largest_rows >= 1
    assert found.seconds_per_step is None


def test_what_does_not_fit_says_what_to_change(llamas):
    found = estimate_run(recipe(llamas / "70b", gradient_checkpointing=False), gpus=1, gpu_memory=24)
    assert found.fits is False
    assert found.largest_rows == 0
    advice = "\n".join(found.advice)
    for word in ("gradient_checkpointing=true", "quantization=nf4", "strategy=fsdp2"):
        assert word in advice
    whole = estimate_run(recipe(llamas / "8b", per_device_train_batch_size=512), gpus=1, gpu_memory=40)
    assert f"per_device_train_batch_size={whole.largest_rows} is the largest" in whole.advice[0]


def test_the_largest_batch_fits_and_one_row_more_does_not(llamas):
    largest = estimate_run(recipe(llamas / "8b"), gpus=1, gpu_memory=24).largest_rows
    at = [
        estimate_run(recipe(llamas / "8b", per_device_train_batch_size=n), gpus=1, gpu_memory=24)
        for n in (largest, largest + 1)
    ]
    assert [each.fits for each in at] == [True, False]


def test_a_few_blocks_and_rows_tell_of_all(tiny_llama_folder):
    config = AutoConfig.from_pretrained(tiny_llama_folder)
    config.num_hidden_layers = 5
    asked = recipe(tiny_llama_folder, adapter={"r": 3, "target_modules": ["q_proj", "down_proj"]})
    skeleton = Skeleton(asked, config, None)
    assert skeleton.few == (1, 2)
    growth = Growth.of(skeleton, 24, 24)
    skeleton._name, skeleton.count = "", 5
    whole = skeleton.adapted(5)
    assert growth.whole == weigh(whole)
    assert growth.step(3) == trace_step(whole, 3, 24, 3 * 24)


def test_less_is_kept_with_checkpoints_labels_and_a_smaller_vocabulary(llamas):
    base = parts(estimate_run(recipe(llamas / "8b"), gpus=1))
    every = parts(estimate_run(recipe(llamas / "8b", gradient_checkpointing=False), gpus=1))
    assert every["activations"] > 5 * base["activations"]
    # rows x tokens x vocabulary, in float32 at least once
    assert base["logits"] > 2 * 1024 * 128256 * 4
    shared = recipe(llamas / "8b", distributed={"strategy": "fsdp2"})
    sharded = parts(estimate_run(shared, gpus=8))
    assert sharded["weights"] == base["weights"] // 8
    assert sharded["optimizer"] == pytest.approx(base["optimizer"] / 8, abs=1)
    assert parts(estimate_run(recipe(llamas / "8b"), gpus=8))["weights"] == base["weights"]


def write_recipe(tmp_path, model):
    (tmp_path / "rows.jsonl").write_text('{"text": "good bad", "label": "1"}\n' * 8)
    values = {
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "prompt": "{text}:", "target": " {label}"},
        "adapter": {"r": 3, "target_modules": ["q_proj"]},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4},
        "eval": {"before": False},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_plan_prints_json_and_a_table(run, tmp_path, tiny_llama_folder):
    file = write_recipe(tmp_path, tiny_llama_folder)
    status, out, err = run("plan", file, "--json")
    assert status == 0, err
    told = json.loads(out[out.index("{\n") :])
    assert told["peak_bytes"] == sum(part["bytes"] for part in told["parts"].values())
    assert told["seconds_per_step"] > 0
    assert told["fits"] is True
    assert told["lengths"]["longest"] < 20
    status, out, _ = run("plan", file, "--no-calibration", "--gpus", 2, "--gpu-memory", 24)
    assert status == 0
    for word in ("weights", "activations", "together", "2 processes, ddp", "fits in 24.00 GiB"):
        assert word in out
    status, _, err = run("plan", file, "model.path=no/such/model")
    assert status == 2
    assert "there is no model folder" in err


def test_train_tells_its_memory_and_refuses_what_cannot_fit(run, tmp_path, tiny_llama_folder, monkeypatch):
    file = write_recipe(tmp_path, tiny_llama_folder)
    monkeypatch.setattr("doralib.training.plan.estimate.read_machine_memory", lambda: GIB // 16)
    status, out, err = run("train", file)
    assert status == 2
    assert "this run does not fit" in err
    assert "--no-memory-check" in err
    assert not (tmp_path / "run").exists()
    status, out, err = run("train", file, "--no-memory-check")
    assert status == 0, err
    assert "memory: about" in out


def test_a_container_has_less_than_its_machine(monkeypatch, tmp_path):
    file = tmp_path / "memory.max"
    file.write_text("1048576\n")
    monkeypatch.setattr(process, "_CONTAINER", file)
    assert process.read_machine_memory() == 1048576
    file.write_text("max\n")
    assert process.read_machine_memory() > 1048576


def test_no_value_is_made(llamas):
    found = Skeleton(recipe(llamas / "8b"), AutoConfig.from_pretrained(llamas / "8b"), None).adapted(2)
    assert {p.device.type for p in found.parameters()} == {"meta"}
    assert {b.device.type for b in found.buffers()} == {"meta"}
    assert isinstance(next(found.parameters()), torch.nn.Parameter)
    with pytest.raises(UsageError, match="no model folder"):
        estimate_run(recipe(llamas / "9b"))
