"""`doralib data`: the rows as the model will see them, in the terminal, as a page and as JSON."""

import json
from html.parser import HTMLParser

import pytest
import yaml
from conftest import make_tokenizer

from doralib.data.prepare import IGNORED
from doralib.data.survey import mark_learned, shorten, split_learned

ROWS = [
    {"text": "a good film", "label": "positive"},
    {"text": "a dull film", "label": "negative"},
    {"text": "", "label": "negative"},
    {"text": "wonderful " * 300, "label": "positive"},
    {"text": "a good film", "label": "positive"},
    {"text": "<script>alert(1)</script>", "label": "negative"},
]
HELD_OUT = [{"text": "a good film", "label": "positive"}, {"text": "a dull film", "label": "positive"}]


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_llama_folder):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("t.jsonl", ROWS), ("v.jsonl", HELD_OUT)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    # no weights: nothing but the tokenizer and the configuration may be read
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_llama_folder / name).read_bytes())
    groups = {
        "model": {"path": "model"},
        "data": {"train": "t.jsonl", "validation": "v.jsonl", "prompt": "{text}\nIt is", "target": " {label}"},
        "out": "run",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(groups))
    return tmp_path


def test_rows_are_shown_counted_and_compared(run, here):
    status, out, err = run("data", "r.yaml", "--rows", "2")
    assert status == 0, err
    said = " ".join(out.split())
    assert "train │ 6 │ 4 │ 2 │ 0" in said
    assert "validation │ 2 │ 2 │ 0 │ 0" in said
    for line in (
        "train: 1 left out, empty",
        "train: 1 left out, longer than 256 tokens",
        "row 3: nothing in text",
        "train: 1 rows are there already: row 5 is row 1",
        "1 rows of validation are rows of train: row 1 as row 1",
        "1 rows of validation begin as rows of train and answer otherwise: row 2 as row 2",
        "a good film It is⟦ positive<|im_end|>⟧",
        "a dull film It is⟦ negative<|im_end|>⟧",
    ):
        assert line in said
    assert out.count("⟦") == 2
    assert not (here / "run").exists()


def test_json_has_every_row_with_its_tokens(run, here):
    status, out, err = run("data", "r.yaml", "--json", "rows.jsonl", "--rows", "1")
    assert status == 0, err
    assert "6 rows written: rows.jsonl" in out
    rows = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    assert [(row["split"], row["row"]) for row in rows] == [
        *(("train", number) for number in (1, 2, 5, 6)),
        *(("validation", number) for number in (1, 2)),
    ]
    tokenizer = make_tokenizer()
    for row in rows:
        assert row["text"] == tokenizer.decode(row["input_ids"])
        assert len(row["labels"]) == len(row["input_ids"])
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        assert tokenizer.decode(learned) in (" positive<|im_end|>", " negative<|im_end|>")
    assert rows[0]["input_ids"] == tokenizer("a good film\nIt is positive<|im_end|>")["input_ids"]


def test_the_page_is_whole_and_harmless(run, here):
    status, _, err = run("data", "r.yaml", "--out", "rows.html")
    assert status == 0, err
    source = (here / "rows.html").read_text()
    page = HTMLParser()
    texts = []
    page.handle_data = texts.append
    page.feed(source)
    said = "".join(texts)
    assert "<script" not in source
    assert "alert(1)" in said
    assert "row 5 is row 1" in said
    assert source.count("<mark>") == 4
    assert "http:" not in source
    assert "https:" not in source


def test_all_that_is_wrong_is_told_at_once(run, here):
    status, _, err = run(
        "data", "r.yaml", "data.train=tt.jsonl", "model.path=./none", "--out", "model", "--json", "model"
    )
    assert status == 2
    for problem in (
        "--out: model is a folder",
        "--json: model is a folder",
        "--out and --json are one file",
        "no file 'tt.jsonl'",
        "model: there is no model folder ./none",
    ):
        assert problem in err
    assert run("data", "r.yml", "--out", "model")[2].count("\n") == 2
    assert run("data", "r.yaml", "--rows", "-1")[0] == 2
    assert "given twice" in run("data", "r.yaml", "seed=1", "seed=2")[2]


def test_prompts_of_tasks_that_stand_in_train_are_named(run, here):
    task = {"kind": "classification", "data": "v.jsonl", "prompt": "{text}\nIt is", "answer": "label"}
    task["labels"] = {"positive": " positive", "negative": " negative"}
    (here / "mood.yaml").write_text(yaml.safe_dump(task))
    status, out, err = run("data", "r.yaml", "eval.tasks=[mood.yaml]", "--out", "rows.html")
    assert status == 0, err
    told = "2 of 2 prompts of task mood stand in train: prompt 1 in row 1, prompt 2 in row 2"
    assert told in out
    assert told in (here / "rows.html").read_text()
    assert "mod.yaml" in run("data", "r.yaml", "eval.tasks=[mod.yaml]")[2]


def test_packing_and_lengths_are_told(run, here):
    status, out, err = run("data", "r.yaml", "data.packing=true", "data.max_length=64")
    assert status == 0, err
    assert "at most 64 tokens, packed" in out


def test_learned_stretches_of_a_row():
    tokenizer = make_tokenizer()
    ids = tokenizer("Review: é good film")["input_ids"]
    for cut in range(len(ids) + 1):
        labels = [IGNORED] * cut + ids[cut:]
        pieces = split_learned(ids, labels, tokenizer)
        assert [learned for _, learned in pieces] == [False, True][cut == 0 : 1 + (cut < len(ids))]
        if 0 < cut < len(ids) and "�" not in pieces[0][0]:
            assert "".join(text for text, _ in pieces) == "Review: é good film"
    row = {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
    assert mark_learned(row, tokenizer).endswith("⟧")
    assert shorten("x" * 1000) == f"{'x' * 200} ... 600 characters ... {'x' * 200}"
