"""MMMU: the official parsing of letters and open answers, and figures by hand."""

import random

import pytest

from common.errors import UserError
from evaluation.runner import read_images
from evaluation.tasks.mmmu import first_image, open_is_right, parse_letter, parse_open
from tests.evaluation.official import mmmu_row, write_parquet

OPTIONS = {"A": "red apple", "B": "blue sky", "C": "$7"}
LETTERS = {"B": "B", "B.": "B", "(C)": "C", "The answer is B": "B", "A C B": "B"}
LETTERS |= {"(A) or (B)": "B", "C (A)": "A"}  # the last one counts; brackets go before bare letters
LETTERS |= {"I believe that this is the Red Apple": "A", "it is a blue sky with a red apple": "A"}  # over five words
LETTERS |= {"Plan B.": "B"}
NO_LETTER = ("A: red", "red apple", "b", "", "B. blue", "the CIA")  # lmms-eval reads a letter in the last two


def test_letters():
    """Where no letter is found a random one is taken, the same for the same generator."""
    assert {text: parse_letter(text, OPTIONS, random.Random(5)) for text in LETTERS} == LETTERS
    found = {parse_letter(text, OPTIONS, random.Random(5)) for text in NO_LETTER}
    assert found == {random.Random(5).choice("ABC")}


OPEN = {"42": [42.0], "The answer is 3.429.": [3.43], "x = 5": [5.0], "yes": ["yes"], "A": [" a", "a "]}
OPEN |= {"The total is $1,234,567": ["$1,234,567", 1234567.0, 567.0]}  # the official patterns find the end twice
OPEN |= {"so 1.5e3 units": ["1.5e3 units", 1500.0, 1.0, 3.0]}
OPEN |= {"It is so red. Thus it is blue": ["blue"], "first is one\nfinal two": ["one", "two"]}  # a line's shortest tail
OPEN |= {"the value is :": ["the value is :"]}  # a trivial tail does not count


def test_open_answers():
    assert {response: parse_open(response) for response in OPEN} == OPEN


RIGHT = {"3.43": "The answer is 3.429", "cat": "a black cat", "a": "is a thing", "1,000": "1000"}
WRONG = {"black cat": "cat", "7": "17", "a": "banana"}  # part of the response is enough; numbers are compared whole


def test_right_open_answers():
    assert all(open_is_right(expected, parse_open(response)) for expected, response in RIGHT.items())
    assert not any(open_is_right(expected, parse_open(response)) for expected, response in WRONG.items())
    for response in ("it is 24/7", "3.43"):
        assert open_is_right(["24/7", "3.429"], parse_open(response))


def test_figures_by_hand(evaluation):
    """Math_1, whose options are images, is asked like the others, with its first image."""
    answers = {"validation_Accounting_1": "(B)", "validation_Accounting_2": "about 3.43"}
    answers |= {"validation_Math_1": "A", "validation_Math_2": "B"}
    figures = evaluation.answer("mmmu", answers)
    parts = {"multiple-choice": 200 / 3, "open": 100, "Accounting": 100, "Math": 50}
    assert figures == pytest.approx({"accuracy": 75} | parts)
    assert evaluation.json("mmmu/submission/validation_predictions.json") == answers | {"validation_Accounting_1": "B"}


def test_a_subject_in_two_files(own):
    """Rows of the same number are other questions with other images, also within a batch."""
    for shard, question in enumerate(("One?", "And two?")):
        row = mmmu_row(f"validation_Math_{shard}", question, ["x", "y"], "A")
        write_parquet(own.root / f"mmmu/Math/validation-0000{shard}-of-00002.parquet", [row])
    items = own.prepared("mmmu").items
    ((first, second),) = read_images([items])
    assert [first.tobytes(), second.tobytes()] == [item.open_image().tobytes() for item in items]
    assert first.tobytes() != second.tobytes() and (first.size, first.mode) == ((40, 32), "RGB")


@pytest.mark.parametrize("value", [{"bytes": None, "path": "x.png"}, {"bytes": b"x", "path": "x.png"}])
def test_a_field_that_is_no_image(tmp_path, value):
    file = tmp_path / "validation-00000-of-00001.parquet"
    write_parquet(file, [{"image_1": value}])
    with pytest.raises(UserError, match="validation-00000-of-00001.parquet, row 0, field 'image_1'"):
        first_image(file, 0)
