"""The schemas take what doralib takes, and refuse what it refuses."""

import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest

from doralib.evaluation.task_file import packaged_tasks
from doralib.training.recipe_file import packaged_recipes
from doralib.training.schema import recipe_schema, task_schema

ROOT = Path(__file__).parents[2]


RECIPES, TASKS = packaged_recipes(), packaged_tasks()


@cache
def validator(make):
    schema = make()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def find_errors(make, value):
    return [error.message for error in validator(make).iter_errors(value)]


@pytest.mark.parametrize("name", RECIPES)
def test_packaged_recipes_are_recipes(name):
    assert not find_errors(recipe_schema, RECIPES[name].values)


@pytest.mark.parametrize("name", TASKS)
def test_packaged_tasks_are_tasks(name):
    assert not find_errors(task_schema, TASKS[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"train": "a", "stile": "chat"}}, "stile"),
        ({"adapter": {"r": 0}}, "minimum"),
        ({"adapter": {"method": "dorra"}}, "dorra"),
        ({"training": {"learning_rat": 1}}, "learning_rat"),
        ({"training": {"output_dir": "x"}}, "output_dir"),
        ({"training": {"max_steps": "many"}}, "many"),
    ],
)
def test_a_mistake_is_found(change, named):
    recipe = {"model": {"path": "m"}, "data": {"train": "a"}, "out": "o"}
    assert not find_errors(recipe_schema, recipe)
    assert named in " ".join(find_errors(recipe_schema, recipe | change))


def test_every_setting_says_what_it_is():
    definitions = recipe_schema()["$defs"]
    for group in ("ModelSettings", "DataSettings", "DoraConfig", "EvalSettings"):
        assert all(each.get("description") for each in definitions[group]["properties"].values())


@pytest.mark.parametrize("folder", ["docs", "src/doralib/schemas"])
@pytest.mark.parametrize(("name", "make"), [("recipe", recipe_schema), ("task", task_schema)])
def test_docs_and_wheel_have_them_as_they_are(folder, name, make):
    """`make schemas` writes them."""
    assert json.loads((ROOT / folder / f"{name}.schema.json").read_text()) == make()
