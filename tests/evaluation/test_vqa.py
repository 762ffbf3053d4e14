"""VQAv2 and GQA: the official normalisation and the rule of ten answers, figures by hand, the files for the server."""

import pytest

from evaluation.tasks.vqa import CONTRACTIONS, normalize, vqa_accuracy
from tests.evaluation.official import write_vqav2

NORMAL = {"The Dog": "dog", "a an the": "", "two": "2", "None": "0", "ten": "10", "eleven": "eleven", "dont": "don't"}
NORMAL |= {"yes.": "yes", "3.": "3", "3.5": "3.5", "p.m.": "pm", ".5": ".5", "e-mail": "e mail", "what?!": "what"}
NORMAL |= {"'quoted'": "'quoted'", "  two   dogs ": "2 dogs", "its": "its"}
NORMAL |= {"Im": "im", "somebody'd": "somebodyd"}  # the table's capitals are never met; a slip of the official table
NORMAL |= {"red,white": "red white"}  # a mark within a word becomes a blank
NORMAL |= {"red, white": "red white"}  # one beside a blank is removed
NORMAL |= {"red/ white/blue": "red whiteblue"}  # everywhere, once it touches a blank anywhere
NORMAL |= {"1,000": "1000", "1,000-ish": "1000ish"}  # a comma between digits removes all marks


def test_normalisation():
    assert {text: normalize(text) for text in NORMAL} == NORMAL
    assert len(CONTRACTIONS) == 120 and CONTRACTIONS["y'all'dve"] == "y'all'd've"


@pytest.mark.parametrize(("twos", "score"), [(0, 0), (1, 9 / 30), (2, 18 / 30), (3, 0.9), (4, 1)])
def test_ten_answers(twos, score):
    """Each person is left out once, so who says 2 does not agree with themselves."""
    assert vqa_accuracy("Two.", ["2"] * twos + ["3"] * (10 - twos))[1] == pytest.approx(score)


def test_where_all_agree_nothing_is_normalised():
    assert [vqa_accuracy(answer, ["yes"] * 10)[1] for answer in ("yes", "yes\n", "Yes")] == [1, 1, 0]
    assert vqa_accuracy("the cat", ["a cat"] * 5 + ["dog"] * 5)[1] == 1


def test_vqav2_by_hand(evaluation):
    """Ten people say "yes": "Yes." is right, also on the server; the bare rule, which compares the texts, gives 0."""
    figures = evaluation.answer("vqav2", {"9001": "two", "9002": "Yes.\n", "9003": "dont know"})
    parts = {"number": 90, "yes/no": 100, "other": 100 * (2 / 3 * 8 + 1 / 3 * 2) / 10}
    accuracy = sum(parts.values()) / 3
    whole = {"accuracy": accuracy, "accuracy of answers as they came": accuracy - 100 / 3}
    assert figures == pytest.approx(parts | whole)
    results = evaluation.json("vqav2/submission/v2_OpenEnded_mscoco_val2014_showo_results.json")
    assert results[0] == {"question_id": 9001, "answer": "2"}
    assert [one["answer"] for one in results[1:]] == ["yes", "don't know"]


def test_test_dev_is_for_the_server(own):
    write_vqav2(own.root, "test-dev2015", "test2015")
    assert own.answer("vqav2", {"9001": "A dog.", "9002": "b", "9003": "c"}, "vqav2_split=test-dev") == {}
    results = own.json("vqav2/submission/v2_OpenEnded_mscoco_test-dev2015_showo_results.json")
    assert [one["answer"] for one in results] == ["dog", "b", "c"]
    assert "| not scored |" in own.text("results.md")


def test_gqa_by_hand(evaluation):
    """Case and a final full stop do not matter, anything else does; `verify` and `choose` are binary."""
    figures = evaluation.answer("gqa", {"201": "Table.", "202": "yes", "203": "the left"})
    assert figures == pytest.approx({"accuracy": 200 / 3, "binary": 50, "open": 100})
    predictions = evaluation.json("gqa/submission/testdev_balanced_predictions.json")
    assert predictions[0] == {"questionId": "201", "prediction": "table"} and len(predictions) == 3
