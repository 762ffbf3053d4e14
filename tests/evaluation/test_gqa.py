"""GQA: exact match by hand, and the predictions file."""

import json

import pytest


def test_figures_by_hand(evaluation):
    """Case and a final full stop do not matter, anything else does; `verify` and `choose` are binary."""
    figures = evaluation.answer("gqa", {"201": "Table.", "202": "yes", "203": "the left"})
    assert figures == pytest.approx({"accuracy": 200 / 3, "binary": 50, "open": 100})
    predictions = json.loads(evaluation.submission("gqa", "testdev_balanced_predictions.json"))
    assert predictions[0] == {"questionId": "201", "prediction": "table"} and len(predictions) == 3


def test_the_prompt(evaluation):
    assert evaluation.prepared("gqa").items[0].prompt == (
        "What 201?\nAnswer the question using a single word or phrase."
    )
