"""`doralib check` and `init`, and what all verbs share: usage lines, examples, completion, volume, JSON."""

import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import typer
import yaml
from conftest import make_llama

import doralib
from doralib.cli import init
from doralib.cli.main import _VERBS, app
from doralib.cli.recipe import complete_recipe, complete_setting
from doralib.config import DoraConfig
from doralib.training.recipe_file import read_recipe

pytestmark = pytest.mark.estimates

VERBS = typer.main.get_command(app).commands
SLOW = ("torch", "transformers", "datasets", "pandas", "pyarrow")


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_llama_folder):
    """A recipe for a CSV, and a model of which there are no weights."""
    monkeypatch.chdir(tmp_path)
    lines = [f"a {word} film {i},{label}" for i in range(20) for word, label in (("good", "positive"), ("dull", "bad"))]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines, ",bad"]) + "\n")
    (tmp_path / "model").mkdir()
    for file in tiny_llama_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    groups = {
        "model": {"path": "model"},
        "data": {"train": "rows.csv", "validation": 0.1, "prompt": "{text}\nIt is", "target": " {label}"},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4},
        "out": "run",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(groups))
    return tmp_path


def test_check_says_all_that_training_would_do(run, here, tiny_llama_folder):
    status, out, err = run("check", "r.yaml")
    assert status == 0, err
    said = " ".join(out.split())
    for told in (
        "num_train_epochs: 2",
        "style: completion",
        "dora, r 4, alpha 32",
        "rows 36 of 37, 4 held out",
        "steps 18, 9 an epoch",
        "train: 1 left out, empty",
        "a good film 0 It is⟦ positive<|im_end|>⟧",
        "doralib plan shows the arithmetic",
        "Nothing stands in the way of: doralib train r.yaml",
    ):
        assert told in said, told
    assert not (here / "run").exists()
    status, out, err = run("check", "r.yaml", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["steps"], found["steps_an_epoch"]) == (18, 9)
    assert found["recipe"]["data"]["style"] == "completion"
    assert found["data"]["splits"]["train"]["kept"] == 36
    trained = 2 * (4 * (32 + 32) + 32 + 4 * (32 + 16) + 16) * 4
    memory = {name: part["bytes"] for name, part in found["memory"]["parts"].items()}
    assert (memory["adapter"], memory["optimizer"]) == (trained, 2 * trained)
    assert memory["weights"] == 4 * sum(p.numel() for p in make_llama().parameters())
    assert found["memory"]["peak_bytes"] == sum(memory.values())
    # what training itself says, word for word
    status, out, err = run("train", "r.yaml", f"model.path={tiny_llama_folder}", "training.max_steps=1")
    assert status == 0, err
    own = {"model", "steps"}
    assert all(text in out for name, text in found["facts"].items() if name not in own)
    # a run that stands there stops training, and no check
    status, out, err = run("check", "r.yaml")
    assert (status, "run is there already, so add --resume or --overwrite" in out) == (0, True)
    assert run("train", "r.yaml", "--dry-run")[0] == 2
    assert run("train", "r.yaml", "--dry-run", "--overwrite")[0] == 0
    assert (here / "run" / "adapter_model.safetensors").is_file()


def test_check_names_targets_that_the_model_does_not_have(run, here):
    status, _, err = run("check", "r.yaml", "adapter.target_modules=[q_porj]")
    assert (status, "q_proj (x2)" in err) == (2, True)
    status, _, err = run("check", "r.yaml", "model.path=./none")
    assert (status, "there is no model folder ./none" in err) == (2, True)


def test_a_file_that_is_no_model_is_refused(run, here):
    status, _, err = run("check", "r.yaml", "model.path=r.yaml")
    assert (status, "r.yaml is neither a model folder nor a .gguf file" in err) == (2, True), err


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_model_that_is_not_there_is_named_with_all_else_that_is_wrong(run, here, verb):
    status, _, err = run(verb, "r.yaml", "model.path=./none", "data.train=absent.jsonl", "training.learning_rat=1")
    assert status == 2
    for problem in ("there is no model folder ./none", "no file 'absent.jsonl'", "did you mean 'learning_rate'"):
        assert problem in err


def test_check_of_a_classifier_and_of_packed_text(run, here):
    status, out, err = run("check", "r.yaml", "model.kind=classify", "data.prompt=text", "data.target=label", "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 18
    (here / "book.txt").write_text("a dull film, a terrible waste of an evening\n" * 30)
    changes = [
        "data.train=book.txt",
        "data.prompt=null",
        "data.target=null",
        "data.max_length=64",
        "data.validation=null",
    ]
    status, out, err = run("check", "r.yaml", *changes, "--json")
    assert status == 0, err
    assert "sequences of at most 64 tokens" in json.loads(out)["facts"]["packed"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "reciep.yaml"], "there is no recipe"),
        (
            ["check", "r.yaml", "adapter.rr=3", "training.learning_rat=1"],
            "there is no such setting(.|\n)*did you mean 'learning_rate'",
        ),
        (["compare", "reciep.yaml", "--out", "o"], "there is no recipe"),
        (["compare", "r.yaml", "adapter.rr=3", "--out", "o"], "there is no such setting"),
        (["data", "reciep.yaml"], "there is no recipe"),
        (
            ["train", "r.yaml", "data.target= {lable}", "training.learning_rat=1", "eval.tasks=[sentimnt]"],
            "did you mean 'learning_rate'(.|\n)*sentimnt(.|\n)*no column 'lable'; did you mean 'label'",
        ),
        (["check", "r.yaml", "data.train=[rows.csv, {path: rwos.csv}]"], "no file 'rwos.csv'"),
        (["train", "r.yaml", "model.kind=classify", "data.target=lable"], "no column 'lable'"),
    ],
)
def test_what_is_wrong_in_yaml_or_data_is_told_before_anything_slow_is_imported(here, arguments, told):
    code = (
        "import sys\nfrom doralib.cli.main import main\n"
        f"sys.argv = ['doralib', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n    print([name for name in "
        f"{SLOW!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == "[]"
    assert re.search(told, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("change", "target"),
    [
        ("data.target= {label}", " {label}"),
        ("data.target={label}", "{label}"),
        ("data.target= label", " label"),
        ('data.target=" {label}"', " {label}"),
        ("data.target=[x] {label} # 1", "[x] {label} # 1"),
        ("data.target=5", "5"),
        ("data.target=null", None),
    ],
)
def test_a_text_on_the_command_line_is_the_text(here, change, target):
    assert read_recipe("r.yaml", [change]).data.target == target


def test_usage_lines_name_arguments_as_the_help_does(run):
    lines = {verb: next(line for line in run(verb, "--help")[1].splitlines() if line.strip()) for verb in VERBS}
    assert lines["train"] == "Usage: doralib train RECIPE [KEY=VALUE]... [OPTIONS]"
    assert lines["merge"] == "Usage: doralib merge ADAPTER... [OPTIONS]"
    assert lines["recipes"] == "Usage: doralib recipes [NAME] [OPTIONS]"
    assert not [line for line in lines.values() if "{" in line or "[[" in line]


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_has_examples_that_are_right(run, verb):
    examples = [line.strip() for line in _VERBS[verb][1].strip().splitlines()]
    help_text = run(verb, "-h")[1]
    for example in examples:
        assert example in help_text
        tool, name, *words = shlex.split(example.partition(" > ")[0])
        assert (tool, name) == ("doralib", verb)
        VERBS[verb].make_context(verb, list(words))


def test_completion_of_recipes_and_settings(here):
    assert complete_recipe("cha") == ["chat"]
    assert complete_recipe("r.") == ["r.yaml"]
    assert "commonsense/llama-7b-dora-r32" in complete_recipe("commonsense/llama-7b-d")
    assert complete_setting("adapter.lora_a") == ["adapter.lora_alpha="]
    assert "training.learning_rate=" in complete_setting("training.learning_")
    assert not complete_setting("training.output_d")


def test_fields_are_those_of_training_arguments():
    import dataclasses

    from transformers import TrainingArguments

    from doralib.training.fields import list_fields

    theirs = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert list_fields() >= theirs
    assert not {name for name in list_fields() - theirs if "log" in name}


def test_the_shell_asks_for_completions(here):
    from typer.testing import CliRunner

    told = {"_DORALIB_COMPLETE": "complete_bash", "COMP_WORDS": "doralib train cha", "COMP_CWORD": "2"}
    assert CliRunner().invoke(app, env=told, prog_name="doralib").stdout.split() == ["chat"]


def test_quiet_and_verbose(run, here):
    status, out, _ = run("check", "r.yaml", "--quiet")
    assert (status, "reading the tokenizer" in out, "steps" in out) == (0, False, True)
    assert "reading the tokenizer" in run("check", "r.yaml")[1]
    assert run("check", "r.yaml", "--quiet", "--verbose")[0] == 2
    done = subprocess.run(
        [sys.executable, "-m", "doralib", "check", "nothing.yaml", "--verbose"], capture_output=True, text=True
    )
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("doralib: there is no recipe")


def test_json_is_all_that_stands_on_the_standard_output(run, tmp_path, tiny_llama_folder):
    model = make_llama()
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    doralib.save_adapter(model, tmp_path / "a")
    answers = {}
    for words in (
        ["inspect", tmp_path / "a", "--base", tiny_llama_folder],
        ["targets", tiny_llama_folder],
        ["recipes", "sent"],
        ["convert", tmp_path / "a", "--to", "mlx", "--out", tmp_path / "mlx"],
        ["merge", tmp_path / "a", "--base", tiny_llama_folder, "--out", tmp_path / "m"],
    ):
        status, out, err = run(*words, "--json")
        assert status == 0, err
        answers[words[0]] = json.loads(out)
    assert [layer["r"] for layer in answers["inspect"]["layers"]] == [2, 2]
    assert answers["inspect"]["layers"][0]["direction"] == pytest.approx(0, abs=1e-6)
    first = next(each for each in answers["targets"] if each["name"].endswith("q_proj"))
    assert (first["name"], first["shape"], first["adaptable"]) == ("model.layers.0.self_attn.q_proj", [32, 32], True)
    assert [each["name"] for each in answers["recipes"]] == ["sentiment"]
    assert (answers["convert"]["to"], answers["merge"]["layers"]) == ("mlx", 2)
    # the next command speaks to its user again
    assert "q_proj" in run("targets", tiny_llama_folder)[1]


TALK = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
INIT = {
    "reviews.csv": ("text,label\na film,good\n", {"prompt": "{text}\nLabel:", "target": " {label}"}),
    "qa.csv": ("Question,Answer\nWho?,I\n", {"prompt": "{Question}\nAnswer:", "target": " {Answer}"}),
    "a.jsonl": ('{"instruction": "Say a", "output": "a"}\n', {"style": "alpaca"}),
    "p.jsonl": (
        '{"prompt": "Say a", "completion": " a"}\n',
        {"style": "completion", "prompt": "prompt", "target": "completion"},
    ),
    "c.jsonl": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        {"style": "chat"},
    ),
    "book.txt": ("A night.\n", {"style": "text", "target": "text"}),
}


@pytest.mark.parametrize("name", INIT)
def test_init_writes_a_recipe_for_the_data(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, data = INIT[name]
    (tmp_path / name).write_text(text)
    status, out, err = run("init", name)
    assert status == 0, err
    assert "doralib check recipe.yaml" in out
    written = (tmp_path / "recipe.yaml").read_text()
    assert written.startswith(f"# yaml-language-server: $schema={init.SCHEMA}\n")
    recipe = read_recipe("recipe.yaml", [])
    assert {key: getattr(recipe.data, key) for key in data} == data
    assert recipe.data.train == name
    assert recipe.model.path.endswith("Instruct") == (name == "c.jsonl")
    settings = [line for line in written.splitlines() if ":" in line and line.startswith("  ")]
    assert sum("#" in line for line in settings) >= 9
    status, _, err = run("init", name)
    assert (status, "is there already" in err) == (2, True)
    assert run("init", name, "--overwrite")[0] == 0


def test_init_asks_three_questions(run, here, monkeypatch):
    asked = io.StringIO("rows.csv\n\nruns/mine\n")
    asked.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", asked)
    status, out, err = run("init")
    assert status == 0, err
    assert (out + err).count(": ") >= 3
    recipe = read_recipe("recipe.yaml", [])
    assert (recipe.data.train, recipe.model.path, recipe.out) == ("rows.csv", "HuggingFaceTB/SmolLM2-135M", "runs/mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, _, err = run("init", "--out", "x.yaml")
    assert (status, "doralib init reviews.csv" in err) == (2, True)
    status, _, err = run("init", "rosw.csv", "--out", "x.yaml")
    assert (status, "did you mean 'rows.csv'" in err) == (2, True)
    assert not (here / "x.yaml").exists()
