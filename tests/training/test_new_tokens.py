"""`model.new_tokens`: rows of their own for new tokens are learned, merged, and read by PEFT."""

import json

import peft
import pytest
import torch
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import doralib
from doralib.checkpoints.merge import merge_checkpoint
from doralib.errors import UsageError
from doralib.recipe import Recipe
from doralib.training.job import train


def job(folder, *, tie, spare=0, **changes):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    make_llama(vocab_size=len(tokenizer) + spare, tie_word_embeddings=tie).save_pretrained(folder / "base")
    rows = [{"text": "call <tool> now", "label": "<tool> <end>"}] * 8
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(folder / "base"), "new_tokens": ["<tool>", "<end>"]},
        "data": {"train": str(folder / "train.jsonl"), "prompt": "{text}", "target": " {label}"},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 3, "learning_rate": 0.01},
        "out": str(folder / "run"),
    } | changes
    return Recipe(**values), len(tokenizer)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(("tie", "spare"), [(True, 0), (False, 0), (False, 5)])
def test_from_the_recipe_to_the_merged_model(tmp_path, tie, spare):
    recipe, size = job(tmp_path, tie=tie, spare=spare)
    run = train(recipe)
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer("<tool><end>", return_tensors="pt")["input_ids"]
    assert ids.flatten().tolist()[-2:] == [size, size + 1]
    settings = json.loads((run / "adapter_config.json").read_text())
    names = ["model.embed_tokens"] if tie else ["model.embed_tokens", "lm_head"]
    assert settings["trainable_token_indices"] == {key: [size, size + 1] for key in names}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = doralib.load_adapter(base, run)
    want = logits(loaded, ids)
    assert want.shape[-1] == size + max(2, spare)
    rows = loaded.get_input_embeddings().trainable_tokens_delta
    assert len(rows) == 2
    merge_checkpoint(run, tmp_path / "base", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, ids), want, atol=1e-5, rtol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(want.shape[-1])
    theirs = peft.PeftModel.from_pretrained(theirs, run)
    torch.testing.assert_close(logits(theirs, ids), want, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_a_resumed_run_is_the_same_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = job(tmp_path / "a", tie=True)
    run = train(whole)
    half, _ = job(tmp_path / "b", tie=True, training={"max_steps": 3, "learning_rate": 0.01, "save_steps": 2})
    train(half)
    (tmp_path / "b" / "run" / "adapter_model.safetensors").unlink()
    again = train(half, resume=True)
    assert (again / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match=r"new_tokens go with methods dora and lora, not with 'full'"):
        job(tmp_path, tie=True, adapter={"method": "full"})
