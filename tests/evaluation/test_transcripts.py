"""Word and character error rates: golden pairs, Whisper's normalizers."""

from types import SimpleNamespace

import pytest

pytest.importorskip("jiwer", reason="word error rates are an extra")

from doralib.evaluation.transcripts import choose_normalizer, score_transcripts


def model(**settings):
    return SimpleNamespace(generation_config=SimpleNamespace(**settings))


PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace())

# what was said, what was heard, errors and words
PAIRS = [
    ("the cat sat", "the cat sat", 0, 3),
    ("the cat sat", "the bat sat", 1, 3),
    ("the cat sat", "the sat", 1, 3),
    ("the cat sat", "the cat it sat", 1, 3),
    ("the cat sat", "", 3, 3),
    ("the", "a b c d", 4, 1),
    ("The cat, sat!", "the cat sat", 0, 3),
]


@pytest.mark.parametrize(("said", "heard", "errors", "words"), PAIRS)
def test_word_error_rate(said, heard, errors, words):
    found = score_transcripts([heard], [said], choose_normalizer(model(language="ro"), PROCESSOR), 0)
    assert found.metrics["wer"].value == pytest.approx(errors / words)
    assert found.right == [errors == 0]


def test_the_rate_is_over_all_words_and_not_a_mean_of_rows():
    found = score_transcripts(["a", "a b c d x"], ["b", "a b c d e"], str, 0)
    assert found.metrics["wer"].value == pytest.approx(2 / 6)
    assert found.metrics["wer"].low <= 2 / 6 <= found.metrics["wer"].high


def test_character_error_rate():
    assert score_transcripts(["pisica"], ["pisici"], str, 0).metrics["cer"].value == pytest.approx(1 / 6)


def test_nothing_said_and_something_heard_is_counted():
    assert score_transcripts(["a b", "c"], ["", "c"], str, 0).metrics["wer"].value == pytest.approx(2.0)


def test_normalizers():
    english = choose_normalizer(model(language="<|en|>"), PROCESSOR)
    assert english("I won't pay twenty-one dollars, Mr. Smith") == "i will not pay $21 mister smith"
    assert choose_normalizer(model(is_multilingual=False), PROCESSOR)("don't") == "do not"
    other = choose_normalizer(model(language="ro"), PROCESSOR)
    assert other("O pisică, [râs] doi câini!").split() == ["o", "pisică", "doi", "câini"]
