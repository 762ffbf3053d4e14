"""The Fréchet distance by hand and against torchmetrics, and its interval."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from evaluation.bootstrap import set_difference, set_estimate
from examples.emoji_world.features import RESAMPLES, frechet_distance, frechet_figures


def test_by_hand():
    """One feature: means 1 and 3, variances 2 and 8: 2² + 2 + 8 − 2 · √16 = 6."""
    assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])) == pytest.approx(6)


def features(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("columns", [5, 60])  # fewer and more than there are rows
def test_equals_the_usual_form(columns):
    first, second = features(40, columns, 0), 2 * features(40, columns, 1) + 0.5
    means, covariances = zip(*((each.mean(0), each.T.cov()) for each in (first, second)), strict=True)
    expected = _compute_fid(means[0], covariances[0], means[1], covariances[1])
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_rows_that_count_several_times():
    first, second = features(4, 3, 0), features(4, 3, 1)
    twice = torch.tensor([2, 0, 1, 1])
    rows = [0, 0, 2, 3]
    assert frechet_distance(first, second, twice) == pytest.approx(frechet_distance(first[rows], second[rows]))


def test_the_interval_lies_around_the_value():
    values = frechet_figures(features(30, 8, 0), features(30, 8, 1), 500, 3)
    assert values.shape == (1 + RESAMPLES,)
    estimate = set_estimate(values)
    assert estimate.value == values[0] == pytest.approx((estimate.low + estimate.high) / 2)
    assert estimate.high - estimate.low == pytest.approx(3.92 * values[1:].std(ddof=1))
    again = frechet_figures(features(30, 8, 0), features(30, 8, 1), 500, 3)
    assert np.array_equal(values, again)


def test_differences_of_whole_sets():
    first, second = np.array([1.0, 0.5, 1.5, 1.0]), np.array([3.0, 2.6, 3.4, 3.0])
    found = set_difference(first, second)
    assert (found.first, found.second, found.difference.value) == (1, 3, 2)
    assert found.p < 1e-6
    assert set_difference(first, first).p == 1
    single = set_difference(first[:1], second[:1])
    assert single.difference.value == 2 and single.difference.low is None and single.p is None
