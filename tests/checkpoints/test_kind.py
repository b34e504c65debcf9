"""What a config.json says of the kind of model."""

import pytest

from doralib.checkpoints.kind import find_kind, find_label_kind


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
