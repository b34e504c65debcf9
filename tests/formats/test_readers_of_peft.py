"""Who reads the folder that we write: PEFT of today and before, and transformers' own reader."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import doralib
from doralib import DoraConfig
from doralib.errors import DoraError
from doralib.files import read_json, read_tensors, write_tensors
from doralib.formats.base import Hints
from doralib.formats.files import read_any_format

IDS = torch.arange(10)[None]
# where make interop puts them, each in a folder of its version
PEFTS = Path(os.environ.get("PEFTS", Path(sys.prefix) / "pefts"))
READ = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
import peft
from transformers import AutoModelForCausalLM
assert peft.__version__ == sys.argv[1], peft.__file__
try:
    import peft.tuners.lora.torchao as torchao
    torchao.is_torchao_available = lambda: False  # it knows an older one
except ImportError:
    pass
model = peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[2]).eval()
torch.save(model(torch.arange(10)[None]).logits.detach(), sys.argv[3])
"""


@pytest.fixture
def run(tmp_path):
    """A folder as `save_adapter` writes it, and the logits of its model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj", "down_proj")))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    doralib.save_adapter(model, tmp_path / "run")
    with torch.no_grad():
        return tmp_path / "run", model.eval()(IDS).logits


def test_transformers_own_reader(run):
    folder, want = run
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits, want)


def test_pefts_automatic_class(run):
    folder, want = run
    assert read_json(folder / "adapter_config.json")["task_type"] == "CAUSAL_LM"
    with torch.no_grad():
        torch.testing.assert_close(peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()(IDS).logits, want)


@pytest.mark.interop
@pytest.mark.parametrize("version", ["0.10.0", "0.13.2", "0.15.2", "0.18.0"])
def test_an_older_peft(version, run, tmp_path):
    if not (PEFTS / version).is_dir():
        pytest.skip(f"PEFT {version} is not in {PEFTS}")
    folder, want = run
    environment = {**os.environ, "PYTHONPATH": str(PEFTS / version)}
    command = [sys.executable, "-c", READ, version, str(folder), str(tmp_path / "got.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "got.pt", weights_only=True), want)


def test_both_keys_are_one_magnitude_to_us(run):
    folder, _ = run
    file = folder / "adapter_model.safetensors"
    tensors = read_tensors(file)
    twins = [key for key in tensors if key.endswith("lora_magnitude_vector.weight")]
    assert len(twins) == 4
    assert not read_any_format(folder, Hints())[1].notes
    write_tensors(file, {**tensors, twins[0]: 2 * tensors[twins[0]]})
    with pytest.raises(DoraError, match="two keys of one magnitude, with different numbers"):
        read_any_format(folder, Hints())
