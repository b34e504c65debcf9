"""What people do wrong on the command line, each answered with a message and never with a traceback."""

import json

import pytest
import yaml
from conftest import make_tokenizer

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
