"""kohya's SDXL files by the original code's names, on a base in diffusers' layout; and folders of several variants."""

import re

import pytest
import torch

from doralib.checkpoints.convert import ConversionRequest, convert_adapter
from doralib.errors import DoraError
from doralib.files import read_tensors, write_json, write_tensors
from doralib.formats.unet_names import find_diffusers_names, find_original_names

# by the architecture of SDXL: three levels of two layers, attention in the lower two
GOLDEN = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
    "down_blocks.1.attentions.1.proj_in": "input_blocks.5.1.proj_in",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.attentions.0.proj_in": "input_blocks.7.1.proj_in",
    "down_blocks.2.attentions.1.proj_out": "input_blocks.8.1.proj_out",
    "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2": "output_blocks.2.1.transformer_blocks.9.ff.net.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
# what counts a level's layers
COUNTED = [f"down_blocks.{level}.resnets.{i}.conv1" for level in range(3) for i in range(2)]
COUNTED += [f"up_blocks.{level}.resnets.{i}.conv1" for level in range(3) for i in range(3)]


def test_names_of_sdxl():
    found = find_original_names([*GOLDEN, *COUNTED])
    assert {name: found[name] for name in GOLDEN} == GOLDEN
    assert find_diffusers_names(found.values()) == {own: name for name, own in found.items()}


def make_unet(kind):
    from diffusers import UNet2DConditionModel

    same = {"sample_size": 8, "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 2}
    if kind == "sdxl":
        return UNet2DConditionModel(
            **same,
            block_out_channels=(4, 8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
            use_linear_projection=True,
        )
    return UNet2DConditionModel(**same, block_out_channels=(4, 4, 8, 8))  # Stable Diffusion 1.5


def weights_of(unet):
    return {name.removesuffix(".weight"): p for name, p in unet.state_dict().items() if name.endswith(".weight")}


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_every_module_by_diffusers_own_converter_of_checkpoints(kind):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = make_unet(kind)
    names, state = find_original_names(weights_of(unet)), unet.state_dict()
    assert names.keys() == weights_of(unet).keys()
    assert find_diffusers_names(names.values()) == {own: name for name, own in names.items()}
    original = {}
    for key, tensor in state.items():
        module, _, field = key.rpartition(".")
        original[f"model.diffusion_model.{names[module]}.{field}"] = tensor
    converted = convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    assert converted.keys() == state.keys()
    for key, tensor in state.items():
        assert converted[key] is tensor, key


@pytest.mark.interop
def test_a_kohya_file_of_sdxl_is_read_as_diffusers_reads_it(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionXLPipeline

    unet = make_unet("sdxl")
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    write_json(tmp_path / "pipeline" / "model_index.json", {})
    weights = weights_of(unet)
    names = find_original_names(weights)
    tensors = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and ("attn" in name or ".ff." in name or name.endswith(("proj_in", "proj_out"))):
            key = f"lora_unet_{names[name].replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1])
            tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2)
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    assert any("input_blocks_4_1_transformer_blocks_0_attn1_to_q" in key for key in tensors)
    file = tmp_path / "kohya.safetensors"
    write_tensors(file, tensors)
    theirs, alphas = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=unet.config)
    # its older way of saying attn.to_q
    theirs = {re.sub(r"processor\.to_(q|k|v)_lora", r"to_\1.lora", key): tensor for key, tensor in theirs.items()}
    theirs = {key.replace("processor.to_out_lora", "to_out.0.lora"): tensor for key, tensor in theirs.items()}
    done = convert_adapter(
        ConversionRequest(file, "diffusers", tmp_path / "ours.safetensors", base=str(tmp_path / "pipeline"))
    )
    assert done.layers == len(tensors) // 3
    ours = read_tensors(tmp_path / "ours.safetensors")
    pairs = {key.partition(".lora")[0] for key in ours}
    assert {key.partition(".lora")[0] for key in theirs} == pairs
    for name in pairs:
        ends = (("down", "A"), ("up", "B"))
        for end, letter in ends:
            want = theirs.get(f"{name}.lora.{end}.weight", theirs.get(f"{name}.lora_{letter}.weight"))
            assert torch.equal(ours[f"{name}.lora.{end}.weight"], want)
    assert set(alphas.values()) == {1.0}


def kohya_file(path, **shapes):
    tensors = {}
    for key, (O, I) in shapes.items():
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = torch.randn(2, I), torch.randn(O, 2)
        tensors[f"{key}.alpha"], tensors[f"{key}.dora_scale"] = torch.tensor(1.0), torch.rand(O, 1)
    write_tensors(path, tensors)
    return path


MODULES = {
    "down_blocks.0.downsamplers.0.conv": (4, 4, 3, 3),
    "down_blocks.0.resnets.0.conv1": (4, 4, 3, 3),
    "down_blocks.0.resnets.1.conv1": (4, 4, 3, 3),
    "down_blocks.1.resnets.0.conv1": (4, 4, 3, 3),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 6),
}
KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def save_unet(folder, files=("diffusion_pytorch_model.safetensors",), seeds=(0,)):
    for file, seed in zip(files, seeds, strict=True):
        torch.manual_seed(seed)
        write_tensors(folder / file, {f"{name}.weight": torch.randn(shape) for name, shape in MODULES.items()})
    write_json(folder / "config.json", {"_class_name": "UNet2DConditionModel"})
    return folder


@pytest.mark.parametrize("layout", ["pipeline", "part", "alone"])
def test_original_names_in_every_verb(layout, tmp_path, run):
    """The base is a pipeline's folder, its part, or a U-Net that stands alone."""
    unet = save_unet(tmp_path / ("model" if layout == "alone" else "pipeline/unet"))
    if layout != "alone":
        write_json(unet.parent / "model_index.json", {})
    file = kohya_file(tmp_path / "lora.safetensors", **{KEY: (8, 6)})
    base = unet.parent if layout == "pipeline" else unet
    status, out, err = run("convert", file, "--to", "peft", "--base", base, "--out", tmp_path / "peft")
    assert status == 0, out + err
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert f"base_model.model.{name}.lora_A.weight" in read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    status, out, err = run("merge", file, "--base", unet, "--out", tmp_path / "merged", "--verify", "exact")
    assert status == 0, out + err
    old, new = (read_tensors(folder / "diffusion_pytorch_model.safetensors") for folder in (unet, tmp_path / "merged"))
    assert {key for key in old if not torch.equal(old[key], new[key])} == {f"{name}.weight"}


def test_diffusers_names_on_a_checkpoint_in_the_original_layout(tmp_path, run):
    """kohya's files of SD 1.5 have diffusers' names; the base may be one file of the original code's."""
    names = find_original_names(MODULES)
    base = tmp_path / "checkpoints" / "sd15.safetensors"
    write_tensors(
        base, {f"model.diffusion_model.{names[name]}.weight": torch.randn(shape) for name, shape in MODULES.items()}
    )
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    file = kohya_file(tmp_path / "lora.safetensors", **{f"lora_unet_{name.replace('.', '_')}": (8, 6)})
    status, out, err = run("merge", file, "--base", base, "--out", tmp_path / "out", "--verify", "exact")
    assert status == 0, out + err
    old, new = (read_tensors(path) for path in (base, tmp_path / "out" / base.name))
    assert [key for key in old if not torch.equal(old[key], new[key])] == [
        f"model.diffusion_model.{names[name]}.weight"
    ]


def test_a_name_of_no_block_is_still_refused(tmp_path):
    unet = save_unet(tmp_path / "unet")
    file = kohya_file(tmp_path / "lora.safetensors", **{KEY.replace("4_1", "5_1"): (8, 6)})
    with pytest.raises(DoraError, match=r"input_blocks_5_1_.*: no module of the base model has this name"):
        convert_adapter(ConversionRequest(file, "peft", tmp_path / "x", base=str(unet)))


VARIANTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_of_two_variants(variant, tmp_path, run):
    unet = save_unet(tmp_path / "unet", VARIANTS, (0, 1))
    file = kohya_file(tmp_path / "lora.safetensors", **{KEY: (8, 6)})
    given = ("--variant", variant) if variant else ()
    status, out, err = run("merge", file, "--base", unet, "--out", tmp_path / "out", "--verify", "exact", *given)
    assert status == 0, out + err
    merged_name, other = VARIANTS[::-1] if variant else VARIANTS
    assert not (tmp_path / "out" / other).exists()
    old, new = (read_tensors(folder / merged_name) for folder in (unet, tmp_path / "out"))
    assert sum(not torch.equal(old[key], new[key]) for key in old) == 1
    assert (tmp_path / "out" / "config.json").is_file()
    status, out, err = run("convert", file, "--to", "peft", "--base", unet, "--out", tmp_path / "peft", *given)
    assert status == 0, out + err


def test_a_pipeline_of_two_variants(tmp_path, run):
    unet = save_unet(tmp_path / "pipeline" / "unet", VARIANTS, (0, 1))
    write_json(unet.parent / "model_index.json", {})
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.randn(4, 4)}
    write_tensors(unet.parent / "text_encoder" / "model.safetensors", text)
    file = kohya_file(tmp_path / "lora.safetensors", **{KEY: (8, 6)})
    for given in ((), ("--variant", "fp16")):
        out = tmp_path / f"out{len(given)}.safetensors"
        status, said, err = run("convert", file, "--to", "diffusers", "--base", unet.parent, "--out", out, *given)
        assert status == 0, said + err


def test_variants_that_are_not_there_and_none_that_is_the_models_own(tmp_path, run):
    files = [f"diffusion_pytorch_model.{variant}.safetensors" for variant in ("fp16", "ema")]
    unet = save_unet(tmp_path / "unet", files, (0, 1))
    file = kohya_file(tmp_path / "lora.safetensors", **{KEY: (8, 6)})
    given = ("merge", file, "--base", unet, "--out", tmp_path / "out")
    status, _, err = run(*given)
    assert status == 2
    assert "of several variants choose one with --variant" in err
    status, _, err = run(*given, "--variant", "fp32")
    assert status == 2
    assert "it has ema, fp16" in err
    assert run(*given, "--variant", "ema")[0] == 0
    status, _, err = run(*given, "--variant", "ema", "--verify", "--overwrite")
    assert status == 2
    assert "give --verify exact" in err


def test_a_sharded_variant_and_its_index(tmp_path, run):
    unet = tmp_path / "unet"
    save_unet(unet)
    tensors = read_tensors(unet / "diffusion_pytorch_model.safetensors")
    halves = [dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        name = f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors"
        write_tensors(unet / name, half)
        weight_map |= dict.fromkeys(half, name)
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    write_json(unet / index, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    file = kohya_file(tmp_path / "lora.safetensors", **{KEY: (8, 6)})
    given = ("merge", file, "--base", unet, "--verify", "exact")
    status, out, err = run(*given, "--out", tmp_path / "fp16", "--variant", "fp16")
    assert status == 0, out + err
    names = {path.name for path in (tmp_path / "fp16").glob("*.safetensors*")}
    assert names == {index, *weight_map.values()}
    status, out, err = run(*given, "--out", tmp_path / "plain")
    assert status == 0, out + err
    assert [path.name for path in (tmp_path / "plain").glob("*.safetensors*")] == [VARIANTS[0]]
