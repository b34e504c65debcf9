"""The packaged recipes against the tables of the paper, and families of settings."""

import re
from functools import cache

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from doralib.adapters.adapt import adapt
from doralib.adapters.registry import trainable
from doralib.data.prompts import render_row
from doralib.errors import UsageError
from doralib.families import read_family
from doralib.training.arguments import check_arguments
from doralib.training.recipe_file import packaged_recipes, read_recipe

RECIPES = packaged_recipes()
QKVUD = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# sizes of the models: layers, hidden, intermediate, heads of keys and values, vocabulary
SIZES = {
    "llama-7b": (32, 4096, 11008, 32, 32000),
    "llama-13b": (40, 5120, 13824, 40, 32000),
    "llama2-7b": (32, 4096, 11008, 32, 32000),
    "llama3-8b": (32, 4096, 14336, 8, 128256),
}
PATHS = {
    "llama-7b": "yahma/llama-7b-hf",
    "llama-13b": "yahma/llama-13b-hf",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
}
# Table 8, and LLM-Adapters' settings for LoRA: the rate, the trained share in per cent, the average of the eight tasks
COMMONSENSE = {
    "llama-7b-lora-r32": (3e-4, 0.83, 74.7),
    "llama-7b-dora-r16": (2e-4, 0.43, 77.5),
    "llama-7b-dora-r32": (1e-4, 0.84, 78.4),
    "llama-13b-lora-r32": (3e-4, 0.67, 80.5),
    "llama-13b-dora-r16": (3e-4, 0.35, 80.8),
    "llama-13b-dora-r32": (2e-4, 0.68, 81.5),
    "llama2-7b-lora-r32": (3e-4, 0.83, 77.6),
    "llama2-7b-dora-r16": (2e-4, 0.43, 80.5),
    "llama2-7b-dora-r32": (2e-4, 0.84, 79.7),
    "llama3-8b-lora-r32": (3e-4, 0.70, 80.8),
    "llama3-8b-dora-r16": (1e-4, 0.35, 85.0),
    "llama3-8b-dora-r32": (1e-4, 0.71, 85.2),
    # Table 15
    "llama-7b-lora-r4": (3e-4, 0.10, 39.5),
    "llama-7b-lora-r8": (3e-4, 0.21, 40.7),
    "llama-7b-lora-r16": (3e-4, 0.42, 70.9),
    "llama-7b-lora-r64": (3e-4, 1.64, 65.8),
    "llama-7b-dora-r4": (2e-4, 0.11, 61.9),
    "llama-7b-dora-r8": (2e-4, 0.22, 77.9),
    "llama-7b-dora-r64": (2e-4, 1.65, 72.1),
    # Table 6
    "llama-7b-dora-r32-granular": (2e-4, 0.39, 77.5),
    "llama-13b-dora-r32-granular": (2e-4, 0.31, 81.3),
}
COUNTS = {
    "commonsense/llama-7b-lora-r32": 56_098_816,
    "commonsense/llama-7b-dora-r32": 56_975_360,
    "commonsense/llama-7b-dora-r16": 28_925_952,
    "commonsense/llama-13b-lora-r32": 87_818_240,
    "commonsense/llama-13b-dora-r32": 89_190_400,
    "commonsense/llama-13b-dora-r16": 45_281_280,
    "commonsense/llama3-8b-lora-r32": 56_623_104,
    "commonsense/llama3-8b-dora-r32": 57_409_536,
    "commonsense/llama-7b-dora-r32-granular": 26_525_696,
    "commonsense/llama-13b-dora-r32-granular": 41_451_520,
    "instruction/llama-7b-lora": 159_907_840,
    "instruction/llama2-7b-dora": 161_267_712,
    "instruction/llama2-7b-vera": 1_589_248,
    "instruction/llama-7b-dvora": 2_949_120,
}
# Tables 5 and 11: rank, rate, share in per cent, score of LLaMA-7B and of LLaMA2-7B
INSTRUCTION = {
    "lora": (64, 4e-4, 2.31, 5.1, 5.7),
    "dora": (64, 4e-4, 2.33, 5.5, 6.0),
    "vera": (1024, 4e-3, 0.02, 4.3, 5.5),
    "dvora": (1024, 4e-3, 0.04, 5.0, 6.0),
}


def base_of(name):
    return re.match("(llama2?3?-[0-9]+b)", name.partition("/")[2])[1]


@cache
def make_meta(base, layers):
    _, hidden, intermediate, kv, vocabulary = SIZES[base]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def count(name):
    """Trained parameters and all of the base: each of its layers is like the first."""
    base, recipe = base_of(name), read_recipe(name, [])
    layers = SIZES[base][0]
    whole = sum(p.numel() for p in make_meta(base, layers).parameters())
    make_meta.cache_clear()
    model = adapt(make_meta(base, 1), recipe.adapter)
    make_meta.cache_clear()
    return layers * sum(p.numel() for _, p in trainable(model)), whole


def rounds_to(value, printed):
    """Rounded or cut, as the paper's tables do both."""
    return printed in (round(value, 2), int(value * 100) / 100)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("commonsense/llama")])
def test_commonsense_as_the_paper_says(name):
    recipe, short = read_recipe(name, []), name.partition("/")[2]
    method, r = re.search("(dora|lora)-r([0-9]+)", short).groups()
    assert recipe.model.path == PATHS[base_of(name)]
    assert (recipe.adapter.method, recipe.adapter.r, recipe.adapter.lora_alpha) == (method, int(r), 2 * int(r))
    if "granular" in name:
        assert recipe.adapter.target_modules == ("q_proj", "k_proj", "v_proj")
        assert recipe.adapter.magnitude_modules == ("o_proj", "gate_proj", "up_proj", "down_proj")
    else:
        assert (recipe.adapter.target_modules, recipe.adapter.magnitude_modules) == (QKVUD, ())
    assert (recipe.adapter.lora_dropout, recipe.adapter.dropout_mode, recipe.adapter.detach_norm) == (
        0.05,
        "exact",
        True,
    )
    assert (recipe.data.max_length, recipe.data.too_long, recipe.data.loss_on) == (256, "truncate", "all")
    assert round(recipe.data.validation * 170_420) == 120
    training = check_arguments(recipe)
    assert training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) == 16
    assert (training["num_train_epochs"], training["warmup_steps"], training["lr_scheduler_type"]) == (3, 100, "linear")
    assert (training["optim"], training["weight_decay"]) == ("adamw_torch", 0)
    assert (training["eval_steps"], training["save_steps"], training["save_total_limit"]) == (80, 80, 3)
    assert recipe.out == f"runs/{name}"
    rate = COMMONSENSE[short][0] if short in COMMONSENSE else 3e-4
    assert training["learning_rate"] == rate
    published = RECIPES[name].published
    assert (published and published["average"]) == (COMMONSENSE[short][2] if short in COMMONSENSE else None)
    if published and len(published) > 1:
        scores = [value for task, value in published.items() if task != "average"]
        assert len(scores) == 8
        assert abs(sum(scores) / 8 - published["average"]) < 0.1
    assert bool(RECIPES[name].reproduces) == bool(published)


def test_every_published_row_has_its_recipe():
    assert {f"commonsense/{name}" for name in COMMONSENSE} <= RECIPES.keys()
    assert {
        f"commonsense/{base}-{m}-r{r}" for base in PATHS for m in ("dora", "lora") for r in (16, 32)
    } <= RECIPES.keys()
    assert {f"instruction/{base}-{m}" for base in ("llama-7b", "llama2-7b") for m in INSTRUCTION} <= RECIPES.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_trained_parameters(name):
    changed, whole = count(name)
    assert changed == COUNTS[name]
    if name.startswith("commonsense"):
        share = COMMONSENSE[name.partition("/")[2]][1]
        assert rounds_to(100 * changed / (whole + changed), share)
    else:
        assert rounds_to(100 * changed / (whole + changed), INSTRUCTION[name.rpartition("-")[2]][2])


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("instruction/")])
def test_instruction_as_the_paper_says(name):
    recipe, parts = read_recipe(name, []), name.partition("b-")[2].split("-")
    r, rate, _, *scores = INSTRUCTION[parts[0]]
    assert recipe.model.path == PATHS[base_of(name)]
    assert (recipe.adapter.method, recipe.adapter.r, recipe.adapter.lora_dropout) == (parts[0], r, 0)
    assert recipe.adapter.d_initial == 0.1
    assert set(recipe.adapter.target_modules) == {*QKVUD, "o_proj", "gate_proj"}
    training = check_arguments(recipe)
    assert (training["learning_rate"], training["lr_scheduler_type"], training["warmup_steps"]) == (rate, "cosine", 0.1)
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 4)
    assert training["num_train_epochs"] == 1
    assert (recipe.data.train, recipe.data.style) == ("yahma/alpaca-cleaned", "alpaca")
    assert recipe.data.limit == (int(parts[1][1:]) if len(parts) > 1 else 10_000)
    published = None if len(parts) > 1 else {"MT-Bench": scores[base_of(name) == "llama2-7b"]}
    assert RECIPES[name].published == published
    assert RECIPES[name].reproduces == (
        "Table 5" if published else {"llama-7b": "Figure 9", "llama2-7b": "Figure 4"}[base_of(name)]
    )


def test_the_training_prompt_to_the_byte():
    """LLM-Adapters' generate_prompt without an input, from the table of its lines."""
    recipe = read_recipe("commonsense/llama-7b-dora-r32", [])
    row = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is true"}
    made = render_row(row, recipe.data.model_copy(update={"loss_on": "completion"}), None)
    s16 = " " * 16
    lines = [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  ",
        "",
        f"{s16}### Instruction:",
        f"{s16}Is it?",
        "",
        "Answer format: true/false",
        s16,
        f"{s16}### Response:",
        f"{s16}the correct answer is true",
    ]
    assert made.text == "\n".join(lines)
    assert [made.text[start:end] for start, end in made.learned] == ["the correct answer is true"]


def test_discrepancies_are_said():
    said = " ".join(RECIPES["commonsense/llama-7b-dora-r32"].notes)
    assert "Table 8 says 1e-4" in said
    assert "script llama_7B_Dora.sh says 2e-4" in said
    assert "76.3" in " ".join(RECIPES["commonsense/llama-7b-lora-r32"].notes)
    assert "README prints 76.8" in " ".join(RECIPES["commonsense/llama-7b-dora-r64"].notes)
    assert "not tuned" in " ".join(RECIPES["commonsense/llama3-8b-lora-r32"].notes)


def test_small_recipes_name_their_own_data():
    names = [name for name in RECIPES if name.startswith("commonsense/smollm2")]
    assert len(names) == 12
    for name in names:
        recipe = read_recipe(name, [])
        folder = recipe.data.train.partition("/")[0]
        assert recipe.eval.tasks == (f"{folder}-clean-likelihood={folder}/test.json",)
        assert (recipe.data.style, recipe.data.loss_on) == ("alpaca", "completion")
        assert check_arguments(recipe)["max_steps"] == 300
        assert "full" in name or recipe.adapter.target_modules == QKVUD


# the command


def test_what_is_printed_is_the_recipe(run, tmp_path):
    for name in ("commonsense/llama-7b-dora-r32", "instruction/llama2-7b-dvora", "sentiment"):
        status, out, _ = run("recipes", name)
        assert status == 0
        assert out.startswith(f"# {name}\n")
        (tmp_path / "printed.yaml").write_text(out)
        assert read_recipe(str(tmp_path / "printed.yaml"), []) == read_recipe(name, [])
    assert "# Published: boolq 69.7, piqa 83.4" in run("recipes", "commonsense/llama-7b-dora-r32")[1]


def test_recipes_are_listed_with_what_they_reproduce(run):
    _, out, _ = run("recipes", "commonsense/llama3")
    assert re.search(r"commonsense/llama3-8b-dora-r32\W+Table 1\W+average 85.2", out)
    assert "llama-13b" not in out
    status, _, err = run("recipes", "comonsense/llama3-8b-dora-r32")
    assert status == 2
    assert "did you mean 'commonsense/llama3-8b-dora-r32'" in err


# families


def test_a_family(tmp_path):
    path = tmp_path / "family.yaml"
    family = {
        "shared": {"a": {"x": 1, "y": 2}, "list": [1, 2]},
        "parts": {"p": {"a": {"x": 5}, "note": "p is   said"}, "q": {"a": {"y": None}}, "z": {"list": [3]}},
        "grids": [{"of": [["p", "q"], ["z"]], "reproduces": "Table 9", "note": "of all"}, {"of": [["p"]]}],
        "columns": ["one", "two"],
        "variants": {"p-z": {"a": {"w": 0}, "published": [1, 2], "note": "own"}, "p": {"published": {"two": 3}}},
    }
    path.write_text(yaml.safe_dump(family))
    made = read_family(path)
    assert list(made) == ["p-z", "q-z", "p"]
    assert made["p-z"].values == {"a": {"x": 5, "y": 2, "w": 0}, "list": [3]}
    assert made["q-z"].values == {"a": {"x": 1}, "list": [3]}
    assert (made["p-z"].published, made["q-z"].published, made["p"].published) == (
        {"one": 1, "two": 2},
        None,
        {"two": 3},
    )
    assert made["p-z"].notes == ("of all", "p is said", "own")
    assert (made["p-z"].reproduces, made["p"].reproduces) == ("Table 9", "")
    for wrong, told in (({"variants": {"p-x": {}}}, "no grid makes"), ({"grids": [{"of": [["pq"]]}]}, "no part 'pq'")):
        path.write_text(yaml.safe_dump({**family, **wrong}))
        with pytest.raises(UsageError, match=told):
            read_family(path)
    with pytest.raises(UsageError, match="describes a family"):
        read_recipe(str(path), [])
