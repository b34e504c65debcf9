"""The command line as its user meets it: what each verb prints, and what bad input gets: one message, 2 or 1."""

import json

import pytest
import torch
import yaml
from conftest import make_llama, make_tokenizer

import doralib
from doralib.config import DoraConfig

ROWS = [{"text": f"a {word} film", "label": label} for word, label in [("good", "positive"), ("bad", "negative")] * 8]


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder):
    """A recipe file of a small job, with one task."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    task = tmp_path / "sentiment.yaml"
    labels = {"positive": " positive", "negative": " negative"}
    task.write_text(
        yaml.safe_dump(
            {
                "kind": "classification",
                "data": str(data),
                "prompt": "Review: {text}\nSentiment:",
                "labels": labels,
                "answer": "label",
            }
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(tiny_llama_folder), "dtype": "float32"},
                "data": {"train": str(data), "prompt": "Review: {text}\nSentiment:", "target": " {label}"},
                "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
                "eval": {"tasks": [str(task)]},
                "out": str(tmp_path / "run"),
            }
        )
    )
    return path


def test_the_whole_path(run, recipe, tmp_path, tiny_llama_folder):
    status, _, err = run("train", recipe)
    assert status == 0, err
    done = tmp_path / "run"
    for name in ("config.yaml", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "report.html"):
        assert (done / name).exists(), name
    task = tmp_path / "sentiment.yaml"
    status, out, _ = run("eval", done, "--tasks", task, "--out", tmp_path / "scores.json")
    assert status == 0
    assert "accuracy" in out
    assert json.loads((tmp_path / "scores.json").read_text())["after"]["sentiment"]["n"] == 16
    status, out, _ = run("generate", done, "--prompt", "a good", "--max-new-tokens", 3)
    assert (status, bool(out)) == (0, True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a good\na bad\n")
    assert run("generate", done, "--file", prompts, "--out", tmp_path / "a.jsonl", "--max-new-tokens", 2)[0] == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    status, out, err = run("merge", done, "--out", tmp_path / "merged", "--verify")
    assert status == 0, err
    assert (tmp_path / "merged" / "model.safetensors").exists()
    status, out, _ = run("inspect", done, "--base", tiny_llama_folder)
    assert status == 0
    assert "q_proj" in out
    assert "direction moved" in out
    status, out, _ = run("targets", tiny_llama_folder)
    assert status == 0
    assert "gate_proj" in out


def test_no_verb_prints_the_help(run):
    status, out, err = run()
    assert "train" in out + err
    assert status in (0, 2)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["adapter.lora_alhpa=3"], 2, "did you mean 'lora_alpha'"),
        (["training.learning_rat=3"], 2, "did you mean 'learning_rate'"),
        (["adapter.target_modules=[q_porj]"], 2, "q_proj (x2)"),
        (["data.prompt=Review {txt}"], 2, "txt"),
        (["data.train=nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["eval.tasks=[sentimnt]"], 2, "sentimnt"),
        (["model.path=/no/such/model"], 2, "/no/such/model"),
        (["nonsense"], 2, "nonsense"),
        (["adapter.r=0", "data.max_length=1"], 2, "2 problems"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_recipe(run, recipe, tmp_path, changes, status, message):
    got, _, err = run("train", recipe, *changes)
    assert got == status, err
    assert message in err
    assert not (tmp_path / "run").exists()


def test_all_problems_at_once(run, recipe):
    _, _, err = run("train", recipe, "training.learning_rat=3", "data.train=nowhere.jsonl", "eval.tasks=[sentimnt]")
    assert "learning_rate" in err
    assert "nowhere.jsonl" in err
    assert "sentimnt" in err


def test_a_run_that_exists_is_refused_and_left_alone(run, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("x")
    for flag in ((), ("--overwrite",)):
        status, _, err = run("train", recipe, *flag)
        assert status == 2
        assert "is no run of doralib" in err
    assert (tmp_path / "run" / "precious.txt").read_text() == "x"
    assert run("train", recipe, f"out={tmp_path / 'other'}", "eval.tasks=[]")[0] == 0
    kept = (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    status, _, err = run("train", recipe, f"out={tmp_path / 'other'}", "eval.tasks=[]")
    assert status == 2
    assert "--overwrite" in err
    assert "--resume" in err
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() == kept


def test_empty_and_damaged_data(run, recipe, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    status, _, err = run("train", recipe, f"data.train={tmp_path / 'empty.jsonl'}")
    assert status == 2, err
    (tmp_path / "cut.json").write_text('[{"text": "a", "label"')
    status, _, err = run("train", recipe, f"data.train={tmp_path / 'cut.json'}")
    assert status in (1, 2)
    assert "cut.json" in err


def test_a_truncated_model(run, recipe, tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    status, _, err = run("train", recipe, f"model.path={tmp_path / 'model'}")
    assert status == 1
    assert "truncated" in err


def test_adapters_that_are_missing_truncated_or_of_another_model(run, tmp_path, tiny_llama_folder):
    status, _, err = run("inspect", tmp_path / "nowhere")
    assert status == 2, err
    wide = make_llama(hidden_size=40)
    doralib.save_adapter(doralib.adapt(wide, DoraConfig(r=2, target_modules=("q_proj",))), tmp_path / "wide")
    status, _, err = run("generate", tmp_path / "wide", "--base", tiny_llama_folder, "--prompt", "a")
    assert status == 1
    assert "(40, 40) in the adapter, (32, 32) in the model" in err
    status, _, err = run("merge", tmp_path / "wide", "--base", tiny_llama_folder, "--out", tmp_path / "out")
    assert status == 1
    assert not (tmp_path / "out").exists()
    weights = tmp_path / "wide" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, err = run("inspect", tmp_path / "wide")
    assert status == 1
    assert "truncated" in err


def test_a_misspelt_verb_and_option(run):
    assert run("trian")[0] == 2
    assert run("targets", "x", "--evry")[0] == 2


def test_convert(run, tmp_path, tiny_llama_folder):
    config = DoraConfig(r=2, target_modules=("q_proj", "up_proj"))
    doralib.save_adapter(doralib.adapt(make_llama(), config), tmp_path / "ours")
    base = ("--base", tiny_llama_folder)
    status, out, err = run("convert", tmp_path / "ours", "--to", "mlx", "--out", tmp_path / "mlx", *base)
    assert status == 0, err
    assert "4 layers" in out
    status, _, err = run("convert", tmp_path / "mlx", "--to", "peft", "--out", tmp_path / "back", *base)
    assert status == 0, err
    assert run("inspect", tmp_path / "back")[0] == 0
    # a file of another tool is an adapter like any other
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [doralib.load_adapter(make_llama(), tmp_path / name)(ids).logits for name in ("ours", "mlx")]
    torch.testing.assert_close(*logits)
    lora = ("--to", "lora", "--rank", 2, "--out", tmp_path / "lora")
    status, out, err = run("convert", tmp_path / "ours", *lora, *base, "--texts")
    assert status == 0, err
    assert "q_proj" in out
    status, _, err = run("convert", tmp_path / "ours", "--to", "kohia", "--out", tmp_path / "x")
    assert status == 2
    assert "did you mean 'kohya'" in err
