"""A model of another class is refused at load: a part of it would be random."""

import pytest
import torch
from tokenizer_kinds import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from doralib.checkpoints.heads import Head
from doralib.checkpoints.load import load_model
from doralib.checkpoints.models import find_head_modules, load_base, load_classifier
from doralib.errors import UsageError
from doralib.files import read_tensors, write_tensors
from doralib.recipe import ModelSettings

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
    "pad_token_id": 0,
}
TINY = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "masked": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(d_model=16, vocab_size=40, **BART)),
    "headless": lambda: LlamaModel(LlamaConfig(**SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied_headless": lambda: GPT2Model(GPT2Config(**TINY)),
    "scores": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)),
}
HEAD = Head("classify", ("no", "yes"), 0)


@pytest.fixture
def stored(tmp_path):
    def make(name):
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path)
        make_tokenizer("unigram").save_pretrained(tmp_path)
        return ModelSettings(path=str(tmp_path))

    return make


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert", r"(?s)cls\.predictions.*random.*of a BertForSequenceClassification: set model\.kind: classify"),
        ("bart", r"(?s)lm_head.*encoder.*loaded as a BartForCausalLM; its files are of a BartForConditionalGeneration"),
        ("headless", r"(?s)lm_head\.weight, which would be random.*of a LlamaModel: give the whole files"),
        ("scores", r"(?s)no place for: score\.weight.*set model\.kind: classify"),
    ],
)
def test_a_model_of_another_class_is_no_language_model(name, said, stored):
    with pytest.raises(UsageError, match=said):
        load_base(stored(name))


@pytest.mark.parametrize("name", ["masked", "tied", "untied", "tied_headless"])
def test_whole_models_load_tied_weights_too(name, stored):
    assert load_base(stored(name))


@pytest.mark.parametrize("name", MODELS)
def test_a_head_that_is_to_be_trained_may_be_missing(name, stored):
    model, _ = load_classifier(stored(name), HEAD)
    assert find_head_modules(model)


def test_but_no_layer_below_it(stored, tmp_path):
    settings = stored("bert")
    file = tmp_path / "model.safetensors"
    tensors = read_tensors(file)
    gone = [name for name in tensors if name.startswith("bert.encoder.layer.0.attention")]
    write_tensors(file, {name: tensor for name, tensor in tensors.items() if name not in gone})
    with pytest.raises(UsageError, match=r"bert\.encoder\.layer\.0\.attention.*would be random"):
        load_classifier(settings, HEAD)


def test_a_classifier_that_lacks_its_own_head_cannot_be_used(stored, tmp_path):
    stored("bert")
    file = tmp_path / "model.safetensors"
    write_tensors(file, {name: t for name, t in read_tensors(file).items() if not name.startswith("classifier.")})
    with pytest.raises(UsageError, match=r"classifier\.bias, classifier\.weight, which would be random"):
        load_model(str(tmp_path))


def test_a_weight_without_a_place_is_not_left_aside(stored, tmp_path):
    settings = stored("untied")
    file = tmp_path / "model.safetensors"
    write_tensors(file, {**read_tensors(file), "v_head.weight": torch.zeros(1, 16)})
    AutoModelForCausalLM.from_pretrained(tmp_path)  # with a log line alone
    with pytest.raises(UsageError, match=r"no place for: v_head\.weight"):
        load_base(settings)
