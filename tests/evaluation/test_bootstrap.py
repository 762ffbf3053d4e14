"""Intervals and paired differences against what is known in closed form."""

import math

import numpy as np
import pytest

from common.errors import UserError
from common.files import write_json
from evaluation.bootstrap import Counts, differences, estimates, set_difference
from evaluation.task import ratio


def accuracy(sums) -> dict:
    return {"accuracy": 100 * ratio(sums["right"], sums["n"])}


def counts(right, strata=None) -> Counts:
    names = [str(n) for n in range(len(right))]
    return Counts.of(names, strata or [""] * len(right), [{"n": 1, "right": float(value)} for value in right])


def interval(counted: Counts, resamples: int) -> tuple[float, float, float]:
    found = estimates(counted, accuracy, resamples, 0)["accuracy"]
    return found.low, found.value, found.high


def test_the_interval_is_that_of_a_mean():
    low, value, high = interval(counts(np.arange(400) % 4 == 0), 4000)
    half = 1.96 * 100 * np.sqrt(0.25 * 0.75 / 400)
    assert value == 25 and (low, high) == pytest.approx((25 - half, 25 + half), abs=0.35)


def test_strata_keep_their_sizes():
    """Two strata, each of one kind: nothing can vary."""
    assert interval(counts([1] * 10 + [0] * 30, ["a"] * 10 + ["b"] * 30), 200) == (25, 25, 25)


def test_a_group_counts_as_one():
    """Ten items that always go together vary as one, not as ten."""
    assert interval(Counts.of(["a", "b"], ["", ""], [{"n": 10, "right": 10}, {"n": 10}]), 400) == (0, 50, 100)


def test_pairs_are_resampled_together():
    """The second is right wherever the first is, and on 20 more of 400: the interval is that of these 20 alone."""
    first, second = np.arange(400) % 2 == 0, (np.arange(400) % 2 == 0) | (np.arange(400) < 40)
    found = differences(counts(first), counts(second), accuracy, 4000, 0)["accuracy"]
    assert (found.first, found.second, found.difference.value) == pytest.approx((50, 55, 5))
    error = 100 * np.sqrt(0.05 * 0.95 / 400)  # 1.09
    assert found.difference.low == pytest.approx(5 - 1.96 * error, abs=0.3)
    assert found.p == 2 / 4000
    same = differences(counts(first), counts(first), accuracy, 200, 0)["accuracy"]
    assert same.p == 1 and same.difference.low == same.difference.high == 0


def test_counts_survive_the_disk(tmp_path):
    before = counts([1, 0, 0.3], ["x", "y", "x"])
    write_json(tmp_path / "counts.json", before.tree())
    after = Counts.load(tmp_path / "counts.json")
    assert (after.groups, after.strata) == (before.groups, before.strata)
    assert all((after.columns[name] == before.columns[name]).all() for name in before.columns)


GROUP = {"groups": ["a"], "strata": [""], "columns": {"n": [1]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strata": []}, "differ in length"),
        ({"columns": {"n": [1, 2]}}, "differ in length"),
        ({"columns": {"n": ["x"]}}, "other things than numbers"),
        ({"columns": {"n": [[1], [1, 2]]}}, "other things than numbers"),
        ({"columns": {"n": [math.nan]}}, "NaN or infinite"),
        ({"columns": {}}, "counts are missing"),
        ({"groups": [1]}, "must be names"),
        ({"groups": {}}, "'groups' is an object of 0, expected a list"),
    ],
)
def test_foreign_counts(tmp_path, change, message):
    write_json(tmp_path / "counts.json", GROUP | change)
    with pytest.raises(UserError, match=message):
        Counts.load(tmp_path / "counts.json")


def test_differences_of_whole_sets():
    first, second = np.array([1.0, 0.5, 1.5, 1.0]), np.array([3.0, 2.6, 3.4, 3.0])
    found = set_difference(first, second)
    assert (found.first, found.second, found.difference.value) == (1, 3, 2) and found.p < 1e-6
    assert set_difference(first, first).p == 1
    single = set_difference(first[:1], second[:1])
    assert single.difference.value == 2 and single.difference.low is None and single.p is None
