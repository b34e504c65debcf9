"""A DINOv2 in an ONNX file that torch exported, as transformers loads it: the same numbers, also for another size."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from doralib.checkpoints import onnx
from doralib.checkpoints.onnx import read_weights, write_dinov2
from doralib.errors import DoraError

GOLDEN = Path(__file__).parents[1] / "golden" / "onnx"


@pytest.fixture(scope="module")
def exported():
    return (GOLDEN / "model.onnx").read_bytes()


@pytest.mark.parametrize("side", [8, 12])
def test_the_tower_sees_as_the_exported_one(exported, side, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_HEAD", 8)
    write_dinov2(exported, side, tmp_path)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.image_size, model.embeddings.position_embeddings.shape[1]) == (side, 1 + (side // 2) ** 2)
    expected = load_file(GOLDEN / "expected.safetensors")
    with torch.no_grad():
        states = model(expected[f"base.pixels.{side}"]).last_hidden_state
    torch.testing.assert_close(states, expected[f"merged.states.{side}"], atol=2e-5, rtol=1e-4)
    pytest.importorskip("PIL", reason="pictures are read by pillow")
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").crop_size["height"] == side


def test_transposed_matrices_have_the_names_of_their_biases(exported):
    weights = read_weights(exported)
    for name in ("encoder.layer.1.mlp.fc1", "encoder.layer.0.attention.attention.query"):
        assert len(weights[f"backbone.{name}.weight"]) == len(weights[f"backbone.{name}.bias"])


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_refused(exported, damage):
    data = {"cut": exported[: len(exported) // 2], "empty": b"", "text": b"what is this?"}[damage]
    with pytest.raises(DoraError, match="no whole ONNX model"):
        read_weights(data)


def test_another_model_is_refused(tmp_path):
    # a graph without anything in it
    with pytest.raises(DoraError, match="no DINOv2"):
        write_dinov2(b"\x3a\x00", 8, tmp_path)
