"""CIDEr and BLEU-4 against their formulas and against pycocoevalcap's own classes."""

import math
import shutil
from collections import Counter

import numpy as np
import pytest

from doralib.errors import UsageError
from doralib.evaluation import captions

SAID = ["a dog runs on the grass", "two cats sleep", "a man rides a red horse near the sea", "The boy's hat isn't red."]
REFERENCES = [
    ["A dog is running on grass.", "a brown dog runs on the green grass"],
    ["Two cats are asleep on a bed.", "cats sleeping", "two cats sleep on a bed"],
    ["a man rides a horse", "A person riding a red horse near the sea, at night"],
    ["the boy's hat is not red"],
]
WORDS = {
    "The boy's hat isn't red.": "the boy 's hat is n't red",
    "A black-and-white cat, asleep; on a bed!": "a black-and-white cat asleep on a bed",
    "  two   men \n ride ": "two men ride",
    "": "",
    "They\u2019re at 3:30 p.m. today": "they 're at 3:30 p.m. today",
}


@pytest.mark.parametrize(("text", "words"), [(t, w) for t, w in WORDS.items() if "3:30" not in t])
def test_words_by_the_rule_that_needs_no_java(text, words):
    marks = set(".,;!?")
    assert " ".join(word for word in captions._split_by_rule(text) if word not in marks) == words


def test_without_pycocoevalcap_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap", None)
    with pytest.raises(UsageError, match=r"eval.tasks: the score of captions .*'doralib\[caption\]'"):
        captions.check_caption_tools("eval.tasks")


def cider_by_formula(said, references):
    """CIDEr-D (arXiv 1411.5726): tf-idf of n-grams, clipped, with a Gaussian of the difference in length."""
    grams = lambda text, n: Counter(tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1))
    scores = []
    for text, given in zip(said, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            seen = Counter(g for others in references for g in {g for other in others for g in grams(other, n)})
            weigh = lambda t, n=n, seen=seen: {
                g: c * (math.log(len(said)) - math.log(max(1, seen[g]))) for g, c in grams(t, n).items()
            }
            norm = lambda v: math.sqrt(sum(x * x for x in v.values()))
            mine = weigh(text)
            for other in given:
                theirs = weigh(other)
                product = sum(min(x, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, x in mine.items())
                if norm(mine) and norm(theirs):
                    product /= norm(mine) * norm(theirs)
                # the number of bigrams, as COCO's code counts length
                gap = max(0, len(text.split()) - 1) - max(0, len(other.split()) - 1)
                total += product * math.exp(-gap * gap / 72) / len(given)
        scores.append(10 * total / 4)
    return float(np.mean(scores))


@pytest.mark.interop
def test_scores_are_the_formulas_and_the_packages():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu

    found = captions.caption_scores(SAID, REFERENCES, seed=0)
    said, given = captions.split_words(SAID), [captions.split_words(each) for each in REFERENCES]
    assert found["cider"].value == pytest.approx(cider_by_formula(said, given))
    bleu, _ = Bleu(4).compute_score(dict(enumerate(given)), {i: [text] for i, text in enumerate(said)}, verbose=0)
    assert found["bleu_4"].value == pytest.approx(bleu[3])
    for score in found.values():
        assert 0 < score.low <= score.value <= score.high
    assert captions.caption_scores(REFERENCES[0][:1] * 2, [["no words here"]] * 2, seed=0)["cider"].value == 0


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("java") is None, reason="java is not there")
def test_words_are_those_of_the_penn_treebank():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    assert captions.split_words(list(WORDS)) == list(WORDS.values())


@pytest.mark.interop
def test_without_java_it_is_said(monkeypatch, caplog):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    monkeypatch.setattr(captions.shutil, "which", lambda _: None)
    texts = [text for text in WORDS if "3:30" not in text]
    assert captions.split_words(texts) == [WORDS[text] for text in texts]
    assert "without Java" in caplog.text
