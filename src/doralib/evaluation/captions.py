"""How like captions are to those that people wrote: CIDEr and BLEU-4 as COCO computes them, by pycocoevalcap."""

import logging
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import import_extra
from .metrics import Counts, Score, corpus_score, mean_score

log = logging.getLogger(__name__)

_ORDERS = 4
_WORD = re.compile(r"[^\W_]+(?:[-.'][^\W_]+)*|[^\w\s]+|_+")
_ENDING = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))$")


def check_caption_tools(setting: str) -> None:
    """Raise UsageError if pycocoevalcap is not installed."""
    import_extra("pycocoevalcap", f"{setting}: the score of captions")


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> dict[str, Score]:
    """CIDEr, where 1 is what is often printed as 100, and BLEU-4 of the whole, 0 to 1.

    CIDEr weighs words by the references of all pictures given here: of a single one it is 0.

    Args:
        said: One caption for each picture.
        references: At least one caption that a person wrote for each.

    Raises:
        UsageError: if pycocoevalcap is not installed.
    """
    check_caption_tools("caption")
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer  # noqa: PLC0415
    from pycocoevalcap.cider.cider_scorer import CiderScorer  # noqa: PLC0415

    texts = iter(split_words([*said, *(text for given in references for text in given)]))
    said, references = [next(texts) for _ in said], [[next(texts) for _ in given] for given in references]
    cider, bleu = CiderScorer(n=_ORDERS), BleuScorer(n=_ORDERS)
    for text, given in zip(said, references, strict=True):
        cider += (text, given)
        bleu += (text, given)
    _, cider_N = cider.compute_score()
    return {"cider": mean_score(cider_N, seed), "bleu_4": _score_bleu(bleu.ctest, seed)}


def _score_bleu(counts: Sequence[Mapping[str, Any]], seed: int) -> Score:
    """BLEU-4 of all captions together, from the n-grams counted in each."""
    table_NK = np.array(
        [
            [*each["correct"], *each["guess"], each["testlen"], _closest(each["testlen"], each["reflen"])]
            for each in counts
        ],
        dtype=np.int64,
    )
    return corpus_score(table_NK, _bleu, seed)


def _closest(length: int, references: Sequence[int]) -> int:
    return min((abs(each - length), each) for each in references)[1]


def _bleu(sums_K: Counts) -> float:
    """From sums of matches and of n-grams said, of each order, and of both lengths."""
    right, all_said = sums_K[:_ORDERS], sums_K[_ORDERS : 2 * _ORDERS]
    precision = np.exp(np.log(np.maximum(right, 1e-15) / np.maximum(all_said, 1e-9)).mean())
    length, wanted = max(float(sums_K[-2]), 1e-15), float(sums_K[-1])
    return float(precision * np.exp(min(0.0, 1 - wanted / length)))


def split_words(captions: Sequence[str]) -> list[str]:
    """Each caption as the Penn Treebank's words in lower case, a space between and no marks.

    Where there is no Java a rule does it, which differs on rare words; that is logged.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    found = _split_by_java(lines) if shutil.which("java") else None
    if found is None:
        log.warning("captions are divided into words without Java, CIDEr may differ a little from COCO's")
        found = [_split_by_rule(line) for line in lines]
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS  # noqa: PLC0415

    return [" ".join(word for word in words if word not in PUNCTUATIONS) for words in found]


def _split_by_java(lines: Sequence[str]) -> list[list[str]] | None:
    """None if it does not run."""
    from pycocoevalcap.tokenizer import ptbtokenizer  # noqa: PLC0415

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines)
    ran = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=False)
    words = [line.split() for line in ran.stdout.split("\n")][: len(lines)]
    return words if ran.returncode == 0 and len(words) == len(lines) else None


def _split_by_rule(line: str) -> list[str]:
    """Words with their hyphens, n't and 's as words of their own, and marks."""
    words = _WORD.findall(line.lower().replace("\u2019", "'"))
    return [part for word in words for part in _ENDING.sub(r" \1", word).split()]
