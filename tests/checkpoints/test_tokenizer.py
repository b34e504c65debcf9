"""The tokenizer beside an adapter comes first, in every verb, if it fits; and where a run's base is looked for."""

import json
import shutil

import pytest
import torch
from conftest import TEMPLATE, make_llama, make_tokenizer
from transformers import AutoTokenizer

import doralib
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import Ingredient, merge_checkpoint
from doralib.checkpoints.models import load_base
from doralib.config import DoraConfig
from doralib.data.encoding import check_ids, pad_token
from doralib.errors import UsageError
from doralib.evaluation.generation import generate
from doralib.files import read_json, write_json
from doralib.recipe import ModelSettings

OWN = TEMPLATE.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "<|begin|>")


def make_own(template=OWN):
    """A tokenizer with two tokens more than `make_tokenizer`, which end no text by themselves."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def make_plain():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def base(tmp_path):
    """A model of 400 tokens, room for two more, whose tokenizer has no template."""
    folder = tmp_path / "base"
    make_llama(vocab_size=len(make_plain()) + 2).save_pretrained(folder)
    make_plain().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    model, _ = load_base(ModelSettings(path=str(base)))
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    doralib.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_load_takes_the_adapters_own(base, adapter, caplog):
    make_own().save_pretrained(adapter)
    with caplog.at_level("INFO", logger="doralib"):
        model, tokenizer = load_model(str(adapter))
    assert caplog.messages == [f"with the tokenizer and chat template in {adapter}"]
    assert tokenizer.chat_template == OWN
    assert tokenizer("<|begin|>")["input_ids"] == make_own()("<|begin|>")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == [2, end]
    assert isinstance(generate(model, tokenizer, ["hi"], chat=True, max_new_tokens=2)[0], str)


def test_a_vocabulary_that_does_not_fit_is_said(base, adapter, caplog):
    own = make_own()
    own.add_tokens(["<one more>"])
    own.save_pretrained(adapter)
    with caplog.at_level("INFO", logger="doralib"):
        _, tokenizer = load_model(str(adapter))
    count = len(make_plain())
    assert caplog.messages == [
        f"the base's tokenizer is used: that of {adapter} does not fit, '<one more>' has id {count + 2}, and the model "
        f"has {count + 2} embeddings"
    ]
    assert len(tokenizer) == count
    summary = merge_checkpoint(adapter, base, base.parent / "merged")
    assert any("the base's tokenizer is kept: that of" in note for note in summary.notes)
    assert (base.parent / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_damaged_tokenizer_is_said(base, adapter, caplog):
    (adapter / "tokenizer.json").write_text("{")
    with caplog.at_level("INFO", logger="doralib"):
        _, tokenizer = load_model(str(adapter))
    assert "cannot be read" in caplog.text
    assert len(tokenizer) == len(make_plain())


def test_a_template_alone(base, adapter, caplog):
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    with caplog.at_level("INFO", logger="doralib"):
        _, tokenizer = load_model(str(adapter))
    assert caplog.messages == [f"with the base's tokenizer and the chat template in {adapter}"]
    assert tokenizer.chat_template == TEMPLATE
    merge_checkpoint(adapter, base, base.parent / "merged")
    assert AutoTokenizer.from_pretrained(base.parent / "merged").chat_template == TEMPLATE


def test_a_tokenizer_without_template_keeps_the_bases(base, adapter):
    make_tokenizer().save_pretrained(base)
    make_own(template=None).save_pretrained(adapter)
    _, tokenizer = load_model(str(adapter))
    assert tokenizer.chat_template == TEMPLATE
    assert "<|end|>" in tokenizer.get_vocab()
    merge_checkpoint(adapter, base, base.parent / "merged")
    merged = AutoTokenizer.from_pretrained(base.parent / "merged")
    assert merged.chat_template == TEMPLATE
    assert "<|end|>" in merged.get_vocab()


def test_a_lone_file_has_no_tokenizer(base, adapter):
    """In a folder of many adapters a tokenizer is nobody's."""
    make_own().save_pretrained(adapter)
    _, tokenizer = load_model(str(adapter / "adapter_model.safetensors"), base=str(base))
    assert len(tokenizer) == len(make_plain())


@pytest.mark.parametrize("has_settings", [True, False])
def test_merged_folders_stop_at_the_end_of_the_turn(base, adapter, has_settings):
    make_own().save_pretrained(adapter)
    if not has_settings:
        (base / "generation_config.json").unlink()
    out = base.parent / "merged"
    summary = merge_checkpoint(adapter, base, out)
    end = make_own().convert_tokens_to_ids("<|end|>")
    assert read_json(out / "generation_config.json")["eos_token_id"] == [2, end]
    assert f"with the tokenizer and chat template in {adapter}" in " ".join(summary.notes)
    assert "an answer ends at <|im_end|>, <|end|>" in " ".join(summary.notes)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    model, tokenizer = load_model(str(out))
    assert model.generation_config.eos_token_id == [2, end]
    assert model.generation_config.pad_token_id == 0
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|begin|>user\nhi<|end|>\n"


def test_settings_that_say_it_already_stay_as_they_are(base, adapter):
    make_tokenizer().save_pretrained(adapter)
    merge_checkpoint(adapter, base, base.parent / "merged")
    name = "generation_config.json"
    assert (base.parent / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_adapters_with_different_tokenizers_keep_the_bases(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "other")
    make_own().save_pretrained(adapter)
    make_tokenizer().save_pretrained(tmp_path / "other")
    out = tmp_path / "merged"
    summary = merge_checkpoint([Ingredient(adapter), Ingredient(tmp_path / "other")], base, out)
    assert "the base's tokenizer is kept" in " ".join(summary.notes)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_command_takes_an_adapters_own_tokenizer_too(run, base, adapter):
    make_own().save_pretrained(adapter)
    for arguments in ([adapter], [base, "--adapter", f"a={adapter}"]):
        status, out, err = run("generate", *arguments, "--chat", "--prompt", "hi", "--max-new-tokens", "2")
        assert status == 0, err
        assert f"with the tokenizer and chat template in {adapter}" in err
        assert "an answer ends at <|im_end|>, <|end|>" in err
        assert "tokenizer" not in out  # an answer, and nothing else


def test_ids_that_the_model_lacks_are_named(tiny_llama):
    model, tokenizer = tiny_llama
    tokenizer.add_tokens([f"<tool{i}>" for i in range(450 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<pad of another>"})
    last = tokenizer.convert_ids_to_tokens(449)
    check_ids(model, tokenizer, [[1, 2]], "the rows")
    with pytest.raises(UsageError, match=rf"for \(it has 400\), and the rows hold some: '{last}' \(id 449, in 2\)"):
        check_ids(model, tokenizer, [[1, 449], [449, 449], [3]], "the rows")
    with pytest.raises(UsageError, match="resize_token_embeddings"):
        generate(model, tokenizer, [f"a {last}"], max_new_tokens=2)
    # what only fills a batch up is no reason to refuse it
    assert pad_token(tokenizer, model) == tokenizer.eos_token_id
    assert len(generate(model, tokenizer, ["a", "a longer prompt"], max_new_tokens=2)) == 2


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"t": f"word {i} <tool>", "l": "x"}) + "\n" for i in range(8)))
    return tmp_path / "t.jsonl"


def recipe(model, rows, out, **data):
    return {
        "model": {"path": str(model)},
        "data": {"train": str(rows), "prompt": "{t}", "target": " {l}", **data},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4},
        "out": str(out),
    }


def test_a_run_names_tokens_without_embedding_before_training(run, base, rows, tmp_path):
    tokenizer = make_plain()
    tokenizer.add_tokens(["<a>", "<b>", "<tool>"])
    tokenizer.save_pretrained(base)
    write_json(tmp_path / "r.json", recipe(base, rows, tmp_path / "run"))
    shutil.copy(tmp_path / "r.json", tmp_path / "r.yaml")
    for verb in ("train", "data"):
        status, _, err = run(verb, tmp_path / "r.yaml")
        assert status == 2
        assert "and the rows hold some: '<tool>'" in err
        assert "resize_token_embeddings" in err
    assert not (tmp_path / "run").exists()


def test_a_run_is_used_from_any_folder(run, base, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "r.yaml", recipe("base", rows, "runs/one"))
    status, _, err = run("train", "r.yaml")
    assert status == 0, err
    assert read_json(tmp_path / "runs/one/adapter_config.json")["base_model_name_or_path"] == str(base)
    assert f"path: {base}" in (tmp_path / "runs/one/config.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for verb, *more in (("generate", "--prompt", "a", "--max-new-tokens", "2"), ("merge", "--out", "merged")):
        status, _, err = run(verb, tmp_path / "runs/one", *more)
        assert status == 0, err
    # the same settings, though the recipe names the model in another way
    monkeypatch.chdir(tmp_path)
    assert run("train", "r.yaml", "--resume", f"model.path={base}")[0] == 0


def test_a_relative_base_is_looked_for_beside_the_adapter(run, base, adapter, tmp_path, monkeypatch):
    """As PEFT and older runs write it."""
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**settings, "base_model_name_or_path": "base"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for verb, *more in (("generate", "--prompt", "a", "--max-new-tokens", "2"), ("merge", "--out", "merged")):
        status, _, err = run(verb, adapter, *more)
        assert status == 0, err
    shutil.move(base, tmp_path / "gone")
    for verb, *more in (("generate", "--prompt", "a"), ("merge", "--out", "merged2")):
        status, _, err = run(verb, adapter, *more)
        assert status == 2
        assert f"looked for {tmp_path / 'elsewhere' / 'base'} and {tmp_path / 'base'}" in err
        assert "--base" in err


def test_the_largest_id_is_read_from_files_of_every_kind(base, adapter):
    from doralib.checkpoints.tokenizer import find_misfit, find_own_tokenizer

    vocabulary = make_own().get_vocab()
    write_json(adapter / "vocab.json", {k: v for k, v in vocabulary.items() if v < 300})
    write_json(adapter / "added_tokens.json", {k: v for k, v in vocabulary.items() if v >= 300})
    own = find_own_tokenizer(adapter)
    assert find_misfit(own, {"vocab_size": max(vocabulary.values()) + 1}) == ""
    assert "'<|end|>' has id" in find_misfit(own, {"text_config": {"vocab_size": max(vocabulary.values())}})
    (adapter / "vocab.json").unlink()
    write_json(adapter / "tokenizer.json", {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []})
    assert find_misfit(own, {"vocab_size": 2}) == ""
    assert "'b' has id 1" in find_misfit(own, {"vocab_size": 1})


def test_loading_a_base_sets_its_ends(base):
    make_own().save_pretrained(base)
    model, tokenizer = load_base(ModelSettings(path=str(base)))
    ids = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] <= 5
    assert tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id
