"""A run on rows as they are found, without a word on their style."""

import json

import pytest
from talks import TALK
from tokenizer_kinds import CHAT
from transformers import AutoTokenizer

from doralib.recipe import Recipe
from doralib.training.job import train

SHAREGPT = {
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TALK
    ]
}


@pytest.mark.parametrize(
    ("row", "found", "shown", "expected"),
    [
        (SHAREGPT, "conversations in 'conversations' (style chat)", "assistant\n⟦hello<|im_end|>\n⟧", "hi<|im_end|>\n"),
        ({"instruction": "q", "output": "a"}, "instructions and outputs (style alpaca)", "⟦a<|im_end|>⟧", "a"),
        ({"prompt": "q: ", "completion": 1.50}, "prompts in 'prompt', targets in", "q:⟦ 1.5<|im_end|>⟧", "1.5"),
        ({"text": "a text"}, "plain text in 'text' (style text)", "⟦a text<|im_end|>⟧", None),
    ],
)
def test_a_run_finds_the_style(row, found, shown, expected, tiny_llama_folder, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_llama_folder.iterdir():
        (model / file.name).symlink_to(file)
    for file in model.glob("*token*"):
        file.unlink()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    (tmp_path / "t.jsonl").write_text((json.dumps(row) + "\n") * 12)
    recipe = Recipe(
        model={"path": str(model)},
        data={"train": str(tmp_path / "t.jsonl"), "validation": 0.25},
        adapter={"r": 2, "target_modules": ["q_proj"]},
        training={"max_steps": 2, "per_device_train_batch_size": 4},
        out=str(tmp_path / "run"),
    )
    with caplog.at_level("INFO", "doralib"):
        run = train(recipe)
    said = [str(record.msg) for record in caplog.records]
    assert any(f"data.style: auto found {found}" in line for line in said)
    assert any("the first row, what is learned of it in" in line and shown in line for line in said)
    assert json.loads((run / "summary.json").read_text())["train_rows"] == 9
    samples = json.loads((run / "samples.json").read_text()) if (run / "samples.json").exists() else []
    assert {sample["expected"] for sample in samples} == ({expected} if expected else set())
