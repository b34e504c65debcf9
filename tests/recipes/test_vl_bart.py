"""The recipes of VL-BART against Tables 2, 3 and 9 of the paper, and VL-Adapter's settings for the others' rows."""

import pytest
import torch
from conftest import make_tokenizer
from transformers import BartConfig

from doralib.adapters.adapt import adapt
from doralib.adapters.registry import trainable
from doralib.checkpoints.vl_bart import VLBart, extend_vocabulary
from doralib.training.arguments import check_arguments
from doralib.training.recipe_file import packaged_recipes, read_recipe

RECIPES = packaged_recipes()
# rate, batch, alpha, dropout, trained parameters
SETTINGS = {
    "image-dora": (1e-3, 300, 128, 0.0, 8_838_912),
    "image-lora": (1e-3, 500, 32, 0.1, 8_786_688),
    "image-full": (1e-4, 500, None, None, None),
    "video-dora": (2.4e-4, 40, 128, 0.0, 7_634_688),
    "video-lora": (3e-4, 50, 32, 0.1, 7_607_040),
    "video-full": (3e-5, 50, None, None, None),
}
PUBLISHED = {
    "image-dora": (65.8, 54.7, 73.1, 115.9, 77.4),
    "image-lora": (65.2, 53.6, 71.9, 115.3, 76.5),
    "image-full": (66.9, 56.7, 73.7, 112.0, 77.3),
    "video-dora": (76.3, 74.1, 45.8, 145.4, 85.4),
    "video-lora": (75.5, 72.9, 44.6, 140.9, 83.5),
    "video-full": (76.3, 73.9, 45.7, 154.0, 87.5),
}
TASKS = {"image": ("vqa", "gqa", "nlvr", "caption"), "video": ("tvqa", "how2qa", "tvc", "yc2c")}
BATCHES = {"vqa": 300, "gqa": 500, "nlvr": 100, "caption": 250}


@pytest.fixture(scope="module")
def bases():
    """facebook/bart-base without its values, for pictures and for videos."""
    sizes = {"vocab_size": 50_265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
    sizes |= {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    sizes |= {"encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    made = {}
    for kind in TASKS:
        visual = read_recipe(f"vl-bart/{kind}-dora", []).model.visual
        with torch.device("meta"):
            model = VLBart(BartConfig(**sizes, visual=visual.model_dump()))
        extend_vocabulary(model, make_tokenizer())
        made[kind] = model
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_the_papers(name, bases):
    recipe, (kind, _, method) = read_recipe(f"vl-bart/{name}", []), name.partition("-")
    training, (rate, batch, alpha, dropout, count) = check_arguments(recipe), SETTINGS[name]
    assert (training["learning_rate"], training["per_device_train_batch_size"]) == (rate, batch)
    assert training["num_train_epochs"] == {"image": 20, "video": 7}[kind]
    names = ("lr_scheduler_type", "warmup_steps", "adam_epsilon", "weight_decay", "max_grad_norm")
    assert [training[name] for name in names] == ["linear", 0.1, 1e-6, 0.01, 5]
    assert (recipe.seed, recipe.model.path, recipe.model.dtype) == (9595, "facebook/bart-base", "float32")
    assert (recipe.model.visual.features, recipe.model.visual.tokens) == {"image": (2048, 36), "video": (512, 64)}[kind]
    if kind == "image":
        sizes = {task: round(300 * ratio) for task, ratio in recipe.data.tasks.items()}
        assert sizes == BATCHES
    else:
        assert recipe.data.max_length == 600
    assert recipe.adapter.method == method
    if method != "full":
        assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.adapter.lora_dropout) == (128, alpha, dropout)
        model = adapt(bases[kind], recipe.adapter)
        try:
            assert sum(p.numel() for _, p in trainable(model)) == count
        finally:
            from doralib import remove

            remove(model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name):
    variant, kind = RECIPES[f"vl-bart/{name}"], name.partition("-")[0]
    assert variant.published == dict(zip((*TASKS[kind], "average"), PUBLISHED[name], strict=True))
    assert variant.reproduces == {"image": "Table 2", "video": "Table 3"}[kind]


def test_shares_are_those_of_table_2_and_3(bases):
    """In per cent of BART with its extra tokens and all that is added to it."""
    for kind, share in (("image", (5.93, 5.96)), ("video", (5.17, 5.19))):
        total = sum(p.numel() for p in bases[kind].parameters())
        for name, printed in zip(("lora", "dora"), share, strict=True):
            count = SETTINGS[f"{kind}-{name}"][-1]
            added = 36 * 2 * 128 * 768 + (36 * 768 if name == "dora" else 0)
            assert 100 * count / (total + added) == pytest.approx(printed, abs=0.005)
