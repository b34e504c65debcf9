"""The recipes of the small studies: TFNS at equal settings, and ARC's answers in words (benchmarks/arc_words.py)."""

import json
import sys

import pytest
from scripts import load_script

from doralib.errors import UsageError
from doralib.evaluation.task_file import load_tasks
from doralib.experiments.compare.grid import Grid, Run, check_grid, make_recipe
from doralib.training.arguments import check_arguments
from doralib.training.recipe_file import read_recipe

ROW = {
    "instruction": "Please choose the correct answer to the question: What do green algae supply to fungi?\n\n"
    "Answer1: carbon dioxide Answer2: food Answer3: Answer4 of a book\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def test_the_methods_differ_in_the_method_alone():
    made = {name: read_recipe(f"finlora/smollm2-tfns-{name}", []) for name in ("lora", "dora", "full")}
    assert {name: recipe.adapter.method for name, recipe in made.items()} == {name: name for name in made}
    for recipe in made.values():
        assert (recipe.model.quantization, recipe.model.dtype) == (None, "float32")
        assert recipe.data == made["dora"].data
        found = check_arguments(recipe)
        assert (found["max_steps"], found["optim"]) == (100, "adamw_torch")
    lora, dora = (made[name].model_dump() for name in ("lora", "dora"))
    for values in (lora, dora):
        del values["adapter"]["method"], values["out"]
    assert lora == dora


def test_the_base_is_quantized_on_an_axis(tmp_path):
    recipe = read_recipe("finlora/smollm2-tfns-dora", [])
    grid = Grid(recipe, ("lora", "dora"), (8,), (0,), tmp_path, (1e-3,), "model.quantization", ("null", "int8"))
    check_grid(grid)
    found = [make_recipe(grid, Run(cell, 1e-3, 0)).model.quantization for cell in grid.cells()]
    assert found == [None, "int8", None, "int8"]


@pytest.fixture
def script():
    return load_script("arc_words")


def test_a_question_has_its_choices_in_words(script):
    assert script.read_question(ROW) == {
        "question": "What do green algae supply to fungi?",
        "choices": ["carbon dioxide", "food", "Answer4 of a book"],
        "answer": "food",
    }
    with pytest.raises(UsageError, match="answer 4 of 3 choices"):
        script.read_question(ROW | {"answer": "answer4"})
    with pytest.raises(UsageError, match="no question with choices"):
        script.read_question(ROW | {"instruction": "Please answer with true or false, question: is it?"})


def test_what_the_script_writes_can_be_trained_and_asked(script, tmp_path, monkeypatch, capsys):
    for name, count in (("train", 3), ("test", 5)):
        (tmp_path / f"{name}.json").write_text(json.dumps([ROW] * count))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arc_words.py", str(tmp_path), "--out", "arc", "--test", "4"])
    script.main()
    assert "3 rows to train on, 4 to test" in capsys.readouterr().out
    recipe = read_recipe("arc/recipe.yaml", [])
    check_arguments(recipe)
    assert recipe.data.train == "arc/train.jsonl"
    (task,) = load_tasks(recipe.eval.tasks)
    assert (task.name, task.kind, task.choices) == ("arc_words", "choice", "choices")


def test_a_folder_without_the_rows_is_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["arc_words.py", str(tmp_path), "--out", str(tmp_path / "arc")])
    with pytest.raises(SystemExit):
        script.main()
    assert "train.json" in capsys.readouterr().err
