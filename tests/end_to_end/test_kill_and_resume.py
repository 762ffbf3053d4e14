"""The first kills of `kill_and_resume.py`, and that its comparisons see what they are to see."""

import shutil

import pytest
import torch

from tests.end_to_end.kill_and_resume import check_same_run, check_whole, content_of, run_kills, same
from training.checkpointing import checkpoints


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return folder, run_kills(folder, kills=3, seed=1)


@pytest.mark.slow
def test_three_kills_lose_nothing_but_the_steps_since_a_save(killed):
    _, found = killed
    assert [one.aim for one in found] == ["saving", "step", "start"]
    assert found[0].unfinished, "the first strikes while a checkpoint is being written"
    assert all(one.reached - one.newest <= 4 for one in found)


@pytest.mark.slow
def test_a_damaged_checkpoint_and_another_run_are_told_apart(killed, tmp_path):
    """Else the comparisons above would mean nothing."""
    folder, _ = killed
    shutil.copytree(folder / "whole", tmp_path / "whole")
    newest = checkpoints(tmp_path / "whole")[-1]
    names = set(content_of(newest))
    check_whole(tmp_path / "whole", names)

    with (tmp_path / "whole/metrics.jsonl").open("a") as file:
        file.write((folder / "whole/metrics.jsonl").read_text().splitlines(keepends=True)[-1])
    with pytest.raises(AssertionError, match="lines"):
        check_same_run(folder / "whole", tmp_path / "whole")
    shutil.copy(folder / "whole/metrics.jsonl", tmp_path / "whole")

    optimizer = torch.load(newest / "optimizer.bin", weights_only=True)
    next(iter(optimizer["state"].values()))["exp_avg"].view(-1)[0] += 1e-7
    torch.save(optimizer, newest / "optimizer.bin")
    with pytest.raises(AssertionError, match="optimizer.bin differ"):
        check_same_run(folder / "whole", tmp_path / "whole")

    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(AssertionError, match="model.safetensors cannot be read"):
        check_whole(tmp_path / "whole", names)
    (newest / "model.safetensors").unlink()
    with pytest.raises(AssertionError, match="is not whole.*model.safetensors"):
        check_whole(tmp_path / "whole", names)


def test_equal_means_equal_to_the_last_bit():
    one = {"a": [torch.ones(2), ("x", 1)]}
    assert same(one, {"a": [torch.ones(2), ("x", 1)]})
    assert not same(one, {"a": [torch.ones(2).nextafter(torch.zeros(2)), ("x", 1)]})
    assert not same(one, {"a": [torch.ones(2).double(), ("x", 1)]})
    assert not same(one, {"a": [torch.ones(2), ("x", 2)]}) and not same(one, {"b": one["a"]})
