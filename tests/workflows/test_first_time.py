"""A stranger with the README and a CSV: init, check, train, generate, merge; and the mistakes on the way."""

import re
from pathlib import Path

import pytest
import yaml

from doralib.files import read_json

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_llama_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_llama_folder)
    # as Excel in Europe saves it
    lines = [
        f'"A {word} film; number {i}";{stars}' for i in range(15) for word, stars in (("good", "5"), ("dull", "1"))
    ]
    (tmp_path / "my reviews.csv").write_text("\ufeffReview;Rating\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_from_a_csv_to_a_merged_model(run, here):
    typed = re.findall(r"doralib (\w+) ", README)
    assert {"init", "check", "train", "generate", "merge"} <= set(typed)
    status, _, err = run("init", "my reviws.csv")
    assert (status, "did you mean 'my reviews.csv'" in err) == (2, True)
    # its columns have no names that say what is learned, and the message says what to do
    status, _, err = run("init", "my reviews.csv", "--model", "models/tiny")
    assert status == 2
    setting = re.search(r"data.prompt: '(.*?)' and data.target: '(.*?)'", err)
    assert setting, err
    values = {
        "model": {"path": "models/tiny"},
        "data": {"train": "my reviews.csv", "validation": 0.1, "prompt": "{Review}\nRating:", "target": "{Rating}"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4},
        "out": "runs/reviews",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    status, out, err = run("check", "recipe.yaml")
    assert status == 0, err
    assert "'...Rating:5'" in out or "Rating:5" in out
    assert "write data.target: ' {Rating}'" in out
    status, out, err = run("train", "recipe.yaml", "data.target= {Rating}")
    assert status == 0, err
    assert "write data.target" not in out
    assert read_json("runs/reviews/summary.json")["status"] == "finished"
    status, _, err = run("train", "recipe.yaml", "data.target= {Rating}")
    assert (status, "--resume" in err) == (2, True)
    status, out, err = run("generate", "runs/reviews", "--prompt", "A good film", "--max-new-tokens", "2")
    assert status == 0, err
    status, out, err = run("merge", "runs/reviews", "--out", "merged", "--verify")
    assert status == 0, err
    assert Path("merged/model.safetensors").is_file()


def test_what_init_writes_trains(run, here):
    Path("talks.csv").write_text("Question,Answer\n" + "".join(f"Who is {i}?,Number {i}\n" for i in range(30)))
    status, _, err = run("init", "talks.csv", "--model", "models/tiny")
    assert status == 0, err
    assert run("check", "recipe.yaml")[0] == 0
    status, out, err = run("train", "recipe.yaml", "training.max_steps=2")
    assert status == 0, err
    assert "⟦ Number" in out
