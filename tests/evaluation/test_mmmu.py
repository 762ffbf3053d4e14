"""MMMU: the official parsing of letters and open answers, and figures by hand."""

import random

import pytest

from evaluation.runner import read_images
from evaluation.tasks.mmmu import normalize, open_is_right, parse_letter, parse_open
from tests.evaluation.conftest import Evaluation
from tests.evaluation.official import mmmu_row, write_parquet

OPTIONS = {"A": "red apple", "B": "blue sky", "C": "$7"}
LETTERS = {"B": "B", "B.": "B", "(C)": "C", "The answer is B": "B", "A C B": "B"}
LETTERS |= {"(A) or (B)": "B", "C (A)": "A"}  # the last one counts; brackets go before bare letters
LETTERS |= {"I believe that this is the Red Apple": "A", "it is a blue sky with a red apple": "A"}  # over five words
NO_LETTER = ("A: red", "red apple", "b", "")


def test_letters():
    """Where no letter is found a random one is taken, the same for the same generator."""
    assert {text: parse_letter(text, OPTIONS, random.Random(5)) for text in LETTERS} == LETTERS
    found = {parse_letter(text, OPTIONS, random.Random(5)) for text in NO_LETTER}
    assert found == {random.Random(5).choice("ABC")}


@pytest.mark.parametrize(
    ("response", "parsed"),
    [
        ("42", [42.0]),
        ("The answer is 3.429.", [3.43]),
        ("The total is $1,234,567", ["$1,234,567", 1234567.0, 567.0]),  # the official patterns find the end twice
        ("x = 5", [5.0]),
        ("It is so red. Thus it is blue", ["blue"]),  # the shortest tail of a line
        ("yes", ["yes"]),
        ("so 1.5e3 units", ["1.5e3 units", 1500.0, 1.0, 3.0]),
        ("A", [" a", "a "]),
        ("the value is :", ["the value is :"]),  # a trivial tail does not count
        ("first is one\nfinal two", ["one", "two"]),
    ],
)
def test_open_answers(response, parsed):
    assert parse_open(response) == parsed


@pytest.mark.parametrize(
    ("expected", "response", "right"),
    [
        ("3.43", "The answer is 3.429", True),
        (["24/7", "3.429"], "it is 24/7", True),
        (["24/7", "3.429"], "3.43", True),
        ("cat", "a black cat", True),  # part of the response
        ("black cat", "cat", False),
        ("7", "17", False),  # numbers are compared whole
        ("a", "banana", False),
        ("a", "is a thing", True),
        ("1,000", "1000", True),
    ],
)
def test_right_open_answers(expected, response, right):
    assert open_is_right(expected, parse_open(response)) is right


def test_normalize():
    assert [normalize(text) for text in (" 1,000.128 ", "Cat", "X")] == [[1000.13], ["cat"], [" x", "x "]]


def test_figures_by_hand(evaluation):
    """Math_1, whose options are images, is asked like the others, with its first image."""
    answers = {"validation_Accounting_1": "(B)", "validation_Accounting_2": "about 3.43"}
    answers |= {"validation_Math_1": "A", "validation_Math_2": "B"}
    figures = evaluation.answer("mmmu", answers)
    parts = {"multiple-choice": 200 / 3, "open": 100, "Accounting": 100, "Math": 50}
    assert figures == pytest.approx({"accuracy": 75} | parts)
    assert evaluation.json("mmmu/submission/validation_predictions.json") == answers | {"validation_Accounting_1": "B"}


def test_a_subject_in_two_files(places, tmp_path):
    """Rows of the same number are other questions with other images, also within a batch."""
    for shard, question in enumerate(("One?", "And two?")):
        row = mmmu_row(f"validation_Math_{shard}", question, ["x", "y"], "A")
        write_parquet(tmp_path / f"mmmu/Math/validation-0000{shard}-of-00002.parquet", [row])
    items = Evaluation(places["demo"], tmp_path, tmp_path / "out").prepared("mmmu").items
    ((first, second),) = read_images([items])
    assert [first.tobytes(), second.tobytes()] == [item.open_image().tobytes() for item in items]
    assert first.tobytes() != second.tobytes() and (first.size, first.mode) == ((40, 32), "RGB")
