"""POPE: the official parser, figures worked by hand, and the answer files."""

import json

import pytest

from evaluation.tasks.yes_no import parse_yes_no


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No", "no"),
        ("No, there is not.", "no"),
        ("There is no dog.", "no"),
        ("It is not. Yes.", "no"),
        ("Yes. There is no cat.", "yes"),  # only the first sentence counts
        ("", "yes"),
        ("NO", "yes"),  # the official parser knows three spellings
        ("Not here", "yes"),
        ("no!", "yes"),
        ("None", "yes"),
        ("There isn't", "yes"),
        ("no\n", "yes"),
    ],
)
def test_the_official_parser(answer, parsed):
    assert parse_yes_no(answer) == parsed


def test_figures_by_hand(evaluation):
    """random: all right; popular: always yes; adversarial: one yes missed, one no missed."""
    right = {
        f"{split}-{n}": ("no", "Yes.")[n % 2] for split in ("random", "popular", "adversarial") for n in range(1, 5)
    }
    answers = right | {f"popular-{n}": "yes" for n in range(1, 5)} | {"adversarial-1": "no", "adversarial-2": "yes"}
    figures = evaluation.answer("pope", answers)
    expected = {
        "random accuracy": 100,
        "random precision": 100,
        "random recall": 100,
        "random F1": 100,
        "random yes-ratio": 50,
        "popular accuracy": 50,
        "popular precision": 50,
        "popular recall": 100,
        "popular F1": 200 / 3,
        "popular yes-ratio": 100,
        "adversarial accuracy": 50,
        "adversarial precision": 50,
        "adversarial recall": 50,
        "adversarial F1": 50,
        "adversarial yes-ratio": 50,
        "F1, mean of splits": (100 + 200 / 3 + 50) / 3,
        "accuracy, mean of splits": 200 / 3,
    }
    assert figures == pytest.approx(expected)
    lines = evaluation.submission("pope", "coco_pope_popular_answers.json").splitlines()
    assert json.loads(lines[0]) == {"question": "Is there a popular thing 0 in the image?", "answer": "yes"}
    assert len(lines) == 4


def test_never_yes_is_no_division_by_zero(evaluation):
    answers = {f"{split}-{n}": "no" for split in ("random", "popular", "adversarial") for n in range(1, 5)}
    figures = evaluation.answer("pope", answers)
    assert figures["random precision"] == figures["random F1"] == figures["random yes-ratio"] == 0
    assert figures["random accuracy"] == 50


def test_the_prompt(evaluation):
    item = evaluation.prepared("pope").items[0]
    text = "Is there a random thing 0 in the image?\nAnswer the question using a single word or phrase."
    assert item.prompt == text
