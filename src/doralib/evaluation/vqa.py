"""How right an answer to a question about a picture is, by the answers that people gave: VQA's soft accuracy."""

import re
from collections.abc import Mapping, Sequence

from .metrics import Score, mean_score

_MARKS = frozenset("""!"()+,-/;<=>?@[\\]_`{}""")
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_DIGITS)}
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# written without one of its apostrophes
_WITH_APOSTROPHE = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it
_ENOUGH = 3


def normalize_answer(text: str) -> str:
    """The form in which VQA compares answers: no articles, no marks, number words as digits, whole contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # a mark between two words parts them; one beside a space, or any where there is 1,000, only goes
    joined = re.search(r"\d,\d", text) is not None
    parting = {mark for mark in _MARKS if not (joined or f"{mark} " in text or f" {mark}" in text)}
    text = "".join(" " * (letter in parting) if letter in _MARKS else letter for letter in text)
    # the official code hands over a flag where the number of points to take out belongs: 32
    words = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text, count=32).lower().split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def normalize_written(text: str) -> str:
    """The form in which VQA's servers, and TextVQA, compare answers: `normalize_answer` behind one more step."""
    return normalize_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def soft_accuracy(said: str, answers: Sequence[str]) -> float:
    """How right an answer is, 0 to 1: min(1, matches / 3), averaged over leaving out each of the people's answers.

    Answers are normalized unless all people said the very same, as the official evaluation has it. A single true
    answer is right or wrong.
    """
    said = said.replace("\n", " ").replace("\t", " ").strip()
    if len(set(answers)) > 1:
        said, answers = normalize_answer(said), [normalize_answer(answer) for answer in answers]
    return leave_one_out(said, answers)


def leave_one_out(said: str, answers: Sequence[str]) -> float:
    """How right an answer is, 0 to 1, by those that equal it: see `soft_accuracy`."""
    matches, count = sum(answer == said for answer in answers), len(answers)
    if count == 1:
        return float(matches)
    # left out was one that matches, or another
    return (matches * min(1, (matches - 1) / _ENOUGH) + (count - matches) * min(1, matches / _ENOUGH)) / count


def labeled_accuracy(said: str, scores: Mapping[str, float]) -> float:
    """The score of an answer among those that are given with their scores, 0 to 1."""
    return scores.get(said.strip(), scores.get(normalize_answer(said), 0.0))


def read_yes_no(text: str) -> str:
    """Yes or no, as POPE reads an answer."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def vqa_scores(said: Sequence[str], answers: Sequence[Sequence[str]], seed: int) -> dict[str, Score]:
    """Mean soft accuracy, as ``vqa_accuracy``.

    Args:
        said: One answer for each question.
        answers: What people answered to each, ten of them in VQA.
    """
    return {
        "vqa_accuracy": mean_score(
            [soft_accuracy(text, given) for text, given in zip(said, answers, strict=True)], seed
        )
    }
