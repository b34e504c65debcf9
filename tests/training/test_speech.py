"""Speech from rows of sounds to the merged model: Whisper, wav2vec2 and Moonshine as tiny random ones."""

import json
import pathlib

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as nnf
from typer.testing import CliRunner

soundfile = pytest.importorskip("soundfile", reason="sounds are an extra")
pytest.importorskip("soxr", reason="sounds are an extra")
pytest.importorskip("jiwer", reason="sounds are an extra")

from speech_kinds import RATE, save_moonshine, save_wav2vec2, save_whisper, teach_whisper, tone, write_clips  # noqa: E402

from doralib.checkpoints.load import load_model  # noqa: E402
from doralib.checkpoints.merge import merge_checkpoint  # noqa: E402
from doralib.checkpoints.models import load_speech  # noqa: E402
from doralib.checkpoints.verify import verify_merge  # noqa: E402
from doralib.cli.main import app  # noqa: E402
from doralib.errors import DoraError, UsageError  # noqa: E402
from doralib.evaluation.evaluate import evaluate  # noqa: E402
from doralib.evaluation.rows import read_examples  # noqa: E402
from doralib.evaluation.task_file import KINDS, read_task  # noqa: E402
from doralib.evaluation.transcripts import transcribe  # noqa: E402
from doralib.recipe import ModelSettings, Recipe  # noqa: E402
from doralib.training.job import train  # noqa: E402
from doralib.training.label_trainer import LabelTrainer  # noqa: E402
from doralib.training.loss import DecoderLoss, FrameLoss  # noqa: E402
from doralib.training.modalities.speech import Speech  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TEXTS = {"unu": "doi", "doi": "trei", "trei": "patru", "patru": "unu"}


def make_recipe(folder, base, data=None, **changes):
    given = data or {}
    if "train" not in given:
        given = {"train": write_clips(folder), "validation": write_clips(folder, 8, "test.jsonl"), **given}
    values = {
        "model": {"path": str(base), "kind": "auto"},
        "data": {"language": "ro", **given},
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": TARGETS},
        "training": {"max_steps": 1, "per_device_train_batch_size": 8},
        "eval": {"batch_size": 4},
        "out": str(folder / "run"),
    }
    return Recipe(**{**values, **changes})


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("whisper") / "base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a tiny Whisper that knows tones and learns other words for them, in a window of one second."""
    folder = tmp_path_factory.mktemp("speech")
    teach_whisper(save_whisper(folder / "base"))
    data = {"train": write_clips(folder, texts=TEXTS), "validation": write_clips(folder, 8, "test.jsonl", TEXTS)}
    training = {"max_steps": 40, "learning_rate": 0.02, "per_device_train_batch_size": 8}
    return folder, train(make_recipe(folder, folder / "base", {**data, "audio_seconds": 1}, training=training))


def test_the_run_learns_and_can_be_heard(trained):
    _, run = trained
    results = json.loads((run / "results.json").read_text())
    before, after = (results[when]["validation"]["metrics"]["wer"]["value"] for when in ("before", "after"))
    assert after <= 0.25 < 0.9 < before
    assert results["after"]["validation"]["kind"] == "words"
    page = (run / "report.html").read_text()
    assert page.count('<audio src="data:audio/mpeg;base64,') == 5
    assert "media-src data:" in page
    sample = json.loads((run / "samples.json").read_text())[0]
    assert sample["expected"] in TEXTS.values()
    assert {"before", "after", "sound"} <= set(sample)
    assert f"doralib generate {run} --audio" in page


def test_a_run_writes_what_it_hears(trained, tmp_path):
    folder, run = trained
    sounds = [str(folder / "clips" / f"{i}.wav") for i in range(4)]
    model, processor = load_model(str(run))
    assert (model.generation_config.language, model.generation_config.task) == ("ro", "transcribe")
    said = transcribe(model, processor, sounds, batch_size=3)
    assert sum(text == word for text, word in zip(said, TEXTS.values(), strict=True)) >= 3
    found = CliRunner().invoke(app, ["generate", str(run), *[part for each in sounds for part in ("--audio", each)]])
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-4:] == [f"{sound}: {text}" for sound, text in zip(sounds, said, strict=True)]
    for asked, why in ((["--audio", "none.wav"], "there is no sound"), ([], "--audio FILE"), (["-p", "a"], "--audio")):
        found = CliRunner().invoke(app, ["generate", str(run), *asked])
        assert isinstance(found.exception, UsageError)
        assert why in str(found.exception)


def test_merged_with_its_window_it_is_plain_whisper(trained):
    folder, run = trained
    merge_checkpoint(run, folder / "base", folder / "merged")
    assert verify_merge(folder / "merged", run, folder / "base").passed
    merged = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder / "merged")
    processor = transformers.AutoProcessor.from_pretrained(folder / "merged")
    assert (merged.config.max_source_positions, processor.feature_extractor.chunk_length) == (50, 1)
    sound, rate = soundfile.read(folder / "clips" / "1.wav", dtype="float32")
    features = processor(sound, sampling_rate=rate, return_tensors="pt")
    ids = merged.generate(**features, max_new_tokens=12)
    ours = transcribe(*load_model(str(run)), [str(folder / "clips" / "1.wav")])
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == ours[0]


def make_task(kind, data):
    return KINDS[kind](kind=kind, name=kind, data=str(data), answer="text")


def test_a_task_of_words(trained):
    folder, run = trained
    (folder / "words.yaml").write_text(json.dumps({"kind": "words", "data": "test.jsonl", "answer": "text"}))
    model, processor = load_model(str(run))
    found = evaluate(model, processor, [read_task(folder / "words.yaml")])["words"]
    results = json.loads((run / "results.json").read_text())
    assert found.metrics["wer"].value == results["after"]["validation"]["metrics"]["wer"]["value"]
    with pytest.raises(UsageError, match="asks a model that gives labels to sounds"):
        evaluate(model, processor, [make_task("audio-class", folder / "test.jsonl")])


def test_sounds_that_a_task_cannot_hear_are_all_told(tmp_path):
    write_clips(tmp_path, 4, "test.jsonl")
    (tmp_path / "clips" / "1.wav").unlink()
    soundfile.write(tmp_path / "clips" / "2.wav", np.zeros(RATE), RATE)
    with pytest.raises(
        DoraError, match=r"of its sounds 2 cannot be heard:\s+row 2: there is no sound .*\s+row 3: .*silent"
    ):
        read_examples(make_task("words", tmp_path / "test.jsonl"))


def test_a_task_hears_sounds_that_rows_hold(tmp_path):
    path = pathlib.Path(write_clips(tmp_path, 2))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sounds = [{"bytes": (tmp_path / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows]
    made = datasets.Dataset.from_dict({"audio": sounds, "text": [row["text"] for row in rows]})
    made.cast_column("audio", datasets.Audio()).to_parquet(str(tmp_path / "held.parquet"))
    found = read_examples(make_task("words", tmp_path / "held.parquet"))
    assert [example.answer for example in found] == [row["text"] for row in rows]
    assert [example.sound for example in found] == sounds


def prepare(folder, base, data=None):
    """Model, processor, data and a batch of two rows."""
    recipe, modality = make_recipe(folder, base, data), Speech()
    rows = modality.check_rows(recipe.data, 0)
    model, processor = load_speech(ModelSettings(path=str(base)))
    made = modality.prepare(rows, recipe.data, model, processor)
    batch = modality.collate(model, processor, made)([made.train.rows[i] for i in range(2)])
    batch.pop("num_tokens")
    return model.eval(), processor, made, batch


def test_whispers_labels_and_loss_are_those_made_by_hand(tmp_path, whisper):
    model, processor, _, batch = prepare(tmp_path, whisper)
    tokens = [processor.tokenizer.convert_ids_to_tokens(row[row >= 0]) for row in batch["labels"]]
    assert tokens[0] == ["<|ro|>", "<|transcribe|>", "<|notimestamps|>", *"unu", "<|endoftext|>"]
    loss, count = DecoderLoss()(model, batch)
    logp = []
    for i, row in enumerate(batch["labels"]):
        target = row[row >= 0]
        start = torch.cat([torch.tensor([model.config.decoder_start_token_id]), target[:-1]])
        logits_TV = model(input_features=batch["input_features"][i : i + 1], decoder_input_ids=start[None]).logits[0]
        logp.append(nnf.log_softmax(logits_TV.double(), -1)[range(len(target)), target])
    assert count == sum(map(len, logp))
    torch.testing.assert_close(loss.double(), -torch.cat(logp).sum(), rtol=1e-5, atol=1e-5)


def test_english_is_the_second_task(tmp_path, whisper):
    _, processor, made, _ = prepare(tmp_path, whisper, {"translate": True})
    assert processor.tokenizer.convert_ids_to_tokens(made.train.rows[0]["labels"])[1] == "<|translate|>"


def test_the_loss_of_frames_is_a_sum_over_all_ways_to_write_the_letters(tmp_path):
    base = save_wav2vec2(tmp_path / "base")
    model, processor, _, batch = prepare(tmp_path, base, {"language": None})
    assert processor.tokenizer.decode(batch["labels"][1][batch["labels"][1] >= 0], group_tokens=False) == "doi"
    frames = FrameLoss(model)
    loss, count = frames(model, batch)
    frames.remove()
    assert count == 6
    want = 0.0
    for i in range(2):
        target = batch["labels"][i][batch["labels"][i] >= 0]
        mask = batch["attention_mask"][i : i + 1].sum()
        logp_TV = nnf.log_softmax(model(batch["input_values"][i : i + 1, :mask]).logits[0].double(), -1)
        want -= sum_of_ways(logp_TV, target.tolist(), blank=0)
    assert loss.item() == pytest.approx(want, rel=1e-4)
    assert model.config.ctc_loss_reduction == "sum"


def sum_of_ways(logp_TV, target, blank):
    """log of the summed probability of all rows of frames that read as the target: the forward algorithm, by hand."""
    states = [blank, *[each for letter in target for each in (letter, blank)]]
    alpha = [logp_TV[0, states[0]], logp_TV[0, states[1]]] + [torch.tensor(-torch.inf).double()] * (len(states) - 2)
    for logp_V in logp_TV[1:]:
        new = []
        for s, letter in enumerate(states):
            came = [alpha[s]] + ([alpha[s - 1]] if s else [])
            if s > 1 and letter not in (blank, states[s - 2]):
                came.append(alpha[s - 2])
            new.append(torch.logsumexp(torch.stack(came), 0) + logp_V[letter])
        alpha = new
    return torch.logsumexp(torch.stack(alpha[-2:]), 0).item()


@pytest.mark.long
@pytest.mark.parametrize("save", [save_wav2vec2, save_moonshine])
def test_other_models_train_are_scored_and_merge(tmp_path, save):
    base = save(tmp_path / "base")
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    run = train(make_recipe(tmp_path, base, {"language": None}, adapter=adapter, training={"max_steps": 2}))
    assert set(json.loads((run / "results.json").read_text())["after"]["validation"]["metrics"]) == {"wer", "cer"}
    merge_checkpoint(run, base, tmp_path / "merged")
    assert verify_merge(tmp_path / "merged", run, base).passed
    assert len(transcribe(*load_model(str(tmp_path / "merged")), [str(tmp_path / "clips" / "0.wav")])) == 1


def test_spec_augment_is_the_models_own(tmp_path, whisper):
    model, processor, _, batch = prepare(tmp_path, whisper)
    assert "attention_mask" not in batch
    model.config.apply_spec_augment, model.config.mask_time_prob, model.config.mask_time_length = True, 0.5, 2
    row = {"audio": str(tmp_path / "clips" / "0.wav"), "labels": [1]}
    batch = Speech().collate(model, processor, None)([row])
    heard = batch["input_features"].clone()
    np.random.seed(0)
    model.train()(**{name: value for name, value in batch.items() if name != "num_tokens"})
    # transformers hides stretches of the batch itself, none of them beyond the sound
    hidden = (batch["input_features"] == 0).all(1) & (heard != 0).any(1)
    assert 0 < hidden.sum() <= 40
    assert not hidden[:, 40:].any()


def test_bad_sounds_are_left_out_and_named(tmp_path, whisper):
    path = write_clips(tmp_path, 8)
    clips = tmp_path / "clips"
    soundfile.write(clips / "1.wav", np.zeros(RATE), RATE)
    (clips / "2.wav").write_bytes(b"RIFF")
    (clips / "3.wav").unlink()
    soundfile.write(clips / "4.wav", np.tile(tone("unu"), 8), RATE)
    with pathlib.Path(path).open("a") as file:
        file.write(json.dumps({"audio": "clips/0.wav", "text": " "}) + "\n")
        for value in (None, 7, ["clips/0.wav"]):
            file.write(json.dumps({"audio": value, "text": "unu"}) + "\n")
    recipe, modality = make_recipe(tmp_path / "other", whisper, {"train": path, "validation": None}), Speech()
    rows = modality.check_rows(recipe.data, 0)
    report = modality.prepare(rows, recipe.data, *load_speech(ModelSettings(path=str(whisper)))).train.report
    assert (report.rows, report.kept) == (12, 4)
    kinds = {"silent": 1, "broken": 1, "missing": 1, "longer than 2 seconds": 1, "empty": 4}
    assert dict(report.dropped) == kinds
    told = "\n".join(report.lines())
    for said in ("row 2: ", "1.wav is silent", "2.wav cannot be read", "there is no sound", "has 3.2 seconds"):
        assert said in told


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"language": None}, "data.language: name the language"),
        ({"language": "klingon"}, "data.language: .*klingon"),
        ({"target": "txt"}, "no column 'txt'.*did you mean 'text'"),
        ({"audio": "sound"}, "no column 'sound'"),
        ({"prompt": "text"}, "what a model hears is its prompt"),
        ({"too_long": "truncate"}, "only skip"),
        ({"source_language": "en"}, "read for model.kind seq2seq"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path, whisper, data, said):
    with pytest.raises(UsageError, match=said):
        train(make_recipe(tmp_path, whisper, data))


def test_a_model_that_marks_no_language_gets_none(tmp_path):
    with pytest.raises(UsageError, match="marks neither language nor task"):
        train(make_recipe(tmp_path, save_wav2vec2(tmp_path / "base"), adapter={"target_modules": ["q_proj"]}))


@pytest.mark.long
@pytest.mark.parametrize("save", [save_whisper, save_wav2vec2])
def test_killed_and_resumed_is_the_same_run(tmp_path, save, monkeypatch):
    """With SpecAugment, whose random numbers are numpy's."""
    base = save(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    spec = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 2}
    (base / "config.json").write_text(json.dumps({**config, **spec}))
    data = {"audio_seconds": 1} if save is save_whisper else {"language": None}
    settings = {
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        "training": {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 6},
    }
    whole = train(make_recipe(tmp_path, base, data, **settings, out=str(tmp_path / "whole")))
    cut = make_recipe(tmp_path, base, data, **settings, out=str(tmp_path / "cut"))
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
