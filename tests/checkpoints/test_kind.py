"""What a config.json says of the kind of model."""

import shutil

import pytest

from doralib.checkpoints.kind import find_kind, find_label_kind
from doralib.checkpoints.models import load_forecaster, load_seq2seq, load_sound_classifier
from doralib.errors import UsageError
from doralib.recipe import ModelSettings


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", None),
        ("LlamaForSequenceClassification", "classify"),
        ("BertForTokenClassification", "tokens"),
        ("BartForConditionalGeneration", "seq2seq"),
        ("MarianMTModel", "seq2seq"),
        ("LlavaForConditionalGeneration", "image-text"),
        ("Qwen2_5_VLForConditionalGeneration", "image-text"),
        ("Gemma3ForConditionalGeneration", "image-text"),
        ("WhisperForConditionalGeneration", "speech"),
        ("Wav2Vec2ForCTC", "speech"),
        ("WhisperForAudioClassification", "audio-class"),
        ("Wav2Vec2ForSequenceClassification", "audio-class"),
        ("TimesFm2_5ModelForPrediction", "forecast"),
        ("PatchTSTForPrediction", "forecast"),
        ("NobodysModel", None),
        (3, None),
    ],
)
def test_the_kind_is_read_from_the_class(name, kind):
    assert find_kind({"architectures": [name]}) == kind
    assert find_kind({"architectures": ["Nobodys", name]}) == kind


def test_without_classes_there_is_no_kind():
    assert find_kind({}) is None
    assert find_kind({"architectures": "LlamaForCausalLM"}) is None
    assert find_label_kind({"architectures": ["BartForConditionalGeneration"]}) is None


@pytest.mark.parametrize("load", [load_forecaster, load_seq2seq, load_sound_classifier])
def test_a_model_of_another_kind_is_refused_by_its_kind(load, tiny_llama_folder, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"feature_extractor_type": "WhisperFeatureExtractor"}')
    with pytest.raises(UsageError, match=r"another kind than model\.kind says: its settings are a LlamaConfig"):
        load(ModelSettings(path=str(folder)))
