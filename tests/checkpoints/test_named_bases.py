"""The base that an adapter's own settings name is other people's text: it is looked for, and never fetched or run."""

import json

import pytest
import torch

from doralib.checkpoints.load import load_model
from doralib.errors import DoraError, UsageError
from doralib.files import write_tensors

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "above" / "adapter"
    folder.mkdir(parents=True)
    tensors = {f"{LAYER}.lora_A.weight": torch.zeros(2, 8), f"{LAYER}.lora_B.weight": torch.zeros(8, 2)}
    write_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def name_base(folder, base):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "base",
    [
        "/etc/passwd",
        "/nowhere/model",
        "https://evil.example/model",
        "file:///etc",
        "hf://evil/model",
        "//host/share",
        "C:\\models\\x",
        "~root/model",
        "../../../../../../../../etc",
        "a/../../b",
        "evil\x1b]0;title\x07",
        "two\nlines",
        "-rf",
    ],
)
def test_a_base_that_is_no_model_is_refused_without_a_look_elsewhere(adapter, base, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.create_connection", lambda *args, **_: asked.append(args))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name_base(adapter, base)
    with pytest.raises(UsageError) as caught:
        load_model(str(adapter))
    assert not asked
    assert "--base" in str(caught.value) or "model:" in str(caught.value)


@pytest.mark.parametrize("base", [5, ["x"], {"a": 1}, True, False, "x" * 5000, f"models/{'x' * 256}/y"])
def test_a_base_that_is_no_name_is_refused(adapter, base):
    name_base(adapter, base)
    with pytest.raises(DoraError, match=r"base_model_name_or_path should be a (text|name), and"):
        load_model(str(adapter))
