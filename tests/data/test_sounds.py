"""Sounds of every kind as a model hears them, and those that it cannot hear."""

import io

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="sounds are an extra")
pytest.importorskip("soxr", reason="sounds are an extra")

import transformers  # noqa: E402

from doralib.data.prepare import BadRow  # noqa: E402
from doralib.data.sounds import Hearing, encode_clip  # noqa: E402

HEARING = Hearing(transformers.WhisperFeatureExtractor(chunk_length=2))


def tone(rate, hertz=500, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def loudest(sound, rate=16_000):
    """The frequency that is loudest, in hertz."""
    return np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_a_tone_is_the_same_tone_whatever_its_rate(tmp_path, rate, ending):
    soundfile.write(tmp_path / f"a.{ending}", tone(rate), rate)
    heard = HEARING.read(str(tmp_path / f"a.{ending}"))
    assert heard.dtype == np.float32
    assert abs(len(heard) - 16_000) <= 2
    assert loudest(heard) == pytest.approx(500, abs=2)
    assert np.abs(heard[2000:-2000]).max() == pytest.approx(0.5, abs=0.03)


def test_two_channels_are_their_mean(tmp_path):
    left, right = tone(16_000), 0.5 * tone(16_000, 900)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(HEARING.read(str(tmp_path / "a.wav")), (left + right) / 2, atol=1e-6)


def test_bytes_of_a_data_set_are_read_as_files_are(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(16_000), 16_000, format="FLAC")
    heard = HEARING.read({"bytes": buffer.getvalue(), "path": "a.flac"})
    np.testing.assert_allclose(heard, tone(16_000), atol=1e-4)


def write_broken(path):
    soundfile.write(path, tone(16_000), 16_000)
    path.write_bytes(path.read_bytes()[:30])


def write_not_finite(path):
    soundfile.write(path, np.full(16_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")


BAD = {
    "missing": lambda path: None,
    "broken": write_broken,
    "broken ": lambda path: path.write_text("no sound"),
    " broken": write_not_finite,
    "silent": lambda path: soundfile.write(path, np.zeros(16_000), 16_000),
    "too short": lambda path: soundfile.write(path, tone(16_000, seconds=0.05), 16_000),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_heard_is_named(tmp_path, kind):
    BAD[kind](tmp_path / "a.wav")
    with pytest.raises(BadRow, match=r"a\.wav") as caught:
        HEARING.read(str(tmp_path / "a.wav"))
    assert caught.value.kind == kind.strip()


def test_features_are_those_of_the_models_own_extractor():
    sounds = [tone(16_000), tone(16_000, 900, 0.5)]
    found = HEARING.make_features(sounds, masked=True)
    assert found["input_features"].shape == (2, 80, 200)
    assert found["attention_mask"].sum(1).tolist() == [100, 50]
    alone = HEARING.make_features(sounds[1:])["input_features"][0]
    assert (found["input_features"][1] == alone).all()
    assert HEARING.window == 2
    longest = Hearing(transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)).make_features(sounds)
    assert longest["input_values"].shape == (2, 16_000)
    assert longest["attention_mask"].sum(1).tolist() == [16_000, 8_000]


def test_a_sound_for_a_page_is_one_that_a_browser_plays():
    uri = encode_clip(tone(16_000), 16_000)
    assert uri.startswith("data:audio/mpeg;base64,")
    import base64

    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert rate == 16_000
    assert loudest(sound) == pytest.approx(500, abs=2)
