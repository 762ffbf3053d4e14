"""MMMU: the official parsing of letters and open answers, prompts, and figures by hand."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.runner import read_images
from evaluation.tasks.mmmu import normalize, open_is_right, parse_letter, parse_open
from tests.evaluation.conftest import Evaluation
from tests.evaluation.official import mmmu_row

OPTIONS = {"A": "red apple", "B": "blue sky", "C": "$7"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is B", "B"),
        ("(A) or (B)", "B"),  # the last one counts
        ("C (A)", "A"),  # brackets go before bare letters
        ("A C B", "B"),
        ("I believe that this is the Red Apple", "A"),  # over five words: the options' texts
        ("it is a blue sky with a red apple", "A"),
        ("A: red", None),  # neither in brackets nor between blanks
        ("red apple", None),  # too short for the texts
        ("b", None),
        ("", None),
    ],
)
def test_letters(response, letter):
    """Where no letter is found one is drawn, the same for the same generator."""
    drawn = random.Random(5).choice("ABC")
    assert parse_letter(response, OPTIONS, random.Random(5)) == (letter or drawn)


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
    """Math_1, whose options are pictures, is asked like the others, with its first picture."""
    answers = {"validation_Accounting_1": "(B)", "validation_Accounting_2": "about 3.43"}
    figures = evaluation.answer("mmmu", answers | {"validation_Math_1": "A", "validation_Math_2": "B"})
    parts = {"multiple-choice": 200 / 3, "open": 100, "Accounting": 100, "Math": 50}
    assert figures == pytest.approx({"accuracy": 75} | parts)
    predictions = json.loads(evaluation.submission("mmmu", "validation_predictions.json"))
    assert predictions == {
        "validation_Accounting_1": "B",
        "validation_Accounting_2": "about 3.43",
        "validation_Math_1": "A",
        "validation_Math_2": "B",
    }


def test_a_subject_in_two_files(places, tmp_path):
    """Rows of the same number are other questions with other pictures, also within a batch."""
    folder = tmp_path / "mmmu/Math"
    folder.mkdir(parents=True)
    for shard, question in enumerate(("One?", "And two?")):
        row = mmmu_row(f"validation_Math_{shard}", question, ["x", "y"], "A")
        pq.write_table(pa.Table.from_pylist([row]), folder / f"validation-0000{shard}-of-00002.parquet")
    items = Evaluation(places["demo"], tmp_path, tmp_path / "out").prepared("mmmu").items
    ((first, second),) = read_images([items])
    assert [first.tobytes(), second.tobytes()] == [item.open_image().tobytes() for item in items]
    assert first.tobytes() != second.tobytes()


def test_prompts_and_pictures(evaluation):
    choice, open_question, *_ = evaluation.prepared("mmmu").items
    assert choice.prompt == (
        "<image 1> Which?\n(A) $6\n(B) $7\n(C) $8\n\nAnswer with the option's letter from the given choices directly."
    )
    assert open_question.prompt == "How much?\nAnswer the question using a single word or phrase."
    assert choice.open_image().size == (40, 32) and choice.open_image().mode == "RGB"
