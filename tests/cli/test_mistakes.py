"""What people do wrong on the command line, each answered with a message and never with a traceback."""

import dataclasses
import json
import re

import pytest
import yaml
from conftest import make_tokenizer
from transformers import TrainingArguments

from doralib.recipe import Recipe
from doralib.validation import ELSEWHERE

LONG = {"text": "wonderful " * 40, "label": "positive"}
SHORT = {"text": "dull", "label": "negative"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(here, tiny_llama_folder):
    """Writes a recipe of two steps on rows of two lengths; its path."""
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [LONG, SHORT] * 4))
    groups = {
        "model": {"path": str(tiny_llama_folder)},
        "data": {"train": "rows.jsonl", "prompt": "Review: {text}\nSentiment:", "target": " {label}"},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2},
        "out": "run",
    }
    (here / "r.yaml").write_text(yaml.safe_dump(groups))
    return here / "r.yaml"


def gpt(folder, positions):
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"eos_token_id": 2, "bos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=positions, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def test_rows_longer_than_the_model_are_left_out(run, recipe, here):
    gpt(here / "gpt", 32)
    model = ["model.path=gpt", "adapter.target_modules=[c_attn]"]
    status, out, err = run("train", recipe, *model)
    assert status == 0, err
    assert "data.max_length is 512, and the model takes 32 tokens: 32 is used" in out
    assert "4 left out, longer than 32 tokens" in out
    # nor are they what the model is shown before and after
    assert {sample["expected"] for sample in json.loads((here / "run" / "samples.json").read_text())} == {" negative"}
    # a sample that just fits leaves room for no more than its answer
    tokens = len(make_tokenizer()("Review: dull\nSentiment: negative")["input_ids"])
    gpt(here / "tight", tokens + 1)
    status, _, err = run("train", recipe, "model.path=tight", *model[1:], "out=tight-run")
    assert status == 0, err


def test_a_checkpoint_is_an_adapter(run, recipe, here):
    """What NaN, Ctrl-C or a better validation loss leaves one with can be scored, merged and converted."""
    status, _, err = run("train", recipe, "training.save_steps=1")
    assert status == 0, err
    first, last = (here / "run" / "checkpoints" / f"checkpoint-{step}" for step in (1, 2))
    assert run("merge", last, "--out", "from-checkpoint")[0] == 0
    assert run("merge", "run", "--out", "from-run")[0] == 0
    merged = [(here / name / "model.safetensors").read_bytes() for name in ("from-checkpoint", "from-run")]
    assert merged[0] == merged[1]
    assert run("generate", first, "--prompt", "a", "--max-new-tokens", "2")[0] == 0
    assert "dora, 2 layers" in run("inspect", first)[1]


def test_an_unfinished_run_says_so(run, here):
    (here / "run" / "checkpoints").mkdir(parents=True)
    (here / "run" / "config.yaml").touch()
    status, _, err = run("generate", "run", "--prompt", "a")
    assert status == 2
    assert "the run run has not been trained to its end: doralib train run/config.yaml --resume" in err


@pytest.fixture
def adapter(run, recipe, here):
    """The folder of an adapter of rank 2."""
    assert run("train", recipe, "out=adapter", "training.max_steps=1")[0] == 0
    return here / "adapter"


def test_an_adapter_is_no_model(run, adapter, recipe):
    for arguments in (["targets", "adapter"], ["train", recipe, "model.path=adapter", "out=second"]):
        status, _, err = run(*arguments)
        assert status == 2
        assert "adapter is an adapter, and no model: give the model that it adapts" in err


def test_a_report_shows_numbers_as_numbers(adapter):
    told = re.sub(r"<[^>]+>", " ", (adapter / "report.html").read_text())
    assert re.search(r"lora_dropout\s+0\.0\s", told)
    assert re.search(r"max_steps\s+1\s", told)
    assert re.search(r"use_rslora\s+no\s", told)


def test_a_hand_written_config_has_pefts_defaults(run, adapter):
    (adapter / "doralib_config.json").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    del settings["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    status, out, err = run("inspect", adapter)
    assert status == 0, err
    assert "r 2, lora_alpha 8" in out
    assert "the settings do not say lora_alpha: 8, PEFT's default" in out
    _, out, _ = run("inspect", adapter, "--alpha", "5")
    assert "r 2, lora_alpha 5" in out
    assert "do not say" not in out


def test_an_adapter_of_another_base_is_not_said_to_fit(run, adapter, here):
    gpt(here / "gpt", 32)
    for arguments in (["adapter", "--base", "gpt"], ["gpt", "--adapter", "a=adapter"]):
        status, _, err = run("generate", *arguments, "--prompt", "a", "--max-new-tokens", "2")
        assert status == 1
        assert "names and shapes fit" not in err


def test_a_named_adapter_of_another_base_is_noted(run, adapter, here, tiny_llama_folder):
    (here / "twin").symlink_to(tiny_llama_folder)
    with pytest.warns(Warning, match="was trained on .* and is put on twin"):
        assert run("generate", "twin", "--adapter", "a=adapter", "--prompt", "a", "--max-new-tokens", "2")[0] == 0


def test_files_have_the_modes_that_the_user_asks_for(run, adapter, here):
    assert run("convert", "adapter", "--to", "kohya", "--out", "k.safetensors")[0] == 0
    (here / "plain").touch()
    for file in (adapter / "adapter_model.safetensors", here / "k.safetensors"):
        assert file.stat().st_mode == (here / "plain").stat().st_mode


def test_a_model_gets_no_adapter_into_its_folder(run, adapter, here):
    gpt(here / "gpt", 32)
    before = sorted((here / "gpt").iterdir())
    status, _, err = run("convert", "adapter", "--to", "peft", "--out", "gpt")
    assert status == 2
    assert "gpt is a model's folder" in err
    assert sorted((here / "gpt").iterdir()) == before


def test_a_git_lfs_pointer_is_named(run, adapter):
    (adapter / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is a git-lfs pointer, not the weights" in run("inspect", adapter)[2]


def test_a_folder_is_no_recipe(run, adapter):
    assert "adapter is a folder; a run's recipe is its adapter/config.yaml" in run("train", "adapter")[2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora_r=8", "lora_r: there is no such setting; here it is 'adapter.r'"),
        ("adapter.rank=8", "adapter.rank: there is no such setting; here it is 'r'"),
        ("sequence_len=8", "here it is 'data.max_length'"),
        ("output_dir=x", "here it is 'out'"),
        ("adapter.lr=1", "here it is 'training.learning_rate'"),
        ("training.lr=1", "training.lr: TrainingArguments has no such field; here it is 'learning_rate'"),
        ("training.lora_r=8", "training.lora_r: TrainingArguments has no such field; here it is 'adapter.r'"),
        ("training.group_by_length=true", "here it is 'train_sampling_strategy'"),
    ],
)
def test_the_names_of_other_tools_are_known(given, said, run, recipe):
    status, _, err = run("train", recipe, given)
    assert status == 2
    assert said in err


def test_each_place_of_the_names_of_other_tools_is_there():
    groups = {name: field.annotation for name, field in Recipe.model_fields.items()}
    trainers = {field.name for field in dataclasses.fields(TrainingArguments)}
    for place in ELSEWHERE.values():
        group, _, field = place.rpartition(".")
        known = groups if not group else trainers if group == "training" else groups[group].model_fields
        assert field in known, place
