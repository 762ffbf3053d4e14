"""What users get wrong about a training run, as they see it: one line, exit code 2, nothing lost."""

import json
import shutil
import sys

import pytest
from accelerate.state import AcceleratorState

from common.errors import run_cli
from tests.training.tiny import arguments, write_texts
from training import train
from training.guards import only_run_in

QUICK = {"experiment.generate_every": 99, "training.max_train_steps": 2, "experiment.save_every": 1}


@pytest.fixture
def started(world, monkeypatch, capfd):
    """Runs `training/train.py` with overrides; returns the exit code and the error line."""

    def start(output_dir, overrides=None) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments(world, output_dir, QUICK | (overrides or {}))])
        try:
            run_cli(train.main)
        except SystemExit as end:
            printed = capfd.readouterr().err
            assert "Traceback" not in printed and printed.count("error: ") == 1
            return end.code, printed.strip().splitlines()[-1]
        return 0, ""

    return start


@pytest.fixture
def finished(started, tmp_path):
    assert started(tmp_path / "out") == (0, "")
    return tmp_path / "out"


def test_missing_data_is_listed_all_at_once_before_anything_is_loaded(started, tmp_path):
    gone = {f"dataset.params.train_{flow}_shards_path_or_url": f"/gone/{flow}.tar" for flow in ("t2i", "mmu")}
    gone |= {"dataset.params.train_lm_shards_path_or_url": None, "model.vq_model.vq_model_name": "/not/looked/at"}
    code, line = started(tmp_path / "out", gone)
    assert code == 2 and "/gone/t2i.tar" in line and "/gone/mmu.tar" in line
    assert "train_lm_shards_path_or_url is not set" in line and not (tmp_path / "out").exists()


def test_a_text_file_without_the_column(started, tmp_path):
    file = write_texts(tmp_path / "texts.parquet", ["one", "two"], column="body")
    code, line = started(tmp_path / "out", {"dataset.params.train_lm_shards_path_or_url": file})
    assert code == 2 and f"{file} has no column 'content'; its columns are body" in line
    assert "dataset.params.lm_column" in line and not (tmp_path / "out").exists()


def test_batch_sizes_that_are_all_0(started, tmp_path):
    code, line = started(tmp_path / "out", {f"training.batch_size_{flow}": 0 for flow in ("t2i", "lm", "mmu")})
    assert code == 2 and "are all 0; nothing to train on" in line


def test_settings_of_inference_that_training_would_ignore(started, tmp_path):
    code, line = started(tmp_path / "out", {"dtype": "bf16", "device": "cuda:1"})
    assert code == 2 and "dtype has no effect on training; give training.mixed_precision" in line
    assert "device is 'cuda:1', but the launcher gives each process its GPU" in line and "CUDA_VISIBLE_DEVICES" in line


def test_an_output_folder_that_cannot_be_written(started, tmp_path):
    (tmp_path / "file").touch()
    code, line = started(tmp_path / "file" / "out")
    assert code == 2 and "cannot be written to" in line and "give another folder" in line


def test_deepspeed_that_is_not_installed(started, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("training.processes.importlib.util.find_spec", lambda name: None)
    code, line = started(tmp_path / "out")
    assert code == 2 and "DeepSpeed, which is not installed: pip install" in line


@pytest.mark.slow
def test_an_incomplete_checkpoint(started, tmp_path, finished):
    (finished / "checkpoint-2/optimizer.bin").unlink()
    code, line = started(finished)
    assert code == 2 and "checkpoint-2 cannot be continued from" in line and "remove or replace it" in line
    (finished / "checkpoint-2/metadata.json").unlink()
    code, line = started(finished)
    assert code == 2 and "checkpoint-2/metadata.json is missing" in line


@pytest.mark.slow
def test_a_checkpoint_of_another_shape(started, tmp_path, world, finished):
    shutil.copytree(world / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps(settings | {"hidden_size": 16, "intermediate_size": 32}))
    changes = {"model.showo.llm_model_path": tmp_path / "llm", "experiment.accept_config_changes": True}
    code, line = started(finished, changes)
    assert code == 2 and "checkpoint-2 cannot be continued from" in line


@pytest.mark.slow
def test_a_configuration_that_changed_under_a_run(started, tmp_path, finished):
    code, line = started(finished, {"training.lm_coeff": 0.7, "training.max_train_steps": 9})
    assert code == 2 and "training.lm_coeff 0.1 → 0.7" in line and "training.max_train_steps 2 → 9" in line
    assert "experiment.accept_config_changes=true" in line


@pytest.mark.slow
def test_a_second_run_in_the_same_folder(started, tmp_path, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    with only_run_in(finished):
        code, line = started(finished)
    assert code == 2 and "another run is writing to" in line
    assert (finished / "metrics.jsonl").read_bytes() == before
