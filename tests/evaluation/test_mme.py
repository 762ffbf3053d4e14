"""MME: the official parser, acc and acc+ by hand, sums over perception and cognition, the result files."""

import pytest

from evaluation.tasks.yes_no import COGNITION, PERCEPTION, SUBTASKS, _read_pair, parse_yes_no_other
from tests.evaluation.official import save_picture


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("no, it is", "no"),
        ("Nope", "no"),
        ("not", "no"),
        (" yes", "yes"),
        ("  yes", "other"),  # only four characters are looked at
        ("It is not", "other"),
        ("", "other"),
    ],
)
def test_the_official_parser(answer, parsed):
    assert parse_yes_no_other(answer) == parsed


def test_only_a_newline_ends_a_question(tmp_path):
    save_picture(tmp_path / "1.jpg", 0)
    (tmp_path / "1.txt").write_text("Is it\u2028red?\tYes\nIs it blue?\tNo\n", encoding="utf-8")
    assert [item.prompt for item in _read_pair("color", tmp_path / "1.txt", tmp_path)] == [
        "Is it\u2028red?",
        "Is it blue?",
    ]


def test_figures_by_hand(evaluation):
    """All right but: existence says yes to everything, count gets one picture wrong, code_reasoning rambles."""
    answers = {f"{s}/{p:03d}/{n}": ("Yes", "No")[n - 1] for s in SUBTASKS for p in range(2) for n in (1, 2)}
    answers |= {f"existence/{p:03d}/2": "Yes" for p in range(2)}
    answers |= {"count/001/1": "no", "count/001/2": "yes"}
    answers |= {f"code_reasoning/{p:03d}/{n}": "Well,\tmaybe\nnot" for p in range(2) for n in (1, 2)}
    figures = evaluation.answer("mme", answers)
    assert (figures["existence acc"], figures["existence acc+"], figures["existence"]) == (50, 0, 50)
    assert (figures["count acc"], figures["count acc+"], figures["count"]) == (50, 50, 100)
    assert figures["OCR"] == figures["landmark"] == 200 and figures["code_reasoning"] == 0
    assert figures["perception"] == 50 + 100 + 8 * 200 and len(PERCEPTION) == 10
    assert figures["cognition"] == 3 * 200 and len(COGNITION) == 4
    assert figures["neither yes nor no, %"] == pytest.approx(100 * 4 / 56)
    lines = evaluation.submission("mme", "code_reasoning.txt").splitlines()
    assert lines[0] == "000.jpg\tIs it red? Please answer yes or no.\tYes\tWell, maybe not" and len(lines) == 4
    assert evaluation.submission("mme", "OCR.txt").startswith("000.png\t")


def test_the_prompt_is_the_distributed_question(evaluation):
    assert evaluation.prepared("mme").items[0].prompt == "Is it red? Please answer yes or no."


def test_a_part_of_it_keeps_pairs_together(evaluation):
    items = evaluation.prepared("mme", "max_items=9").items
    assert len(items) == 8
    assert {item.group for item in items[::2]} == {item.group for item in items[1::2]}
    assert len({item.stratum for item in items}) == 4
