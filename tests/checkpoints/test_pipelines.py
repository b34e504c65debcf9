"""Adapters of whole pipelines: files of all parts, both spellings of CLIP's text encoder, merged into the pipeline."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="diffusers is not installed here")

from pipelines import make_pipeline

from doralib.adapters.adapt import adapt
from doralib.adapters.load import load_adapter
from doralib.adapters.merge import merge
from doralib.adapters.registry import state_of
from doralib.adapters.save import save_adapter
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.pipelines import find_pipeline, join_parts, load_pipeline, make_empty_pipeline
from doralib.cli.main import app
from doralib.errors import DoraError
from doralib.files import read_tensors, write_tensors
from doralib.formats import FORMATS
from doralib.formats.base import Hints
from doralib.formats.files import read_any_format, write_raw_adapter
from doralib.formats.tensors import make_config
from doralib.functional import merge_weight
from doralib.recipe import ModelSettings
from doralib.state import AdapterState, LayerAdapter

TARGETS = ("to_q", "to_out.0", "q_proj", "out_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "sdxl"
    make_pipeline("sdxl", folder)
    return folder


def load_parts(base):
    return join_parts(load_pipeline(ModelSettings(path=str(base))))


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """The parts with an adapter that does something, and the folder that it is saved in."""
    parts = adapt(load_parts(base), {"r": 2, "lora_alpha": 3, "target_modules": TARGETS})
    torch.manual_seed(5)
    for name, p in parts.named_parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p) * (0.1 if name.endswith("vector") else 1)
    parts.name_or_path = str(base)
    folder = tmp_path_factory.mktemp("adapter") / "run"
    save_adapter(parts, folder)
    return SimpleNamespace(parts=parts, folder=folder, state=state_of(parts))


def write(name, adapted, folder, hints=None):
    form = FORMATS[name]
    config, state = read_any_format(adapted.folder, Hints())[1].config, adapted.state
    return write_raw_adapter(form.write(config, state, hints or Hints()), form, folder / form.tensors_file)


def rewrite(file, out, old, new):
    write_tensors(out, {key.replace(old, new): value for key, value in read_tensors(file).items()})


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_a_file_of_all_parts_comes_back(name, base, adapted, tmp_path):
    """Written with `text_model` in the names of both encoders, and found in the class that has none."""
    file = write(name, adapted, tmp_path)
    keys = [key for key in read_tensors(file) if key.startswith(("text_encoder", "lora_te"))]
    assert keys
    assert all("text_model" in key for key in keys)
    parts = load_adapter(load_parts(base), file)
    state = state_of(parts)
    assert state.layers.keys() == adapted.state.layers.keys()
    assert any(name.startswith("text_encoder.encoder.") for name in state.layers)
    assert any(name.startswith("text_encoder_2.text_model.encoder.") for name in state.layers)
    for name, layer in adapted.state.layers.items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(state.layers[name].tensors()[key], tensor), name
        assert state.layers[name].scale == pytest.approx(layer.scale, rel=1e-6)


def test_names_without_text_model_are_found_too(base, adapted, tmp_path):
    """As PEFT itself would name the newer class, in a file of diffusers."""
    tensors = {
        key.replace("text_model.", ""): value
        for key, value in read_tensors(write("diffusers", adapted, tmp_path)).items()
    }
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "other.safetensors")
    state = state_of(load_adapter(load_parts(base), tmp_path / "other.safetensors"))
    assert state.layers.keys() == adapted.state.layers.keys()


def weights(base):
    return {name: p.detach() for name, p in load_parts(base).named_parameters()}


@pytest.mark.parametrize("name", ["peft", "diffusers", "kohya"])
def test_merged_into_the_pipeline(name, base, adapted, tmp_path):
    """Every part as it is merged on the live model, bit for bit; all else copied."""
    file = adapted.folder if name == "peft" else write(name, adapted, tmp_path)
    out = tmp_path / "merged"
    typed = ["merge", str(file), "--base", str(base), "--out", str(out), "--verify", "exact"]
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.count("replayed bit for bit") == 3
    live = {key: p.detach() for key, p in merge(load_adapter(load_parts(base), file)).named_parameters()}
    merged = weights(out)
    assert live.keys() == merged.keys()
    assert all(torch.equal(live[key], merged[key]) for key in live)
    assert (out / "vae/config.json").read_bytes() == (base / "vae/config.json").read_bytes()
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    assert find_pipeline(str(out)) == str(out)
    again = CliRunner().invoke(app, [*typed, "--overwrite"])
    assert again.exit_code == 0, (again.output, again.exception)


def test_one_part_alone(base, adapted, tmp_path):
    out = tmp_path / "unet"
    done = CliRunner().invoke(app, ["merge", str(adapted.folder), "--base", str(base / "unet"), "--out", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "was trained on" not in done.output
    assert "8 layers of other parts were not asked for" in " ".join(done.output.split())
    whole = load_adapter(load_parts(base), adapted.folder)
    live = {key: p.detach() for key, p in merge(whole).named_parameters()}
    merged = read_tensors(out / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(live[f"unet.{key}"], value) for key, value in merged.items())


def test_a_single_file_has_no_config_and_square_weights(adapted, tmp_path):
    """Weights under the original code's names in one .safetensors: rows are outputs there, as everywhere in torch."""
    W = {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": torch.randn(4, 4)}
    (tmp_path / "base").mkdir()
    write_tensors(tmp_path / "base/sd.safetensors", W)
    layer = LayerAdapter(torch.randn(2, 4), torch.randn(4, 2), torch.rand(4), 1.5)
    state = AdapterState({"unet.middle_block.1.transformer_blocks.0.attn1.to_q": layer})
    form = FORMATS["kohya"]
    write_raw_adapter(form.write(make_config(state.layers), state, Hints()), form, tmp_path / "lora.safetensors")
    merge_checkpoint(tmp_path / "lora.safetensors", tmp_path / "base/sd.safetensors", tmp_path / "out")
    merged = next(iter(read_tensors(next((tmp_path / "out").glob("*.safetensors"))).values()))
    want = merge_weight(next(iter(W.values())), *layer.factors, layer.m_O, layer.scale)
    torch.testing.assert_close(merged, want)


def test_an_adapter_of_another_pipeline(base, adapted, tmp_path):
    tensors = {
        key.replace("attentions.0", "attentions.7"): t
        for key, t in read_tensors(write("diffusers", adapted, tmp_path)).items()
    }
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(DoraError, match=r"attentions.7"):
        load_adapter(load_parts(base), tmp_path / "other.safetensors")
    done = CliRunner().invoke(
        app, ["merge", str(tmp_path / "other.safetensors"), "--base", str(base), "--out", str(tmp_path / "m")]
    )
    assert done.exit_code != 0
    assert not (tmp_path / "m").exists()


@pytest.mark.interop
def test_lycoris_merges_the_same_weights(base, adapted, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed here")
    file = write("kohya", adapted, tmp_path)
    want = {key: p.detach() for key, p in merge(load_adapter(load_parts(base), file)).named_parameters()}
    unet = load_parts(base)["unet"]
    alone = {key: value for key, value in read_tensors(file).items() if key.startswith("lora_unet_")}
    renamed = {key.replace("lora_unet_", "lycoris_"): value for key, value in alone.items()}
    network, _ = lycoris.create_lycoris_from_weights(1.0, None, unet, weights_sd=renamed)
    network.merge_to(1.0)
    for name, p in unet.named_parameters():
        torch.testing.assert_close(p.detach(), want[f"unet.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: index.pop("_class_name"), "names no class of diffusers'"),
        (lambda index: index.update(_class_name=7), "names no class of diffusers'"),
        (
            lambda index: index.update(_class_name="NoSuchPipeline"),
            "a file in it may be missing, truncated",
        ),
        (lambda index: index.pop("vae"), "a file in it may be missing, truncated"),
        (
            lambda index: index.update(unet=["diffusers", "NoSuchNetwork"]),
            "a file in it may be missing, truncated",
        ),
        (lambda index: index.update(unet="diffusers"), "a file in it may be missing, truncated"),
    ],
)
@pytest.mark.parametrize("load", [load_pipeline, make_empty_pipeline])
def test_an_index_that_is_damaged_is_told(base, tmp_path, change, told, load):
    damaged = shutil.copytree(base, tmp_path / "base")
    index = json.loads((damaged / "model_index.json").read_text())
    change(index)
    (damaged / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DoraError, match=told):
        load(ModelSettings(path=str(damaged)))
