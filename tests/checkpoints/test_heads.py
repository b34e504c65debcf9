"""Heads that classify, in PEFT's own files: loaded on the right class, merged into a model of its Auto class."""

import json

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer

import doralib
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.verify import verify_merge
from doralib.files import read_json

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 400,
}
IDS = torch.arange(5, 17).view(2, 6)


def configs(kind):
    if kind == "llama":
        return transformers.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0), "ForCausalLM", ["q_proj"]
    if kind == "tied":
        config = transformers.Qwen2Config(**SMALL, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True)
        return config, "ForCausalLM", ["q_proj"]
    if kind == "bert":
        return transformers.BertConfig(**SMALL), "ForMaskedLM", ["query", "value"]
    return transformers.RobertaConfig(**SMALL), "ForMaskedLM", ["query", "value"]


AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def write(folder, kind, task, labels=3):
    """A language model as the base, PEFT's classifier of it, and what that answers."""
    config, ending, targets = configs(kind)
    name = {"llama": "Llama", "tied": "Qwen2", "bert": "Bert", "roberta": "Roberta"}[kind]
    torch.manual_seed(0)
    getattr(transformers, name + ending)(config).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model = AUTO[task].from_pretrained(folder / "base", num_labels=labels)
    more = ["pooler"] if kind == "bert" and task == "SEQ_CLS" else []
    settings = peft.LoraConfig(r=2, use_dora=True, task_type=task, target_modules=targets, modules_to_save=more or None)
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    tuned.save_pretrained(folder / "peft")
    return logits(tuned)


@pytest.mark.parametrize("kind", ["llama", "tied", "bert", pytest.param("roberta", marks=pytest.mark.long)])
@pytest.mark.parametrize("task", AUTO)
def test_load_and_merge(tmp_path, kind, task):
    want = write(tmp_path, kind, task)
    loaded, _ = load_model(str(tmp_path / "peft"), base=str(tmp_path / "base"))
    assert isinstance(loaded, type(AUTO[task].from_config(loaded.config)))
    torch.testing.assert_close(logits(loaded), want, atol=2e-6, rtol=1e-5)
    merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out")
    merged, info = AUTO[task].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"] or kind in ("bert", "roberta")
    torch.testing.assert_close(logits(merged), want, atol=2e-6, rtol=1e-5)
    assert merged.config.num_labels == 3
    assert verify_merge(tmp_path / "out", tmp_path / "peft", tmp_path / "base").passed
    doralib.save_adapter(loaded, tmp_path / "again")
    settings = read_json(tmp_path / "again" / "adapter_config.json")
    assert settings["task_type"] == task
    theirs = AUTO[task].from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "again")
    torch.testing.assert_close(logits(theirs), want, atol=2e-6, rtol=1e-5)


def test_another_number_of_labels_than_the_base_s(tmp_path):
    want = write(tmp_path, "bert", "SEQ_CLS")
    old = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=7)
    old.save_pretrained(tmp_path / "other")
    merge_checkpoint(tmp_path / "peft", tmp_path / "other", tmp_path / "out")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), want, atol=2e-6, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["2"] == "LABEL_2"
