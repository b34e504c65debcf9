"""`convert --for SERVER`: what that server does is said with the version seen, and the form that works is written."""

import pytest
import torch
from adapted import move
from conftest import make_llama
from transformers import AutoModelForCausalLM

import doralib
from doralib.adapters.load import read_for_model
from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.checkpoints.serving import SERVERS
from doralib.errors import UsageError
from doralib.files import read_json, read_tensors, write_tensors

IDS = torch.tensor([[5, 6, 7, 8, 9]])
LANGUAGE = [name for name in SERVERS if name not in ("diffusers", "comfyui")]
# what runs DoRA as it is, and in which format
RUNS_DORA = {"peft": "peft", "tensorrt-llm": "tensorrt"}
LORA_IN = {"llama.cpp": "gguf", "ollama": "gguf"}


def save(folder, **settings):
    given = {"r": 3, "lora_alpha": 6, "target_modules": ("q_proj", "down_proj")} | settings
    doralib.save_adapter(move(doralib.adapt(make_llama(), doralib.DoraConfig(**given)), 0.1), folder)
    return folder


def convert(adapter, server, out, base, rank=None):
    return convert_adapter(ConversionRequest(adapter, None, out, base=str(base), rank=rank, server=server))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_every_statement_says_which_version_it_is_about():
    for server in SERVERS.values():
        assert any(character.isdigit() for character in server.seen), server.name
        assert server.use, server.name


@pytest.mark.parametrize("server", LANGUAGE)
def test_a_dora_without_a_rank_loses_nothing(server, tiny_llama_folder, tmp_path):
    adapter = save(tmp_path / "adapter")
    done = convert(adapter, server, tmp_path / "out", tiny_llama_folder)
    said = done.notes[0]
    assert SERVERS[server].says in said
    assert f"seen: {SERVERS[server].seen}" in said
    want = logits(doralib.load_adapter(make_llama(), adapter))
    if server in RUNS_DORA:
        assert done.to == RUNS_DORA[server]
        got = doralib.load_adapter(make_llama(), tmp_path / "out")
    else:
        assert done.to == "a merged checkpoint"
        assert "--rank R" in said
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("server", LANGUAGE)
def test_a_dora_with_a_rank_goes_as_a_lora(server, tiny_llama_folder, tmp_path):
    adapter = save(tmp_path / "adapter")
    done = convert(adapter, server, tmp_path / "out", tiny_llama_folder, rank=32)
    assert done.to == LORA_IN.get(server, "peft")
    assert len(done.errors) == 4
    assert "so the nearest LoRA of rank 32 is written" in done.notes[0]
    if done.to == "peft":
        assert not read_json(tmp_path / "out" / "adapter_config.json")["use_dora"]
        want, got = (logits(doralib.load_adapter(make_llama(), each)) for each in (adapter, tmp_path / "out"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("server", LANGUAGE)
def test_a_lora_goes_as_it_is(server, tiny_llama_folder, tmp_path):
    adapter = save(tmp_path / "adapter", method="lora")
    done = convert(adapter, server, tmp_path / "out", tiny_llama_folder)
    assert done.to == LORA_IN.get(server, "peft")
    assert not done.errors
    assert "runs this LoRA" in done.notes[0]


@pytest.mark.parametrize("server", ["vllm", "sglang", "tensorrt-llm"])
@pytest.mark.parametrize("rank", [None, 40])
def test_a_server_of_one_scale_gets_one_scale(server, rank, tiny_llama_folder, tmp_path):
    """vLLM takes lora_alpha / r of the settings for every layer, whatever the patterns say."""
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 7}}
    adapter = save(tmp_path / "adapter", method="lora", **patterns)
    convert(adapter, server, tmp_path / "out", tiny_llama_folder, rank)
    settings = read_json(tmp_path / "out" / "adapter_config.json")
    assert not settings["rank_pattern"]
    assert not settings["alpha_pattern"]
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    tensors, want = read_tensors(tmp_path / "out" / "adapter_model.safetensors"), read_for_model(adapter)[1].layers
    for name, layer in want.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        assert len(a) == settings["r"] == b.shape[1]
        got = settings["lora_alpha"] / settings["r"] * b.double() @ a.double()
        torch.testing.assert_close(got, layer.scale * layer.b_OR.double() @ layer.a_RI.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("server", LANGUAGE)
def test_modules_trained_whole_go_where_they_are_read(server, tiny_llama_folder, tmp_path):
    adapter = save(tmp_path / "adapter", method="lora", modules_to_save=("lm_head",))
    done = convert(adapter, server, tmp_path / "out", tiny_llama_folder, rank=None)
    assert done.to == ("peft" if server == "peft" else "a merged checkpoint")


def test_random_matrices_that_layers_share_are_merged(tiny_llama_folder, tmp_path):
    adapter = save(tmp_path / "adapter", method="dvora", lora_alpha=32.0)
    want = logits(doralib.load_adapter(make_llama(), adapter))
    assert convert(adapter, "peft", tmp_path / "out", tiny_llama_folder).to == "a merged checkpoint"
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(got), want, rtol=1e-4, atol=1e-5)


def test_a_pipelines_part(tmp_path):
    """diffusers runs DoRA in its own files; ComfyUI takes the norm along the other axis, so it gets LoRA or a merge."""
    base = tmp_path / "pipeline" / "unet"
    name = "down_blocks.0.attentions.0.to_q"
    write_tensors(base / "diffusion_pytorch_model.safetensors", {f"{name}.weight": torch.randn(8, 6)})
    (base / "config.json").write_text("{}")
    (base.parent / "model_index.json").write_text("{}")
    tensors = {f"unet.{name}.lora.down.weight": torch.randn(2, 6), f"unet.{name}.lora.up.weight": torch.randn(8, 2)}
    tensors[f"unet.{name}.lora_magnitude_vector"] = torch.rand(8) + 0.5
    file = tmp_path / "pytorch_lora_weights.safetensors"
    write_tensors(file, tensors)
    assert convert(file, "diffusers", tmp_path / "diffusers", base).to == "diffusers"
    assert convert(file, "comfyui", tmp_path / "merged", base).to == "a merged checkpoint"
    assert convert(file, "comfyui", tmp_path / "lora.safetensors", base, rank=6).to == "kohya"
    key = f"lora_unet_{name.replace('.', '_')}"
    written = read_tensors(tmp_path / "lora.safetensors")
    assert set(written) == {f"{key}.{field}" for field in ("lora_down.weight", "lora_up.weight", "alpha")}
    weight = read_tensors(base / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    V = weight + tensors[f"unet.{name}.lora.up.weight"] @ tensors[f"unet.{name}.lora.down.weight"]
    V = tensors[f"unet.{name}.lora_magnitude_vector"][:, None] * V / V.norm(dim=1, keepdim=True)
    a, b = (written[f"{key}.lora_{side}.weight"] for side in ("down", "up"))
    got = weight + written[f"{key}.alpha"] / len(a) * b @ a
    torch.testing.assert_close(got, V, rtol=1e-4, atol=1e-5)


def test_the_command(tiny_llama_folder, tmp_path, run):
    adapter = save(tmp_path / "adapter")
    given = ("convert", adapter, "--base", tiny_llama_folder, "--out")
    status, out, _ = run(*given, tmp_path / "out", "--for", "vllm")
    assert status == 0
    assert "written as a merged checkpoint" in out
    assert "vLLM does not yet support DoRA" in " ".join(out.split())
    status, _, err = run(*given, tmp_path / "x", "--for", "vlm")
    assert status == 2
    assert "did you mean 'vllm'" in err
    for both in ((), ("--for", "vllm", "--to", "peft")):
        status, _, err = run(*given, tmp_path / "x", *both)
        assert status == 2
        assert "give either --to FORMAT or --for SERVER" in err
    status, _, err = run(*given, tmp_path / "x.gguf", "--for", "ollama")
    assert status == 2
    assert "a merged model is a folder" in err
    assert not (tmp_path / "x.gguf").exists()


def test_without_a_base_it_is_asked_for(tmp_path):
    adapter = save(tmp_path / "adapter")
    with pytest.raises(UsageError, match="--for vllm needs the base model, and the adapter names none: give --base"):
        convert_adapter(ConversionRequest(adapter, None, tmp_path / "x", server="vllm"))
