"""VeRA and DVoRA as the paper has them (r 1024), through every command that a user gives: train to convert."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from doralib.adapters.load import load_adapter

SAID = {"a": "good", "b": "bad"}


@pytest.mark.parametrize("method", ["vera", "dvora"])
def test_the_whole_path(run, tmp_path, tiny_llama_folder, method):
    rows = [{"instruction": name, "input": "", "output": text} for name, text in SAID.items()] * 8
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "task.yaml").write_text(
        'kind: classification\ndata: test.jsonl\nprompt: "{text}:"\nanswer: label\nlabels: [good, bad]\n'
    )
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n' * 3)
    out = tmp_path / "run"
    changes = [f"model.path={tiny_llama_folder}", "model.dtype=float32", f"data.train={tmp_path / 'rows.json'}"]
    changes += ["training.max_steps=3", "training.gradient_accumulation_steps=1", f"out={out}"]
    changes += [f"eval.tasks=[{tmp_path / 'task.yaml'}]"]
    status, _, err = run("train", f"instruction/llama-7b-{method}", *changes)
    assert status == 0, err
    settings = json.loads((out / "doralib_config.json").read_text())
    assert (settings["method"], settings["r"], settings["d_initial"]) == (method, 1024, 0.1)

    scores = json.loads((out / "results.json").read_text())["after"]["task"]["metrics"]
    status, _, err = run("eval", out, "--tasks", tmp_path / "task.yaml", "--out", tmp_path / "scores.json")
    assert status == 0, err
    assert json.loads((tmp_path / "scores.json").read_text())["after"]["task"]["metrics"] == scores

    status, said, err = run("merge", out, "--out", tmp_path / "merged", "--verify")
    assert status == 0, err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), out)
    untouched = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        merged, before = plain(ids).logits, untouched(ids).logits
        torch.testing.assert_close(merged, adapted(ids).logits, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)

    status, _, err = run("generate", out, "--prompt", "a", "--max-new-tokens", 3)
    assert status == 0, err
    # the nearest plain LoRA of the merged change, which everything reads
    status, _, err = run(
        "convert", out, "--to", "lora", "--rank", 4, "--base", tiny_llama_folder, "--out", tmp_path / "l"
    )
    assert status == 0, err
    status, said, err = run("inspect", tmp_path / "l")
    assert status == 0, err
    assert "lora" in said.lower()
