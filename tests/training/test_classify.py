"""Heads from the recipe to the merged model: BERT-like and decoder models, a label for a text or for each word."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer

from doralib import DoraConfig, adapt, remove
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.data.classes import encode_words
from doralib.errors import Note, UsageError
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.metrics import tag_score
from doralib.evaluation.task import ClassificationTask
from doralib.recipe import Recipe
from doralib.training.job import train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"good": "positive", "wonderful": "positive", "dull": "negative", "terrible": "negative"}


def base(folder, kind):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(**SIZES, vocab_size=400, max_position_embeddings=64, pad_token_id=0)
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    else:
        config = transformers.LlamaConfig(**SIZES, vocab_size=400, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(kind, count=40):
    words = list(WORDS)
    texts = [f"a {words[i % 4]} film" if i % 3 else f"the {words[i % 4]} evening was long" for i in range(count)]
    if kind == "classify":
        return [{"text": text, "label": next(WORDS[w] for w in text.split() if w in WORDS)} for text in texts]
    return [{"words": text.split(), "tags": [WORDS.get(w, "O") for w in text.split()]} for text in texts]


def recipe(folder, kind, model, **changes):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    columns = {"classify": ("text", "label"), "tokens": ("words", "tags")}[kind]
    values = {
        "model": {"path": str(base(folder / "base", model)), "kind": kind},
        "data": {"train": str(folder / "train.jsonl"), "validation": 0.2, "prompt": columns[0], "target": columns[1]},
        "adapter": {"r": 4},
        "training": {"max_steps": 60, "learning_rate": 0.004, "per_device_train_batch_size": 8},
        "out": str(folder / "run"),
    }
    return Recipe(**{**values, **changes})


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


AUTO = {
    "classify": transformers.AutoModelForSequenceClassification,
    "tokens": transformers.AutoModelForTokenClassification,
}


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("classify", "bert"),
        ("tokens", "llama"),
        pytest.param("classify", "llama", marks=pytest.mark.long),
        pytest.param("tokens", "bert", marks=pytest.mark.long),
    ],
)
def test_from_the_recipe_to_the_merged_model(tmp_path, kind, model):
    steps = {"bert": (80, 0.01), "llama": (60, 0.004)}[model]
    training = {"max_steps": steps[0], "learning_rate": steps[1], "per_device_train_batch_size": 8}
    run = train(recipe(tmp_path, kind, model, training=training))
    results = json.loads((run / "results.json").read_text())
    metrics = results["after"]["validation"]["metrics"]
    assert set(metrics) == {"accuracy", "macro_f1"} | ({"token_f1"} if kind == "tokens" else set())
    assert metrics["accuracy"]["value"] > 0.9 > results["before"]["validation"]["metrics"]["accuracy"]["value"]
    assert "validation" in (run / "report.html").read_text()
    settings = json.loads((run / "adapter_config.json").read_text())
    assert settings["task_type"] == {"classify": "SEQ_CLS", "tokens": "TOKEN_CLS"}[kind]
    labels = ["negative", "positive"] if kind == "classify" else ["O", "negative", "positive"]
    assert json.loads((run / "doralib_labels.json").read_text())["labels"] == labels
    ids = torch.arange(5, 12)[None]
    loaded, tokenizer = load_model(str(run))
    want = logits(loaded, ids)
    merge_checkpoint(run, tmp_path / "base", tmp_path / "out")
    merged = AUTO[kind].from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, ids), want, atol=1e-5, rtol=1e-4)
    assert list(merged.config.id2label.values()) == labels
    theirs = AUTO[kind].from_pretrained(tmp_path / "base", num_labels=len(labels))
    theirs = peft.PeftModel.from_pretrained(theirs, run)
    torch.testing.assert_close(logits(theirs, ids), want, atol=1e-5, rtol=1e-4)
    if kind == "classify":
        (tmp_path / "test.jsonl").write_text((tmp_path / "train.jsonl").read_text())
        names = {"kind": "classification", "name": "t", "data": str(tmp_path / "test.jsonl"), "prompt": "text"}
        task = ClassificationTask(**names, answer="label", labels=["positive", "negative"])
        for each in (loaded, load_model(str(tmp_path / "out"))[0]):
            assert evaluate(each, tokenizer, [task])["t"].metrics["accuracy"].value > 0.9


def test_the_loss_is_the_mean_over_rows_whatever_the_batches(tmp_path):
    losses = []
    for i, training in enumerate(
        [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        steps = {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1, "train_sampling_strategy": "random"}
        run = train(recipe(folder, "classify", "llama", training={**steps, **training}))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=1e-3)


def test_full_fine_tuning_and_its_own_class(tmp_path):
    run = train(recipe(tmp_path, "classify", "llama", adapter={"method": "full"}, training={"max_steps": 2}))
    model, _ = load_model(str(run))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 2


def test_a_word_s_label_is_its_first_token_s():
    tokenizer = make_tokenizer()
    words = ["wonderful", "xyzzy", "film"]
    tokens, firsts = encode_words(tokenizer, words)
    assert tokens == tokenizer("wonderful xyzzy film")["input_ids"]
    assert [tokenizer.decode(tokens[i:j]).strip() for i, j in zip(firsts, [*firsts[1:], None], strict=True)] == words


def test_token_f1_counts_what_is_not_o():
    counts = torch.tensor([[90, 2, 0], [3, 4, 1], [0, 0, 5]]).numpy()
    # hits 9; truths that say something 8 + 5, predictions that do 6 + 6
    assert tag_score(counts, [1, 2], 0).value == pytest.approx(2 * 9 / (13 + 12))


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="no place for the head"):
        recipe(tmp_path, "classify", "llama", adapter={"method": "vera"})
    data = {"train": str(tmp_path / "train.jsonl"), "target": "lable"}
    with pytest.raises(UsageError, match=r"data.prompt: a classifier needs it[^!]*did you mean 'label'"):
        train(recipe(tmp_path, "classify", "llama", data=data))


def test_a_new_head_is_trained_by_every_method(tmp_path):
    """With method full too, where modules are named: the head is not among them."""
    values = recipe(tmp_path, "classify", "llama", training={"max_steps": 2, "learning_rate": 0.01}).model_dump()
    full = lambda targets: values | {"adapter": {"method": "full", "target_modules": targets}}
    run = train(Recipe(**full(["q_proj"])))
    other = train(Recipe(**full(["q_proj"]) | {"training": {"max_steps": 1}, "out": str(tmp_path / "other")}))
    one, two = (AUTO["classify"].from_pretrained(each / "model").score.weight for each in (run, other))
    assert not torch.equal(one, two)
    with pytest.raises(UsageError, match=r"'all-linear' leaves out score, which is new"):
        train(Recipe(**full("all-linear") | {"out": str(tmp_path / "third")}))


def test_a_head_that_is_left_frozen_is_named(tmp_path):
    model = AUTO["classify"].from_pretrained(base(tmp_path / "base", "llama"), num_labels=2)
    with pytest.warns(Note, match="'score' stays as it is, and where the base had none it is random"):
        adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, DoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("score",)))


def test_rows_of_a_grown_vocabulary_that_are_left_frozen_are_named(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base(tmp_path / "base", "llama"))
    model.resize_token_embeddings(402)
    with pytest.warns(Note, match="'model.embed_tokens' has rows 400 to 401 that the base's files do not"):
        adapt(model, DoraConfig(r=2, target_modules=("q_proj",)))
    remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, DoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(400, 401)))
