"""A user's mistake before a training run, as it is seen: one line, exit code 2, nothing written."""

import sys

import pytest

from common.errors import run_cli
from tests.training.tiny import arguments
from training import train

GONE = {f"dataset.params.train_{flow}_shards_path_or_url": f"/gone/{flow}.tar" for flow in ("t2i", "mmu")}
GONE |= {"dataset.params.train_lm_shards_path_or_url": None, "model.vq_model.vq_model_name": "/not/looked/at"}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (GONE, ["/gone/t2i.tar", "/gone/mmu.tar", "train_lm_shards_path_or_url is not set"]),
        (
            {"dtype": "bf16", "device": "cuda:1"},
            ["dtype has no effect on training", "device is 'cuda:1', but the launcher gives", "CUDA_VISIBLE_DEVICES"],
        ),
    ],
)
def test_all_mistakes_are_listed_at_once(world, tmp_path, monkeypatch, capfd, overrides, parts):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(world, tmp_path / "out", overrides)])
    with pytest.raises(SystemExit) as end:
        run_cli(train.main)
    printed = capfd.readouterr().err
    assert end.value.code == 2 and "Traceback" not in printed and printed.count("error: ") == 1
    assert all(part in printed.strip().splitlines()[-1] for part in parts)
    assert not (tmp_path / "out").exists()
