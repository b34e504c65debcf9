"""`save_pretrained` of an adapted model, called by a person, by transformers' Trainer or by TRL's."""

import copy
import json
import pickle

import datasets
import peft
import pytest
import torch
from adapted import move
from conftest import make_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import doralib
from doralib import DoraConfig, UsageError

TARGETS = ("q_proj", "v_proj", "down_proj")


def ids():
    return torch.arange(12).view(2, 6)


@pytest.fixture
def base(tmp_path):
    model = make_llama().eval()
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    return model


def make(base, **changes):
    return move(doralib.adapt(copy.deepcopy(base), DoraConfig(r=3, target_modules=TARGETS, **changes)))


def assert_saved(folder, base, model):
    """The folder is an adapter for us and for PEFT, and nothing of the base is in it."""
    assert not (folder / "model.safetensors").exists()
    ours = doralib.load_adapter(copy.deepcopy(base), folder)
    assert torch.equal(ours(ids()).logits, model(ids()).logits)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_it_writes_the_adapter(base, method, tmp_path):
    model = make(base, method=method)
    model.save_pretrained(tmp_path / "deep" / "out", safe_serialization=True, max_shard_size="1GB")
    assert_saved(tmp_path / "deep" / "out", base, model)
    assert json.loads((tmp_path / "deep/out/adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_process_that_is_not_the_main_one_writes_nothing(base, tmp_path):
    make(base).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_every_adapter_is_written_as_peft_does(base, tmp_path):
    model = make(base)
    doralib.add_adapter(model, "second", DoraConfig(r=2, target_modules=("o_proj",)))
    move(model)
    model.save_pretrained(tmp_path / "out")
    assert_saved(tmp_path / "out", base, model)
    doralib.set_adapter(model, "second")
    assert_saved(tmp_path / "out" / "second", base, model)


def test_a_copy_saves_its_own_adapter(base, tmp_path):
    model = make(base)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        move(twin, 0.5)
        twin.save_pretrained(tmp_path / "twin")
        assert_saved(tmp_path / "twin", base, twin)
        assert not torch.equal(twin(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("how", ["merge", "merge_adapter", "remove"])
def test_without_an_adapter_it_writes_the_model(base, how, tmp_path):
    model = make(base)
    want = base(ids()).logits if how == "remove" else model(ids()).logits
    getattr(doralib, how)(model)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(ids()).logits, want)
    if how == "merge_adapter":
        doralib.unmerge_adapter(model)
        model.save_pretrained(tmp_path / "adapter")
        assert_saved(tmp_path / "adapter", base, model)


def test_pushing_is_refused_with_the_remedy(base, tmp_path):
    with pytest.raises(UsageError, match="save the adapter into a folder"):
        make(base).save_pretrained(tmp_path / "out", push_to_hub=True)


def test_transformers_trainer_saves_adapters(base, tmp_path):
    model = make(base)
    rows = datasets.Dataset.from_dict({"input_ids": ids().tolist(), "labels": ids().tolist()})
    args = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, learning_rate=0.01, report_to="none", use_cpu=True
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    model.eval()
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        assert_saved(folder, base, model)
    first = doralib.load_adapter(copy.deepcopy(base), tmp_path / "run" / "checkpoint-1")
    assert not torch.equal(first(ids()).logits, model(ids()).logits)


def test_trl_saves_adapters(base, tmp_path):
    import trl
    from conftest import make_tokenizer

    model = make(base)
    rows = datasets.Dataset.from_dict({"text": ["a dull film", "a brilliant film"]})
    # its default is bfloat16, in which the trained model would go on computing
    common = {"max_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    args = trl.SFTConfig(tmp_path / "run", max_length=8, **common)
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    model.eval()
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "final"):
        assert_saved(folder, base, model)
