"""Labels of sounds from the rows to the merged model."""

import json

import pytest
import torch
import transformers
from torch.nn import functional as nnf

soundfile = pytest.importorskip("soundfile", reason="sounds are an extra")
pytest.importorskip("soxr", reason="sounds are an extra")

from speech_kinds import save_wav2vec2, save_whisper, write_clips  # noqa: E402

from doralib.checkpoints.load import load_model  # noqa: E402
from doralib.checkpoints.merge import merge_checkpoint  # noqa: E402
from doralib.checkpoints.verify import verify_merge  # noqa: E402
from doralib.errors import UsageError  # noqa: E402
from doralib.evaluation.classifier import list_labels, predict_sounds  # noqa: E402
from doralib.evaluation.evaluate import evaluate  # noqa: E402
from doralib.evaluation.task_file import KINDS  # noqa: E402
from doralib.recipe import ModelSettings, Recipe  # noqa: E402
from doralib.training.job import train  # noqa: E402
from doralib.training.loss import HeadLoss  # noqa: E402
from doralib.training.modalities.audio_class import SoundLabels  # noqa: E402

LABELS = ["doi", "patru", "trei", "unu"]


def make_recipe(folder, base, **changes):
    clips = {"train": write_clips(folder), "validation": write_clips(folder, 8, "test.jsonl"), "target": "text"}
    values = {
        "model": {"path": str(base), "kind": "audio-class"},
        "data": clips,
        "adapter": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 40, "learning_rate": 0.02, "per_device_train_batch_size": 12},
        "out": str(folder / "run"),
    }
    return Recipe(**{**values, **changes})


@pytest.mark.parametrize("save", [save_whisper, pytest.param(save_wav2vec2, marks=pytest.mark.long)])
def test_from_the_rows_to_the_merged_model(tmp_path, save):
    base = save(tmp_path / "base")
    data = {"audio_seconds": 1} if save is save_whisper else {}
    recipe = make_recipe(tmp_path, base)
    run = train(recipe.model_copy(update={"data": recipe.data.model_copy(update=data)}))
    results = json.loads((run / "results.json").read_text())
    before, after = (results[when]["validation"]["metrics"]["accuracy"]["value"] for when in ("before", "after"))
    assert after >= 0.75 > before
    assert results["after"]["validation"]["confusion"]["labels"] == LABELS
    assert "<audio src=" in (run / "report.html").read_text()
    assert json.loads((run / "doralib_labels.json").read_text())["kind"] == "audio-class"
    model, extractor = load_model(str(run))
    sounds = [str(tmp_path / "clips" / f"{i}.wav") for i in range(4)]
    found = predict_sounds(model, extractor, sounds, 3, lambda _: None)
    assert list_labels(model) == LABELS
    task = {"kind": "audio-class", "name": "heard", "data": str(tmp_path / "test.jsonl"), "answer": "text"}
    scored = evaluate(model, extractor, [KINDS["audio-class"](**task)])["heard"]
    want = {key: results["after"]["validation"][key] for key in ("metrics", "confusion", "right")}
    assert {key: scored.to_json()[key] for key in want} == want
    with pytest.raises(UsageError, match=r"labels clips/0\.wav, .*, and the model's are doi, patru, trei, unu"):
        evaluate(model, extractor, [KINDS["audio-class"](**{**task, "answer": "audio"})])
    with pytest.raises(UsageError, match=r"gives labels \(audio-class\)"):
        evaluate(model, extractor, [KINDS["words"](**{**task, "kind": "words"})])
    merge_checkpoint(run, base, tmp_path / "merged")
    assert verify_merge(tmp_path / "merged", run, base).passed
    merged = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "merged")
    assert list(merged.config.id2label.values()) == LABELS
    assert predict_sounds(merged, load_model(str(tmp_path / "merged"))[1], sounds, 2, lambda _: None) == found


def test_the_loss_is_the_models_own(tmp_path):
    recipe, modality = make_recipe(tmp_path, save_whisper(tmp_path / "base")), SoundLabels()
    rows = modality.check_rows(recipe.data, 0)
    model, extractor = modality.load(ModelSettings(path=recipe.model.path))
    made = modality.prepare(rows, recipe.data, model, extractor)
    batch = modality.collate(model, extractor, made)([made.train.rows[i] for i in range(4)])
    batch.pop("num_tokens")
    assert batch["labels"].tolist() == [3, 0, 2, 1]
    assert HeadLoss.is_possible(model)
    loss, count = HeadLoss()(model.eval(), batch)
    with torch.no_grad():
        want = nnf.cross_entropy(model(batch["input_features"]).logits, batch["labels"], reduction="sum")
    assert count == 4
    torch.testing.assert_close(loss, want)


def test_what_cannot_be_is_said(tmp_path):
    base = save_whisper(tmp_path / "base")
    for change, said in (({"prompt": "text"}, "no prompt"), ({"too_long": "split"}, "cannot be divided")):
        recipe = make_recipe(tmp_path, base)
        with pytest.raises(UsageError, match=said):
            train(recipe.model_copy(update={"data": recipe.data.model_copy(update=change)}))


def test_a_model_of_text_is_told_to_hear_nothing(tmp_path, tiny_llama_folder):
    with pytest.raises(UsageError, match=r"neither sees nor hears: it has no processor_config\.json or "):
        train(make_recipe(tmp_path, tiny_llama_folder))
