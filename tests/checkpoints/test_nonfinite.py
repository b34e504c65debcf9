"""NaN and infinite numbers, of an adapter and of a base, are told by the tensor's name; a flag lets them pass."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapted import move
from conftest import make_llama

import doralib
from doralib.config import DoraConfig
from doralib.errors import DoraError
from doralib.functional import is_finite

NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
RECIPE = """
model: {path: base}
data: {train: rows.jsonl, prompt: "{text}", target: " {text}"}
adapter: {r: 2, target_modules: [q_proj]}
training: {max_steps: 1, per_device_train_batch_size: 2}
out: run
"""


def harm(file: Path, *names: str, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    for name in names:
        tensors[name].view(-1)[1] = value
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def place(tmp_path, tiny_llama_folder, monkeypatch):
    shutil.copytree(tiny_llama_folder, tmp_path / "base")
    shutil.copytree(tiny_llama_folder, tmp_path / "sound")
    model = doralib.adapt(make_llama(), DoraConfig(r=2, target_modules=("q_proj",)))
    doralib.save_adapter(move(model), tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 4)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_of_a_base(place, run):
    harm(place / "base" / "model.safetensors", NORM, UP, value=float("nan"))
    told = {
        name: f"{name}: 1 of {count} numbers are NaN or infinite" for name, count in {NORM: 32, UP: "1,536"}.items()
    }
    for verb in (
        ["generate", "base", "--prompt", "a", "--max-new-tokens", "2"],
        ["generate", "adapter", "--base", "base", "--prompt", "a", "--max-new-tokens", "2"],
        ["eval", "base", "--tasks", "task.yaml"],
        ["train", "r.yaml"],
    ):
        if verb[0] == "eval":
            kind = "{kind: perplexity, name: p, data: rows.jsonl, text: text}"
            (place / "task.yaml").write_text(kind)
        status, _, err = run(*verb)
        assert status == 1, verb
        assert told[NORM] in err, verb
        assert told[UP] in err, verb
        assert "--allow-nonfinite" in err
    for shares in ([], ["--dtype", "float16"]):
        status, _, err = run("merge", "adapter", "--base", "base", "--out", "out", *shares)
        assert status == 1
        assert "the base holds such numbers there" in err
        assert not (place / "out").exists()
    options = ["--allow-nonfinite"]
    assert run("generate", "base", "--prompt", "a", "--max-new-tokens", "2", *options)[0] == 0
    assert run("merge", "adapter", "--base", "base", "--out", "out", "--verify", "exact", *options)[0] == 0
    merged, base = (safetensors.torch.load_file(place / name / "model.safetensors") for name in ("out", "base"))
    assert torch.equal(merged[NORM], base[NORM]) is False  # NaN is not itself
    assert torch.equal(merged[NORM].view(torch.int32), base[NORM].view(torch.int32))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_of_an_adapter(place, run, value):
    file = place / "adapter" / "adapter_model.safetensors"
    name = next(name for name in safetensors.torch.load_file(file) if "lora_B" in name)
    harm(file, name, value=value)
    verbs = [
        ["merge", "adapter", "--base", "sound", "--out", "out"],
        ["convert", "adapter", "--to", "mlx", "--out", "mlx"],
        ["convert", "adapter", "--to", "lora", "--rank", "4", "--base", "sound", "--out", "lora"],
        ["inspect", "adapter"],
        ["generate", "adapter", "--base", "sound", "--prompt", "a", "--max-new-tokens", "2"],
    ]
    for verb in verbs:
        status, _, err = run(*verb)
        assert status == 1, verb
        assert f"{name}: 1 of" in err, verb
        assert "NaN or infinite" in err
    for verb in (verbs[0], verbs[1], verbs[3]):
        status, _, err = run(*verb, "--allow-nonfinite")
        assert status == 0, (verb, err)
    with pytest.raises(DoraError, match="NaN or infinite"):
        doralib.load_adapter(make_llama(), place / "adapter")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_every_dtype_is_looked_at(dtype):
    plain = torch.ones(3, 5).to(dtype)
    assert is_finite(plain)
    assert is_finite(plain[:0])
    for value in (float("nan"), float("inf"), float("-inf")):
        if dtype != torch.float8_e4m3fn or value != value:
            changed = torch.ones(3, 5)
            changed[1, 2] = value
            assert not is_finite(changed.to(dtype)), value
    assert is_finite(torch.ones(3, dtype=torch.int64))
    # its sum is beyond float16
    assert is_finite(torch.full((9,), 6e4, dtype=torch.float16))
