"""What all tests of runs share."""

import pytest
from accelerate.state import AcceleratorState

from tests.training.tiny import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world's data, tokenizers and `train.yaml`."""
    return write_world(tmp_path_factory.mktemp("world") / "tiny")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps the processes of the first run for all later ones."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
