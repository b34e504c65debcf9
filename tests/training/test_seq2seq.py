"""Encoder-decoders from the recipe to the merged model: BART, T5, mBART, NLLB and Marian as tiny random ones."""

import json

import peft
import pytest
import torch
import transformers
from torch.nn import functional as nnf
from translators import EOS, LANGUAGES, PAD, make_model, make_tokenizer, rows, write_rows
from typer.testing import CliRunner

from doralib.checkpoints.kind import find_kind
from doralib.checkpoints.load import load_model
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.verify import verify_merge
from doralib.cli.main import app
from doralib.data.batches import PairCollator
from doralib.data.encoding import encode
from doralib.data.pairs import encode_pairs, find_start, set_languages
from doralib.data.rows import read_both
from doralib.errors import UsageError
from doralib.evaluation.generation import generate
from doralib.recipe import DataSettings, Recipe
from doralib.training.job import train
from doralib.training.label_trainer import LabelTrainer
from doralib.training.loss import DecoderLoss


def make_recipe(folder, kind, **changes):
    base = folder / "base"
    if not base.exists():
        make_model(kind).save_pretrained(base)
        make_tokenizer(kind).save_pretrained(base)
    task = {"kind": "translation", "data": write_rows(folder), "prompt": "en", "answer": "ro", "max_new_tokens": 8}
    (folder / "ro.yaml").write_text(json.dumps(task))
    targets = {"t5": ["q", "v", "wi", "wo"]}.get(kind, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    values = {
        "model": {"path": str(base)},
        "data": {"train": write_rows(folder), "validation": 0.1, "prompt": "en", "target": "ro"},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": targets},
        "training": {"max_steps": 70, "learning_rate": 0.03, "per_device_train_batch_size": 16},
        "eval": {"tasks": [str(folder / "ro.yaml")], "limit": 12},
        "out": str(folder / "run"),
    }
    return Recipe(**{**values, **changes})


@pytest.fixture(scope="module", params=["bart", "t5"])
def trained(request, tmp_path_factory):
    """A run of a tiny model on pairs of words."""
    pytest.importorskip("sacrebleu")
    folder = tmp_path_factory.mktemp(request.param)
    # one of them learns; of the other two steps show that it goes
    steps = {} if request.param == "bart" else {"training": {"max_steps": 2}}
    return request.param, folder, train(make_recipe(folder, request.param, **steps))


def test_the_run_learns_and_says_so(trained):
    kind, _, run = trained
    results = json.loads((run / "results.json").read_text())
    before, after = (results[when]["ro"]["metrics"] for when in ("before", "after"))
    assert set(after) == {"bleu", "chrf"}
    assert kind == "t5" or after["chrf"]["value"] > 60 > before["chrf"]["value"]
    sample = json.loads((run / "samples.json").read_text())[0]
    assert {"prompt", "expected", "before", "after"} <= set(sample)
    page = (run / "report.html").read_text()
    assert "AutoModelForSeq2SeqLM" in page
    assert "chrf" in page
    settings = json.loads((run / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    assert "AutoPeftModelForSeq2SeqLM" in (run / "README.md").read_text()


def test_a_run_writes_text(trained):
    kind, _, run = trained
    model, tokenizer = load_model(str(run))
    asked = [row["en"] for row in rows(12)]
    said = generate(model, tokenizer, asked, max_new_tokens=8, batch_size=5)
    right = sum(text.split() == row["ro"].split() for text, row in zip(said, rows(12), strict=True))
    assert kind == "t5" or right >= 8
    assert said == [generate(model, tokenizer, [text], max_new_tokens=8)[0] for text in asked]
    found = CliRunner().invoke(app, ["generate", str(run), "--prompt", asked[0], "--max-new-tokens", "8"])
    assert found.exit_code == 0, found.output
    assert said[0] in found.output


def test_the_merged_model_is_of_its_class_and_the_same(trained):
    _, folder, run = trained
    merge_checkpoint(run, folder / "base", folder / "merged")
    assert verify_merge(folder / "merged", run, folder / "base").passed
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "merged")
    ours, tokenizer = load_model(str(run))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, run)
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    ids = torch.tensor([encode(tokenizer, "one two", whole=True)])
    want = ours(input_ids=ids, labels=ids).logits
    for model in (merged, theirs):
        torch.testing.assert_close(model.eval()(input_ids=ids, labels=ids).logits, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bart", "t5", "mbart", "marian"])
def test_the_loss_is_that_of_a_forward_made_by_hand(tmp_path, kind):
    model, tokenizer = make_model(kind).eval(), make_tokenizer(kind)
    settings = DataSettings(train=write_rows(tmp_path), style="completion", prompt="en", target="ro")
    raw = read_both(settings, 0)
    made = encode_pairs(raw.train, raw.train_numbers, settings, tokenizer)
    batch = PairCollator(PAD)([made.rows[i] for i in range(3)])
    batch.pop("num_tokens")
    loss, count = DecoderLoss()(model, batch)
    logp = []
    for i in range(3):
        source, target = made.rows[i]["input_ids"], made.rows[i]["labels"]
        # mBART turns the last token to the front, the others put a token of their own there
        start = [EOS] if kind in ("bart", "mbart") else [PAD]
        logits_TV = model(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[*start, *target[:-1]]])
        ).logits[0]
        logp.append(nnf.log_softmax(logits_TV.double(), -1)[range(len(target)), target])
    assert count == sum(map(len, logp))
    torch.testing.assert_close(loss.double(), -torch.cat(logp).sum(), rtol=1e-5, atol=1e-5)


def test_languages_of_nllb(tmp_path):
    tokenizer = make_tokenizer("nllb")
    settings = DataSettings(
        train=write_rows(tmp_path), style="completion", prompt="en", target="ro", source_language="eng_Latn",
        language="ron_Latn",
    )  # fmt: skip
    set_languages(tokenizer, settings)
    raw = read_both(settings, 0)
    row = encode_pairs(raw.train, raw.train_numbers, settings, tokenizer).rows[0]
    english, romanian = tokenizer.convert_tokens_to_ids(LANGUAGES)
    assert (row["input_ids"][0], row["input_ids"][-1]) == (english, EOS)
    assert (row["labels"][0], row["labels"][-1]) == (romanian, EOS)
    assert find_start(tokenizer) == {"forced_bos_token_id": romanian}
    tokenizer.save_pretrained(tmp_path / "kept")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert (again.src_lang, again.tgt_lang) == ("eng_Latn", "ron_Latn")
    with pytest.raises(UsageError, match=r"data.source_language: .*name it[\s\S]*no language 'ron_Ltn'.*ron_Latn"):
        set_languages(tokenizer, settings.model_copy(update={"source_language": None, "language": "ron_Ltn"}))
    with pytest.raises(UsageError, match="marks no language"):
        set_languages(make_tokenizer(), settings)


def test_an_answer_begins_with_the_language_that_was_trained(tmp_path):
    languages = {"source_language": "eng_Latn", "language": "ron_Latn"}
    data = {"train": write_rows(tmp_path), "prompt": "en", "target": "ro", **languages}
    run = train(make_recipe(tmp_path, "nllb", data=data, training={"max_steps": 1}, eval={}))
    model, tokenizer = load_model(str(run))
    romanian = tokenizer.convert_tokens_to_ids("ron_Latn")
    assert model.generation_config.forced_bos_token_id == romanian
    ids = model.generate(torch.tensor([encode(tokenizer, "one", whole=True)]), max_new_tokens=3)
    assert ids[0, 1] == romanian
    merge_checkpoint(run, tmp_path / "base", tmp_path / "merged")
    assert load_model(str(tmp_path / "merged"))[0].generation_config.forced_bos_token_id == romanian


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"packing": True, "loss_on": "all"}, r"data.packing: [\s\S]*data.loss_on: "),
        ({"prompt": None}, "set data.prompt and data.target"),
        ({"language": "ro"}, "marks no language"),
        ({"prompt": "english"}, "no column 'english'"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path, data, said):
    settings = {"train": write_rows(tmp_path), "prompt": "en", "target": "ro", **data}
    with pytest.raises(UsageError, match=said):
        train(make_recipe(tmp_path, "bart", data=settings))


def test_a_likelihood_task_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(
        json.dumps({"kind": "perplexity", "data": write_rows(tmp_path), "prompt": "en", "text": "ro"})
    )
    with pytest.raises(UsageError, match="this model writes its own"):
        train(make_recipe(tmp_path, "bart", eval={"tasks": [str(tmp_path / "c.yaml")]}))


def test_kinds_by_config():
    assert find_kind({"architectures": ["BartModel"], "model_type": "bart", "is_encoder_decoder": True}) == "seq2seq"
    assert (
        find_kind({"architectures": ["WhisperModel"], "model_type": "whisper", "is_encoder_decoder": True}) == "speech"
    )
    assert find_kind({"architectures": ["MarianMTModel"]}) == "seq2seq"


@pytest.mark.long
def test_killed_and_resumed_is_the_same_run(tmp_path, monkeypatch):
    training = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 6}
    adapter = {"r": 4, "target_modules": ["q_proj", "fc1"], "lora_dropout": 0.1}
    settings = {"training": training, "adapter": adapter, "eval": {}}
    whole = train(make_recipe(tmp_path, "bart", **settings, out=str(tmp_path / "whole")))
    cut = make_recipe(tmp_path, "bart", **settings, out=str(tmp_path / "cut"))
    calls, step = [], LabelTrainer.training_step

    def die(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("killed")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LabelTrainer, "training_step", die)
    with pytest.raises(MemoryError):
        train(cut)
    monkeypatch.undo()
    again = train(cut, resume=True)
    for name in ("adapter_model.safetensors", "samples.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
