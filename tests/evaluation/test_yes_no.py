"""POPE and MME: the official parsers, figures worked by hand, prompts, and the answer files."""

import pytest

from evaluation.tasks import yes_no
from evaluation.tasks.yes_no import POPE_SPLITS, SUBTASKS, parse_yes_no, yes_no_figures
from tests.evaluation.official import MME, write_mme, write_text


def test_popes_parser():
    for answer in ("no", "No", "No, there is not.", "There is no dog.", "It is not. Yes."):
        assert parse_yes_no(answer) == "no", answer
    assert parse_yes_no("Yes") == parse_yes_no("Yes. There is no cat.") == "yes"  # only the first sentence counts
    for answer in ("", "NO", "Not here", "no!", "None", "There isn't", "no\n"):  # the parser knows three spellings
        assert parse_yes_no(answer) == "yes", answer


ANSWERS = ("Yes", " yes", "NO.", "no, it is", "Nope", "not", "  yes", "It is not", "")


def test_mmes_parser():
    found = [[a for a in ANSWERS if yes_no.parse_yes_no_other(a) == kind] for kind in ("yes", "no", "other")]
    assert found == [["Yes", " yes"], ["NO.", "no, it is", "Nope", "not"], ["  yes", "It is not", ""]]  # 4 characters


def test_pope_by_hand(evaluation):
    """random: all right; popular: always yes; adversarial: one yes missed, one no missed."""
    answers = {f"{split}-{n}": ("no", "Yes.")[n % 2] for split in POPE_SPLITS for n in range(1, 5)}
    answers |= {f"popular-{n}": "yes" for n in range(1, 5)} | {"adversarial-1": "no", "adversarial-2": "yes"}
    figures = evaluation.answer("pope", answers)
    expected = {"F1, mean of splits": (100 + 200 / 3 + 50) / 3, "accuracy, mean of splits": 200 / 3}
    kinds = ("accuracy", "precision", "recall", "F1", "yes-ratio")
    for split, row in zip(POPE_SPLITS, ((100, 100, 100, 100, 50), (50, 50, 100, 200 / 3, 100), (50,) * 5), strict=True):
        expected |= {f"{split} {kind}": value for kind, value in zip(kinds, row, strict=True)}
    assert figures == pytest.approx(expected)
    assert yes_no_figures({"a tp": 0, "a fp": 0, "a tn": 1, "a fn": 1}, ["a"])["a F1"] == 0  # never yes
    lines = evaluation.lines("pope/submission/coco_pope_popular_answers.json")
    assert lines[0] == {"question": "Is there a popular thing 0 in the image?", "answer": "yes"} and len(lines) == 4


def test_mme_by_hand(evaluation):
    """All right but: existence says yes to everything, count gets one image wrong, code_reasoning rambles."""
    answers = {f"{s}/{i:03d}/{n}": ("Yes", "No")[n - 1] for s in SUBTASKS for i in range(2) for n in (1, 2)}
    answers |= {f"existence/{i:03d}/2": "Yes" for i in range(2)}
    answers |= {"count/001/1": "no", "count/001/2": "yes"}
    answers |= {f"code_reasoning/{i:03d}/{n}": "Well,\tmaybe\nnot" for i in range(2) for n in (1, 2)}
    figures = evaluation.answer("mme", answers)
    assert (figures["existence acc"], figures["existence acc+"], figures["existence"]) == (50, 0, 50)
    assert (figures["count acc"], figures["count acc+"], figures["count"]) == (50, 50, 100)
    assert figures["OCR"] == figures["landmark"] == 200 and figures["code_reasoning"] == 0
    assert figures["perception"] == 50 + 100 + 8 * 200 and len(yes_no.PERCEPTION) == 10
    assert figures["cognition"] == 3 * 200 and len(yes_no.COGNITION) == 4
    assert figures["neither yes nor no, %"] == pytest.approx(100 * 4 / 56)
    texts = {line["key"]: line["parsed"] for line in evaluation.lines("mme/predictions.jsonl")}
    assert texts["code_reasoning/000/1"] == "other"
    lines = evaluation.text("mme/submission/code_reasoning.txt").splitlines()
    assert lines[0] == "000.jpg\tIs it red? Please answer yes or no.\tYes\tWell, maybe not" and len(lines) == 4
    assert evaluation.text("mme/submission/OCR.txt").startswith("000.png\t")


def test_only_a_newline_ends_a_question_of_mme(own):
    write_mme(own.root)
    write_text(own.root / f"{MME}/color/000.txt", "Is it\u2028red?\tYes\nIs it blue?\tNo\n")
    prompts = [item.prompt for item in own.prepared("mme").items if item.group == "color/000"]
    assert prompts == ["Is it\u2028red?", "Is it blue?"]
