"""Models that tests of a module share, and one batch of all tasks."""

import pytest

from tests.parity.goldens import mixed_batch, tiny_showo


@pytest.fixture(scope="module")
def model():
    return tiny_showo()


@pytest.fixture(scope="module")
def clip_model():
    return tiny_showo(w_clip_vit=True, clip_feature_size=24)


@pytest.fixture(scope="module")
def batch():
    """Rows t2i ×3 (with left pads), lm ×2, mmu ×2 (with right pads): ids, labels, mask."""
    return mixed_batch()
