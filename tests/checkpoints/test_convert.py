"""`doralib convert`, and the best LoRA in place of DoRA."""

import json
from pathlib import Path

import pytest
import torch
from adapted import move

import doralib
from doralib.adapters.load import read_for_model
from doralib.adapters.registry import trainable
from doralib.checkpoints.convert import TARGETS, ConversionRequest, convert_adapter
from doralib.checkpoints.lowrank import find_nearest_lora
from doralib.cli.convert import convert_and_show
from doralib.errors import DoraError, UsageError
from doralib.files import read_json, read_tensors, write_tensors
from doralib.formats.base import Hints
from doralib.functional import merged_change
from doralib.state import LayerAdapter

TEXTS = ("the movie was wonderful", "a dull film")


@pytest.fixture
def trained(tiny_llama, tiny_llama_folder, tmp_path):
    """The folder of an adapter that has moved a lot, and its base."""
    model, _ = tiny_llama
    config = doralib.DoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "v_proj", "up_proj"))
    doralib.adapt(model, config)
    with torch.no_grad():
        for name, p in trainable(model):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            p.copy_(p * (1 + 0.1 * noise) if "magnitude" in name else 0.1 * noise)
    doralib.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", str(tiny_llama_folder)


@pytest.mark.parametrize(
    "to", [name for name in TARGETS if name not in ("tensorrt", "lora", "gguf", "diffusers", "ai-toolkit")]
)
def test_there_and_back(to, trained, tmp_path):
    adapter, base = trained
    convert_adapter(ConversionRequest(adapter, to, tmp_path / "there", base=base))
    convert_adapter(ConversionRequest(tmp_path / "there", "peft", tmp_path / "back", base=base))
    want, got = (read_for_model(folder)[1].layers for folder in (adapter, tmp_path / "back"))
    assert got.keys() == want.keys()
    for name, layer in want.items():
        torch.testing.assert_close(
            got[name].b_OR @ got[name].a_RI * got[name].scale, layer.b_OR @ layer.a_RI * layer.scale
        )
        assert torch.equal(got[name].m_O, layer.m_O)


def test_what_is_written_for_peft_loads_and_answers_the_same(trained, tmp_path, tiny_llama_folder):
    from transformers import AutoModelForCausalLM

    adapter, _ = trained
    convert_adapter(ConversionRequest(adapter, "mlx", tmp_path / "mlx"))
    convert_adapter(ConversionRequest(tmp_path / "mlx", "peft", tmp_path / "peft"))
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for folder in (adapter, tmp_path / "peft"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
        logits.append(doralib.load_adapter(model, folder).eval()(ids).logits)
    torch.testing.assert_close(*logits)


def test_tensorrt_needs_the_base(trained, tmp_path):
    adapter, base = trained
    settings = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="give --base MODEL"):
        convert_adapter(ConversionRequest(adapter, "tensorrt", tmp_path / "trt"))
    done = convert_adapter(ConversionRequest(adapter, "tensorrt", tmp_path / "trt", base=base))
    assert "--dora_plugin=enable" in done.notes[0]
    weights, ours = read_tensors(Path(base) / "model.safetensors"), read_for_model(adapter)[1].layers
    written = read_tensors(tmp_path / "trt" / "adapter_model.safetensors")
    for name, layer in ours.items():
        V = weights[f"{name}.weight"].double() + layer.scale * layer.b_OR.double() @ layer.a_RI.double()
        want = layer.m_O.double() / V.norm(dim=1)
        torch.testing.assert_close(written[f"base_model.model.{name}.lora_magnitude_vector"].double(), want)


def test_tensorrt_is_read_with_the_base(trained, tmp_path, tiny_llama_folder):
    from transformers import AutoModelForCausalLM

    adapter, base = trained
    convert_adapter(ConversionRequest(adapter, "tensorrt", tmp_path / "trt", base=base))
    with pytest.raises(UsageError, match="give --base MODEL"):
        convert_adapter(ConversionRequest(tmp_path / "trt", "peft", tmp_path / "back"))
    done = convert_adapter(ConversionRequest(tmp_path / "trt", "peft", tmp_path / "back", base=base))
    assert done.source == "tensorrt"
    ours, back = (read_for_model(folder)[1].layers for folder in (adapter, tmp_path / "back"))
    assert ours.keys() == back.keys()
    for name, layer in ours.items():
        torch.testing.assert_close(back[name].m_O, layer.m_O)
    logits = []
    for folder in (adapter, tmp_path / "trt"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
        logits.append(doralib.load_adapter(model, folder).eval()(torch.arange(6)[None]).logits)
    torch.testing.assert_close(*logits)


def test_requests_that_cannot_be_right(trained, tmp_path):
    adapter, _ = trained
    for request, why in [
        (ConversionRequest(adapter, "kohia", tmp_path / "x"), "did you mean 'kohya'"),
        (ConversionRequest(adapter, "nvlabs", tmp_path / "x"), "is read, not written"),
        (ConversionRequest(adapter, "lora", tmp_path / "x"), "needs --rank"),
        (ConversionRequest(adapter, "lora", tmp_path / "x", rank=0), "--rank 0"),
        (ConversionRequest(adapter, "mlx", tmp_path / "x", rank=4), "--rank and texts belong to --to lora"),
        (ConversionRequest(adapter, "kohya", tmp_path / "x", given=Hints(component="vae")), "--component vae"),
    ]:
        with pytest.raises(UsageError, match=why):
            convert_adapter(request)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_lora_is_the_nearest_of_its_rank(rank, trained, tmp_path):
    adapter, base = trained
    done = convert_adapter(ConversionRequest(adapter, "lora", tmp_path / "lora", base=base, rank=rank))
    config, state = read_for_model(tmp_path / "lora")
    assert config.method == "lora"
    weights, ours = read_tensors(Path(base) / "model.safetensors"), read_for_model(adapter)[1].layers
    assert [each.layer for each in done.errors] == list(ours)
    for each in done.errors:
        W, layer, lora = weights[f"{each.layer}.weight"].double(), ours[each.layer], state.layers[each.layer]
        V = W + layer.scale * layer.b_OR.double() @ layer.a_RI.double()
        change = (layer.m_O.double() / V.norm(dim=1))[:, None] * V - W
        least = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
        missed = (change - lora.scale * lora.b_OR.double() @ lora.a_RI.double()).norm() / change.norm()
        # float32 factors of an exact decomposition: Eckart and Young's least, to rounding
        assert missed.item() == pytest.approx(least.item(), rel=1e-4)
        assert each.relative == pytest.approx(least.item(), rel=1e-4)


def test_at_full_rank_the_logits_are_the_adapters_and_at_rank_1_merging_is_suggested(trained, tmp_path, capsys):
    adapter, base = trained
    full = convert_adapter(ConversionRequest(adapter, "lora", tmp_path / "full", base=base, rank=64, texts=TEXTS))
    assert full.logits < 1e-5
    low = convert_and_show(ConversionRequest(adapter, "lora", tmp_path / "low", base=base, rank=1, texts=TEXTS))
    assert low.logits > 100 * full.logits
    assert max(each.relative for each in low.errors) > 0.1
    shown = capsys.readouterr().out
    assert "logits differ by" in shown
    assert "doralib merge" in shown


def test_large_weights_are_decomposed_nearly_as_well(monkeypatch):
    monkeypatch.setattr("doralib.checkpoints.lowrank._WHOLE", 32)
    U, V = torch.randn(96, 6), torch.randn(6, 80)
    change = U @ V + 0.3 * torch.randn(96, 80)  # a flat rest, the hard case for a power iteration
    least = torch.linalg.svdvals(change.double())[6:].norm().item()
    layer, missed = find_nearest_lora(change, 6)
    assert least <= missed * (1 + 1e-6)
    assert missed < 1.01 * least
    torch.rand(1)
    again, _ = find_nearest_lora(change, 6)
    assert torch.equal(again.a_RI, layer.a_RI), "the same adapter gives the same file"


def test_no_change_is_no_error_and_a_small_one_is_not_lost_in_rounding():
    W = torch.randn(9, 7) * 100
    start = LayerAdapter(torch.randn(2, 7), torch.zeros(9, 2), W.norm(dim=1), 1.0)
    assert merged_change(W, *start.factors, start.m_O, start.scale).norm() < 1e-4
    lora, missed = find_nearest_lora(torch.zeros(9, 7), 2)
    assert (missed, lora.b_OR.norm().item()) == (0.0, 0.0)
    tiny_step = LayerAdapter(1e-6 * torch.randn(2, 7), torch.randn(9, 2), None, 1.0)
    want = tiny_step.b_OR.double() @ tiny_step.a_RI.double()
    torch.testing.assert_close(
        merged_change(W, *tiny_step.factors, tiny_step.m_O, tiny_step.scale).double(), want, rtol=1e-5, atol=1e-12
    )


def test_a_pipelines_adapter_becomes_one_models(tmp_path):
    from safetensors.torch import save_file

    tensors = {}
    for part, name in {"unet": "down_blocks.0.to_q", "text_encoder": "text_model.q_proj"}.items():
        tensors |= {
            f"{part}.{name}.lora_A.weight": torch.randn(2, 6),
            f"{part}.{name}.lora_B.weight": torch.randn(8, 2),
        }
        tensors[f"{part}.{name}.lora_magnitude_vector"] = torch.rand(8)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UsageError, match=r"several parts of a pipeline \(text_encoder, unet\)"):
        convert_adapter(ConversionRequest(tmp_path, "peft", tmp_path / "out"))
    done = convert_adapter(ConversionRequest(tmp_path, "peft", tmp_path / "out", given=Hints(component="unet")))
    assert list(read_for_model(tmp_path / "out")[1].layers) == ["down_blocks.0.to_q"]
    assert "1 layers of other parts" in done.notes[1]


def test_an_adapter_of_another_model_is_refused(trained, tmp_path):
    adapter, base = trained
    tensors = read_tensors(adapter / "adapter_model.safetensors")

    write_tensors(
        adapter / "adapter_model.safetensors", {k.replace("layers.1", "layers.9"): v for k, v in tensors.items()}
    )
    with pytest.raises(DoraError, match="does not fit the base"):
        convert_adapter(ConversionRequest(adapter, "lora", tmp_path / "out", base=base, rank=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pipeline", "single file"])
def test_a_kohya_files_names_are_looked_up_in_a_pipeline(kind, tmp_path):
    """LyCORIS' names, by the base's own, to diffusers' and back."""
    modules = {"unet.down_blocks.0.to_q": (8, 6), "text_encoder.text_model.q_proj": (6, 6)}
    if kind == "pipeline":
        base = tmp_path / "base"
        for name, shape in modules.items():
            part, _, inner = name.partition(".")
            file = "diffusion_pytorch_model" if part == "unet" else "model"
            write_tensors(base / part / f"{file}.safetensors", {f"{inner}.weight": torch.randn(shape)})
        (base / "model_index.json").write_text("{}")
    else:
        base = tmp_path / "base.safetensors"
        heads = {"unet": "model.diffusion_model", "text_encoder": "cond_stage_model.transformer"}
        stored = {f"{heads[name.partition('.')[0]]}.{name.partition('.')[2]}": shape for name, shape in modules.items()}
        write_tensors(base, {f"{name}.weight": torch.randn(shape) for name, shape in stored.items()})
    tensors = {}
    for key, (O, I) in zip(
        ("lora_unet_down_blocks_0_to_q", "lora_te_text_model_q_proj"), modules.values(), strict=True
    ):
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = torch.randn(2, I), torch.randn(O, 2)
        tensors[f"{key}.alpha"], tensors[f"{key}.dora_scale"] = torch.tensor(1.0), torch.rand(O, 1)
    write_tensors(tmp_path / "kohya.safetensors", tensors)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    done = convert_adapter(ConversionRequest(tmp_path / "kohya.safetensors", "diffusers", there, base=str(base)))
    assert (done.source, done.layers) == ("kohya", 2)
    convert_adapter(ConversionRequest(there, "kohya", back))
    again = read_tensors(back)
    for key, value in tensors.items():
        assert torch.equal(again[key], value)


def test_shared_random_matrices_go_to_a_lora_and_nowhere_else(tiny_llama, tiny_llama_folder, tmp_path):
    model, _ = tiny_llama
    doralib.adapt(model, doralib.DoraConfig(method="dvora", r=6, target_modules=("q_proj", "up_proj", "down_proj")))
    move(model)
    doralib.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UsageError, match="dvora shares its random matrices"):
        convert_adapter(ConversionRequest(tmp_path / "adapter", "kohya", tmp_path / "out"))
    request = ConversionRequest(
        tmp_path / "adapter", "lora", tmp_path / "lora", base=str(tiny_llama_folder), rank=48, texts=TEXTS
    )
    assert convert_adapter(request).logits < 1e-5
