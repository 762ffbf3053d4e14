"""What all tests of runs share."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world's data, tokenizers and `train.yaml`."""
    from tests.training.tiny import write_world  # here, since `make gpu-check` runs where webdataset is not installed

    return write_world(tmp_path_factory.mktemp("world") / "tiny")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps the processes of the first run for all later ones."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
