"""Vocabularies: resized, trained by the token, tied; every case as PEFT itself writes it, in memory and in a merge."""

import peft
import pytest
import torch
import transformers
from adapted import move
from safetensors.torch import load_file, save_file

import doralib
from doralib.checkpoints.merge import merge_checkpoint
from doralib.config import DoraConfig
from doralib.errors import DoraError, UsageError
from doralib.files import read_json

V, H = 20, 16
IDS = torch.arange(12)[None]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make(*, tie: bool, gemma: bool = False):
    settings = {
        "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "num_key_value_heads": 2, "vocab_size": V, "tie_word_embeddings": tie,
    }  # fmt: skip
    torch.manual_seed(0)
    if gemma:
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings, head_dim=8))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def close(got, want):
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


# the settings of PEFT's adapter, the new number of tokens, and whether a merge into a tied base needs --untie
CASES = {
    "resized": ({}, 23, False),
    "resized down": ({}, 15, False),
    "resized and saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 23, True),
    "saved embedding": ({"modules_to_save": ["embed_tokens"]}, None, True),
    "saved and tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None, False),
    "adapted head": ({"target_modules": ["q_proj", "lm_head"]}, None, True),
    "adapted embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, None, True),
    "resized and adapted": ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, 23, True),
    "tokens": ({"trainable_token_indices": [3, 4]}, None, False),
    "tokens by name": ({"trainable_token_indices": {"embed_tokens": [4, 3]}}, None, False),
    "tokens of both": ({"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}}, None, True),
    "new tokens": ({"trainable_token_indices": [20, 21, 22]}, 23, False),
    "new tokens of more": ({"trainable_token_indices": [1, 22]}, 23, False),
    "tokens alone": (None, None, False),
}
each_case = pytest.mark.parametrize("case", CASES)
each_tie = pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])


def write(folder, case, *, tie, gemma=False):
    """PEFT's adapter of a saved base, moved from its start, and the logits that it gives."""
    settings, size, _ = CASES[case]
    base = make(tie=tie, gemma=gemma)
    base.save_pretrained(folder / "base")
    model = fresh(folder)
    if size is not None:
        model.resize_token_embeddings(size)
    if settings is None:
        config = peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"])
    else:
        config = peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], "use_dora": True, **settings})
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if p.requires_grad:
                p.mul_(1.2) if "magnitude" in name else p.add_(torch.randn_like(p) * 0.2)
    tuned.save_pretrained(folder / "peft")
    return logits(tuned)


def fresh(folder, name="base"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name)


@each_tie
@each_case
def test_load_and_save_again(tmp_path, case, tie):
    want = write(tmp_path, case, tie=tie)
    loaded = doralib.load_adapter(fresh(tmp_path), tmp_path / "peft")
    close(logits(loaded), want)
    doralib.save_adapter(loaded, tmp_path / "again")
    close(logits(doralib.load_adapter(fresh(tmp_path), tmp_path / "again")), want)
    theirs = fresh(tmp_path)
    if CASES[case][1] is not None:
        theirs.resize_token_embeddings(CASES[case][1])
    close(logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "again")), want)


@each_tie
@each_case
def test_merge(tmp_path, case, tie):
    want = write(tmp_path, case, tie=tie)
    untie = tie and CASES[case][2]
    if untie:
        with pytest.raises(DoraError, match="--untie"):
            merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out")
    merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out", untie=untie)
    merged = fresh(tmp_path, "out")
    close(logits(merged), want)
    config = read_json(tmp_path / "out" / "config.json")
    assert config["vocab_size"] == want.shape[-1] == merged.get_input_embeddings().weight.shape[0]
    assert config["tie_word_embeddings"] is (tie and not untie)


@pytest.mark.parametrize("case", ["tokens", "saved embedding", "saved and tied", "resized"])
def test_merge_into_files_that_store_a_tied_head(tmp_path, case):
    want = write(tmp_path, case, tie=True)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    untie = case == "saved embedding"
    if untie:
        with pytest.raises(DoraError, match=r"tied to model.embed_tokens.weight by config.json[^!]*--untie"):
            merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out")
    merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out", untie=untie)
    close(logits(fresh(tmp_path, "out")), want)


@each_tie
@pytest.mark.parametrize("case", ["tokens", "new tokens", "saved embedding", "adapted head"])
def test_merge_in_memory(tmp_path, case, tie):
    want = write(tmp_path, case, tie=tie)
    model = doralib.merge(doralib.load_adapter(fresh(tmp_path), tmp_path / "peft"))
    close(logits(model), want)
    model.save_pretrained(tmp_path / "out")
    close(logits(fresh(tmp_path, "out")), want)


def test_scaled_embeddings(tmp_path):
    want = write(tmp_path, "tokens", tie=True, gemma=True)
    close(logits(doralib.load_adapter(fresh(tmp_path), tmp_path / "peft")), want)
    merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out")
    close(logits(fresh(tmp_path, "out")), want)


@each_tie
def test_merged_rows_are_exact(tmp_path, tie):
    write(tmp_path, "tokens", tie=tie)
    merge_checkpoint(tmp_path / "peft", tmp_path / "base", tmp_path / "out")
    name = "model.embed_tokens.weight"
    base, out = (load_file(tmp_path / each / "model.safetensors")[name] for each in ("base", "out"))
    rows = load_file(tmp_path / "peft" / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    base[[3, 4]] = rows
    assert torch.equal(out, base)


@each_tie
def test_training_moves_those_rows_alone(tmp_path, tie):
    model = make(tie=tie)
    model.save_pretrained(tmp_path / "base")
    start = model.get_input_embeddings().weight.clone()
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(3, 7)))
    close(logits(model), logits(fresh(tmp_path)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    rows = model.get_input_embeddings().trainable_tokens_delta
    assert rows.grad.shape == (2, H)
    assert rows.grad.any(1).all()
    assert model.get_input_embeddings().base_layer.weight.grad is None
    move(model)
    doralib.save_adapter(model, tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(fresh(tmp_path), tmp_path / "ours")), logits(model))
    doralib.merge(model)
    moved = (model.get_input_embeddings().weight != start).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7]


def test_gradients_of_tied_rows_are_peft_s(tmp_path):
    write(tmp_path, "tokens", tie=True)
    ours = doralib.load_adapter(fresh(tmp_path), tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(fresh(tmp_path), tmp_path / "peft", is_trainable=True)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    got, want = (
        next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).grad for model in (ours, theirs)
    )
    close(got, want)


def test_both_places_of_a_tied_weight_are_trained_as_one(tmp_path):
    model = make(tie=True)
    model.save_pretrained(tmp_path / "base")
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head")))
    move(model)
    assert model.get_input_embeddings().trained.weight is model.lm_head.trained.weight
    doralib.save_adapter(model, tmp_path / "ours")
    close(logits(doralib.load_adapter(fresh(tmp_path), tmp_path / "ours")), logits(model))
    merge_checkpoint(tmp_path / "ours", tmp_path / "base", tmp_path / "out")
    close(logits(fresh(tmp_path, "out")), logits(model))


def test_what_cannot_be_is_told(tmp_path):
    with pytest.raises(UsageError, match="no token 99"):
        doralib.adapt(make(tie=False), DoraConfig(trainable_token_indices=(99,)))
    with pytest.raises(UsageError, match="trained whole too"):
        doralib.adapt(make(tie=False), DoraConfig(trainable_token_indices=(3,), modules_to_save=("embed_tokens",)))
    write(tmp_path, "resized", tie=False)
    model = doralib.adapt(make(tie=False), DoraConfig(target_modules=("k_proj",)))
    with pytest.raises(UsageError, match="23 tokens, and the model 20"):
        doralib.load_adapter(model, tmp_path / "peft", "second")
