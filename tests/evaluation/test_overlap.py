"""BLEU and chrF as sacrebleu has them, ROUGE as Google's rouge-score."""

import pytest

from doralib.evaluation.overlap import rouge_scores, translation_scores

# references and texts, with F1 of rouge1, rouge2 and rougeL by hand: of equal words, of pairs, of the longest run
PAIRS = [
    ("the cat sat on the mat", "the cat lay on the mat", (5 / 6, 3 / 5, 5 / 6)),
    ("police killed the gunman", "the gunman killed police", (1.0, 1 / 3, 0.5)),
    ("a b c d", "a b c d", (1.0, 1.0, 1.0)),
    ("a b c d", "", (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("reference", "text", "want"), PAIRS)
def test_rouge(reference, text, want):
    found = rouge_scores([text], [reference], 0)
    assert tuple(found[name].value for name in ("rouge1", "rouge2", "rougeL")) == pytest.approx(want)


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    found = translation_scores(texts, references, "13a", 0)
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score)
    assert found["chrf"].low < found["chrf"].value < found["chrf"].high
    nothing = translation_scores(["x"], ["The dog"], "13a", 0)
    assert [(each.value, each.low, each.high) for each in nothing.values()] == [(0, 0, 0)] * 2
