"""The recipes of DreamBooth against the examples of diffusers that the paper ran, and how large an adapter is."""

from dataclasses import fields
from functools import cache

import pytest
import torch
from transformers import TrainingArguments

from doralib.adapters.adapt import adapt
from doralib.adapters.registry import trainable
from doralib.training.arguments import check_arguments
from doralib.training.diffusion.families import FAMILIES
from doralib.training.recipe_file import packaged_recipes, read_recipe

diffusers = pytest.importorskip("diffusers", reason="pipelines are read by diffusers")
RECIPES = packaged_recipes()
DEFAULTS = {field.name: field.default for field in fields(TrainingArguments)}
# r, rate, optimizer, rows at a time, accumulated, steps, min-SNR
SETTINGS = {
    "sdxl": (4, 1e-4, "adamw_torch_fused", 1, 4, 500, None),
    "3d-icon": (8, 1.0, "prodigy", 3, 1, 1000, 5.0),
    "lego": (8, 1.0, "prodigy", 3, 1, 1000, 5.0),
}
ALL = [f"{name}{end}" for name in SETTINGS for end in ("", "-lora")]


@cache
def read(name):
    return read_recipe(f"dreambooth/{name}", [])


def test_these_are_all():
    assert sorted(name for name in RECIPES if name.startswith("dreambooth/")) == sorted(f"dreambooth/{n}" for n in ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_settings_are_the_examples(name):
    recipe = read(name)
    training, kind = DEFAULTS | check_arguments(recipe), name.removesuffix("-lora")
    r, rate, optimizer, batch, accumulated, steps, snr = SETTINGS[kind]
    adapter = recipe.adapter
    assert (adapter.method, adapter.r, adapter.lora_alpha) == ("lora" if name.endswith("lora") else "dora", r, r)
    assert (adapter.init_lora_weights, adapter.lora_dropout, adapter.target_modules) == ("gaussian", 0.0, None)
    asked = ("learning_rate", "optim", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")
    assert [training[key] for key in asked] == [rate, optimizer, batch, accumulated, steps]
    same = ("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    assert [training[key] for key in same] == ["constant", 0, 1e-4, 0.9, 0.999, 1e-8]
    assert (training["max_grad_norm"], training["gradient_checkpointing"], recipe.seed) == (1.0, True, 0)
    drawing = recipe.diffusion
    assert (drawing.resolution, drawing.vae, drawing.snr_gamma) == (1024, "madebyollin/sdxl-vae-fp16-fix", snr)
    assert (recipe.model.path, recipe.model.dtype) == ("stabilityai/stable-diffusion-xl-base-1.0", "bfloat16")
    if kind != "sdxl":
        # pivotal tuning: two tokens learn for half of the steps, and the encoders themselves do not
        assert (recipe.model.new_tokens, drawing.new_tokens_share) == (("<s0>", "<s1>"), 0.5)
        style = {"3d-icon": "3d icon", "lego": "lego set"}[kind]
        assert recipe.data.prompt == f"{style} in the style of <s0><s1>, {{prompt}}"
        assert recipe.data.train == {"3d-icon": "linoyts/3d_icon", "lego": "merve/lego_sets_latest"}[kind]
    assert not drawing.text_encoders


@pytest.mark.parametrize("name", ALL)
def test_lora_and_dora_differ_in_the_method_alone(name):
    ours, twin = (read(each).model_dump() for each in (name, name.removesuffix("-lora")))
    assert ours.pop("out") == f"runs/dreambooth/{name}"
    twin.pop("out")
    assert ours.pop("adapter") | {"method": "dora"} == twin.pop("adapter")
    assert ours == twin


@pytest.fixture(scope="module")
def unet():
    """SDXL's network without its values."""
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), down_block_types=blocks,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
            use_linear_projection=True, sample_size=128,
        )  # fmt: skip


def test_an_adapter_is_as_large_as_the_published_one(unet):
    """merve/lego-sdxl-dora has 49.4 MB, which is 46.45 MB of factors in float32, 2.66 MB of magnitudes, and names."""
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    config = read("lego").adapter
    (family,) = (family for family in FAMILIES if family.name == "sdxl")
    adapt(unet, config.model_copy(update={"target_modules": family.targets}))
    counts = {"factors": 0, "magnitudes": 0}
    for name, parameter in trainable(unet):
        counts["magnitudes" if "magnitude" in name else "factors"] += 4 * parameter.numel()
    assert {what: round(count / 1e6, 2) for what, count in counts.items()} == {"factors": 46.45, "magnitudes": 2.66}
