"""What all tests of runs share."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world's data, LLaVA's too, tokenizers, CLIP tower and `train.yaml`; read only."""
    # Here, since `make gpu-check` runs where webdataset is not installed.
    from tests.training import tiny, tiny_sources

    folder = tiny.write_world(tmp_path_factory.mktemp("world") / "tiny")
    for rounds in (1, 2):
        tiny_sources.write_llava(folder, rounds)
    tiny_sources.write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Six steps with all three flows: the trainer and its folder."""
    from tests.training.tiny import train

    output_dir = tmp_path_factory.mktemp("run") / "out"
    return train(world, output_dir, {"experiment.generate_every": 6}), output_dir


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps the processes of the first run for all later ones."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
