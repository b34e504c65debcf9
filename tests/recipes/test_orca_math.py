"""The recipes of QDoRA's experiment against Answer.AI's settings, and those of its small likeness."""

import json
import sys
import types

import pytest
import torch
from scripts import load_script
from transformers import LlamaConfig, LlamaForCausalLM

from doralib.adapters.adapt import adapt
from doralib.adapters.registry import trainable
from doralib.data.prompts import render_row
from doralib.errors import UsageError
from doralib.evaluation.numbers import read_number
from doralib.evaluation.task_file import load_tasks
from doralib.experiments.compare.grid import Grid, Run, check_grid, make_recipe
from doralib.training.arguments import check_arguments
from doralib.training.recipe_file import packaged_recipes, read_recipe

RECIPES = packaged_recipes()
SIX = {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"}
PUBLISHED = {"llama2-7b": {"qdora": 31, "qlora": 12, "full": 26}, "llama3-8b": {"qdora": 56, "qlora": 32, "full": 51}}
ROW = {"question": "How many?", "answer": "2 + 3 = 5 apples."}


def read(name):
    return read_recipe(f"orca-math/{name}", [])


@pytest.mark.parametrize("base", PUBLISHED)
@pytest.mark.parametrize("method", ["qdora", "qlora", "full", "qdora-fair", "qlora-fair"])
def test_the_settings_are_answer_ais(base, method):
    recipe, (kind, _, fair) = read(f"{base}-{method}"), method.partition("-")
    training = check_arguments(recipe)
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert batch == (32 if base == "llama2-7b" or kind == "full" else 16)
    assert training["per_device_train_batch_size"] == (2 if (base, kind) == ("llama3-8b", "full") else 4)
    assert (training["learning_rate"], training["lr_scheduler_type"], training["warmup_steps"]) == (1e-5, "constant", 0)
    names = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "num_train_epochs")
    assert [training[name] for name in names] == [0.9, 0.95, 1e-5, 0.1, 0, 1]
    assert training["gradient_checkpointing"]
    assert (recipe.model.dtype, recipe.model.quantization) == ("bfloat16", None if kind == "full" else "nf4")
    assert (recipe.data.max_length, recipe.data.loss_on, recipe.eval.tasks) == (
        2048,
        "completion",
        ("orca-math=orca-math/test.jsonl",),
    )
    assert RECIPES[f"orca-math/{base}-{method}"].published == (None if fair else {"orca-math": PUBLISHED[base][method]})
    if kind == "full":
        assert recipe.adapter.method == "full"
        return
    adapter = recipe.adapter
    assert not recipe.model.double_quantization
    assert (adapter.method, adapter.r, set(adapter.target_modules)) == (kind[1:], 64, SIX)
    # their DoRA layer has a scale of 1 and no dropout; their LoRA one of 16 / 64 and 0.1
    scale, dropout = (0.25, 0.1) if method == "qlora" else (1, 0)
    assert (adapter.lora_alpha / adapter.r, adapter.lora_dropout) == (scale, dropout)


def test_the_file_has_as_many_numbers_as_theirs():
    """305 MB in bfloat16 for LLaMA-3 of rank 64."""
    size = {"num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=32, **size))
        adapt(model, read("llama3-8b-qdora").adapter)
    numbers = sum(p.numel() for _, p in trainable(model)) * 32 / 2
    assert round(2 * numbers / 1e6) in (304, 305)


@pytest.mark.parametrize("name", ["orca-math/llama2-7b-qdora", "gsm/smollm2-qdora"])
def test_the_prompt_to_the_byte(name):
    recipe = read_recipe(name, [])
    made = render_row(ROW, recipe.data, None)
    assert made.text == "###Question:\nHow many?\n###Answer:\n2 + 3 = 5 apples."
    assert [made.text[start:end] for start, end in made.learned] == ["2 + 3 = 5 apples."]
    for task in load_tasks([each.partition("=")[0] for each in recipe.eval.tasks]):
        (example,) = task.examples([ROW])
        assert made.text.startswith(example.prompt)
        assert example.answer == task.predicted("Then there are 5.") == "5"
    assert load_tasks(["orca-math"])[0].max_new_tokens == 1024


def test_the_small_ones_are_four_of_a_kind():
    made = {name: read_recipe(f"gsm/smollm2-{name}", []) for name in ("qdora", "qlora", "dora", "full")}
    assert {n: (r.adapter.method, r.model.quantization, r.model.dtype) for n, r in made.items()} == {
        "qdora": ("dora", "nf4", "bfloat16"),
        "qlora": ("lora", "nf4", "bfloat16"),
        "dora": ("dora", None, "bfloat16"),
        "full": ("full", None, "float32"),
    }
    assert len({(r.adapter.r, r.adapter.lora_alpha) for n, r in made.items() if n != "full"}) == 1
    for recipe in made.values():
        check_arguments(recipe)


def test_compare_varies_the_quantization_of_all_but_what_is_trained_whole(tmp_path):
    recipe = read_recipe("gsm/smollm2-qdora", [])
    grid = Grid(recipe, ("dora", "lora", "full"), (16,), (0,), tmp_path, (1e-3,), "model.quantization", ("nf4", "null"))
    check_grid(grid)
    assert [cell.name for cell in grid.cells()] == [
        "dora-r16-nf4",
        "dora-r16-null",
        "lora-r16-nf4",
        "lora-r16-null",
        "full-null",
    ]
    found = [make_recipe(grid, Run(cell, 1e-3, 0)).model.quantization for cell in grid.cells()]
    assert found == ["nf4", None, "nf4", None, None]


# the rows


@pytest.fixture
def script():
    return load_script("math_data")


class Problems(list):
    """As reasoning-gym makes them: 10 templates in turn; 200 questions again and again, some worked answers wrong."""

    def __init__(self, size):
        self.task_indices = [i % 10 for i in range(size)]
        super().__init__(
            {
                "question": f"What is {i} by template {i % 10}?",
                "answer": str(i),
                "metadata": {"answer_cot": f"It is {i if i % 11 else i + 1}.\n#### {i if i % 11 else i + 1:,}"},
            }
            for i in (number % 200 for number in range(size))
        )


def test_templates_are_held_out(script, tmp_path, monkeypatch):
    fake = types.ModuleType("reasoning_gym")
    fake.create_dataset = lambda name, seed, size: Problems(size)
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    script.write_gsm(tmp_path, train=60, test=12, seed=0)
    rows = {n: [json.loads(t) for t in (tmp_path / f"{n}.jsonl").open()] for n in ("train", "seen", "test")}
    assert {name: len(found) for name, found in rows.items()} == {"train": 60, "seen": 12, "test": 12}
    templates = {name: {row["template"] for row in found} for name, found in rows.items()}
    assert len(templates["test"]) == 2
    assert not templates["test"] & (templates["train"] | templates["seen"])
    assert templates["seen"] <= templates["train"]
    questions = [row["question"] for found in rows.values() for row in found]
    assert len(set(questions)) == len(questions)
    for row in (row for found in rows.values() for row in found):
        assert read_number(row["answer"]) == row["question"].split()[2]


def test_without_the_package_the_command_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match="pip install reasoning-gym"):
        script.write_gsm(tmp_path, train=1, test=1, seed=0)
