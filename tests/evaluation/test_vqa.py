"""VQA's soft accuracy against the official evaluation's own results on hand-made cases."""

import itertools

import pytest

from doralib.evaluation.vqa import labeled_accuracy, normalize_answer, soft_accuracy, vqa_scores

# what the official functions for marks, digits and articles make of them
NORMAL = {
    "Two": "2",
    "none": "0",
    "The dog.": "dog",
    "a  man\tand a dog\n": "man and dog",
    "3.5": "3.5",
    "no.": "no",
    "1,000": "1000",
    "1,000 men/women": "1000 menwomen",
    "black/white": "black white",
    "black / white": "black  white".replace("  ", " "),
    "t-shirt": "t shirt",
    "yes, it is": "yes it is",
    "dont know": "don't know",
    "Its a mans": "its mans",
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "ow's'at": "'ow's'at",
    "what?": "what",
    "(left)": "left",
    "a": "",
    "": "",
    "ten thousand": "10 thousand",
    "11:30": "11:30",
    "man's": "man's",
}


@pytest.mark.parametrize(("text", "normal"), NORMAL.items())
def test_answers_are_compared_in_the_official_form(text, normal):
    assert normalize_answer(text) == normal


def test_normal_form_is_its_own():
    assert [normalize_answer(normal) for normal in NORMAL.values()] == list(NORMAL.values())


@pytest.mark.parametrize("matches", range(1, 11))
def test_soft_accuracy_is_the_mean_over_leaving_one_person_out(matches):
    answers = ["two"] * matches + [f"other {i}" for i in range(10 - matches)]
    left_out = [sum(a == "two" for a in rest) for rest in itertools.combinations(answers, 9)]
    assert soft_accuracy("2" if matches < 10 else "two", answers) == pytest.approx(
        sum(min(1, count / 3) for count in left_out) / 10
    )
    assert soft_accuracy("three", answers) == 0


def test_published_values():
    """0, 0.3, 0.6, 0.9, 1: the steps that the authors of VQA name."""
    of = lambda count: soft_accuracy("yes", ["yes"] * count + ["no"] * (10 - count))
    assert [round(of(count), 9) for count in range(6)] == [0, 0.3, 0.6, 0.9, 1, 1]


def test_answers_that_all_people_share_are_compared_as_they_stand():
    assert soft_accuracy("the dog", ["the dog"] * 10) == 1
    assert soft_accuracy("dog", ["the dog"] * 10) == 0
    assert soft_accuracy("dog", ["the dog"] * 9 + ["a cat"]) == 1


def test_a_single_answer_is_right_or_wrong():
    assert [soft_accuracy(said, ["red"]) for said in ("red", "\nred ", "blue")] == [1, 1, 0]


def test_scores_that_are_given_by_label():
    scores = {"yes": 0.9, "2": 0.3, "t shirt": 1.0}
    assert [labeled_accuracy(said, scores) for said in ("yes", "Two", "t-shirt", "no")] == [0.9, 0.3, 1.0, 0.0]


def test_the_score_of_several_questions_is_their_mean():
    score = vqa_scores(["yes", "two", "red"], [["yes"] * 10, ["2"] * 1 + ["3"] * 9, ["blue"] * 10], seed=0)
    assert score["vqa_accuracy"].value == pytest.approx((1 + 0.3 + 0) / 3)
    assert 0 <= score["vqa_accuracy"].low <= score["vqa_accuracy"].value <= score["vqa_accuracy"].high <= 1
