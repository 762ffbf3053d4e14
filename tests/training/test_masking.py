"""The masking rule of training, recomputed by hand from the same draws (spec §6)."""

import math

import pytest
import torch

from models import get_mask_schedule
from training.masking import MaskingNoise

OFFSET, CODES = 30, 64
MASK = OFFSET + CODES


def make_noise(schedule: str = "cosine", **options) -> MaskingNoise:
    return MaskingNoise(get_mask_schedule(schedule), MASK, OFFSET, CODES, **options)


def make_ids(batch_size: int = 6, num_tokens: int = 16) -> torch.Tensor:
    return torch.randint(OFFSET, OFFSET + CODES, (batch_size, num_tokens))


def grids(masked) -> list[torch.Tensor]:
    """What is hidden of each row, as a square."""
    width = math.isqrt(masked.input_ids.shape[1])
    return [row.view(width, width) for row in masked.input_ids == MASK]


def is_rectangle(grid: torch.Tensor) -> bool:
    rows, columns = grid.any(1).nonzero()[:, 0], grid.any(0).nonzero()[:, 0]
    return bool(grid[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


SCHEDULES = {"cosine": lambda t: torch.cos(t * math.pi / 2), "linear": lambda t: 1 - t}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scattered_masks_are_the_published_draws_in_their_order(schedule):
    ids = make_ids()
    torch.manual_seed(3)
    masked = make_noise(schedule)(ids)
    behind = torch.rand(1)

    torch.manual_seed(3)
    prob = SCHEDULES[schedule](torch.rand(6))
    order = torch.rand(6, 16).argsort(-1)
    for row in range(6):
        count = max(1, round(16 * prob[row].item()))  # Python rounds half to even, too
        hidden = order[row] < count
        assert torch.equal(masked.input_ids[row], torch.where(hidden, MASK, ids[row]))
        assert torch.equal(masked.labels[row], torch.where(hidden, ids[row], -100))
    assert torch.equal(masked.mask_prob, prob)
    assert torch.equal(behind, torch.rand(1)), "a draw more or less than published"


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, 2), (0.75, 8), (0.45, 4), (0.0, 1), (0.01, 1), (1.0, 10)])
def test_the_number_of_masked_tokens_is_rounded_half_to_even_and_at_least_one(ratio, expected):
    masked = make_noise(mask_ratio=ratio)(make_ids(4, 10))
    assert (masked.input_ids == MASK).sum(-1).tolist() == [expected] * 4


def test_a_fixed_ratio_draws_no_time():
    ids = make_ids()
    torch.manual_seed(1)
    masked = make_noise(mask_ratio=0.5, predict_all_tokens=True)(ids)
    torch.manual_seed(1)
    assert torch.equal(masked.input_ids == MASK, torch.rand(6, 16).argsort(-1) < 8)
    assert masked.mask_prob.tolist() == [0.5] * 6
    assert torch.equal(masked.labels, ids), "predict_all_tokens labels the visible ones, too"


def test_min_masking_rate_bounds_the_probability_from_below():
    masked = make_noise(min_masking_rate=0.6)(make_ids(64))
    assert masked.mask_prob.min().item() == pytest.approx(0.6)
    assert masked.mask_prob.max() > 0.9
    assert (masked.input_ids == MASK).sum(-1).min() == round(16 * 0.6)


def test_random_replace_hides_behind_random_codes_and_learns_all_tokens():
    ids = make_ids(32, 64)
    torch.manual_seed(2)
    plain = make_noise()(ids)
    torch.manual_seed(2)
    replaced = make_noise(noise_type="random_replace")(ids)
    hidden = plain.input_ids == MASK
    assert torch.equal(replaced.labels, ids)
    assert torch.equal(replaced.input_ids[~hidden], ids[~hidden])
    new = replaced.input_ids[hidden]
    assert new.min() == OFFSET and new.max() == OFFSET + CODES - 1, "codes only, and all of them"
    assert (new == ids[hidden]).float().mean() < 0.1
    assert len(new.unique()) == CODES


def test_contiguous_regions_are_rectangles_drawn_in_order():
    ids = make_ids(8, 64)
    torch.manual_seed(11)
    masked = make_noise(contiguous_region_prob=1.0)(ids)

    torch.manual_seed(11)
    prob = torch.cos(torch.rand(8) * math.pi / 2)
    torch.rand(1)  # one decision per batch
    for grid, p in zip(grids(masked), prob.tolist(), strict=True):
        count = max(1, round(64 * p))
        height = int(torch.randint(math.ceil(count / 8), min(8, count) + 1, (1,)))
        width = math.ceil(count / height)
        top, left = int(torch.randint(0, 8 - height + 1, (1,))), int(torch.randint(0, 8 - width + 1, (1,)))
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(grid, expected)
        assert count <= grid.sum() < count + height


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.3, 0.5, 0.77, 0.99, 1.0])
def test_every_size_of_region_fits_the_grid(ratio):
    noise = make_noise(contiguous_region_prob=1.0, mask_ratio=ratio)
    for grid in [grid for _ in range(20) for grid in grids(noise(make_ids(4, 64)))]:
        assert is_rectangle(grid) and grid.sum() >= max(1, round(64 * ratio))


def test_a_batch_is_contiguous_with_the_given_probability():
    noise = make_noise(contiguous_region_prob=0.3, mask_ratio=0.25)
    assert 60 < sum(is_rectangle(grids(noise(make_ids(1, 64)))[0]) for _ in range(300)) < 120
