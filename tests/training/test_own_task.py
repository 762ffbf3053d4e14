"""The example task of docs/training.md, as it stands there: a file, a section of settings and a YAML file."""

import re
import subprocess
import sys

import pytest
import torch

import training.tasks
from common.errors import UserError
from models import MAGVITv2
from tests.training.tiny import CAPTIONS, make_vq_model, metrics_of, sample, write_shard
from training import train, train_magvitv2


def code_blocks(repository, language: str) -> list[str]:
    text = (repository / "docs/training.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text[text.index("## A task of your own") :], flags=re.S)


@pytest.fixture
def arguments(repository, tmp_path, monkeypatch):
    """The command line of a run with the example's files, on the tiny world's images."""
    (code,), (settings,) = (code_blocks(repository, language) for language in ("python", "yaml"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/decoder.py").write_text(code)
    monkeypatch.setattr(training.tasks, "__path__", [*training.tasks.__path__, str(tmp_path / "tasks")])
    monkeypatch.delitem(sys.modules, "training.tasks.decoder", raising=False)
    (tmp_path / "decoder.yaml").write_text(settings)
    shard = write_shard(tmp_path / "train.tar", [sample(caption) for caption in CAPTIONS])
    make_vq_model().save_pretrained(tmp_path / "magvitv2")
    changes = {
        "config": tmp_path / "decoder.yaml",
        "experiment.output_dir": tmp_path / "out",
        "experiment.log_every": 1,
        "experiment.eval_every": 3,
        "model.pretrained_model_path": tmp_path / "magvitv2",
        "dataset.params.train_shards": shard,
        "dataset.params.eval_shards": shard,
        "dataset.params.resolution": 32,
        "dataset.params.num_workers": 0,
        "training.batch_size": 4,
        "training.max_train_steps": 6,
        "optimizer.params.learning_rate": 1e-2,
        "lr_scheduler.params.warmup_steps": 0,
        "device": "cpu",
    }
    return [f"{key}={value}" for key, value in changes.items()]


def test_the_example_of_the_documentation_trains(arguments, tmp_path):
    train.main(arguments)
    before, after = make_vq_model().state_dict(), MAGVITv2.from_pretrained(tmp_path / "out").state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] and lines[-1]["eval/psnr"] > lines[2]["eval/psnr"]


def test_its_settings_are_known_like_any_others(arguments):
    with pytest.raises(UserError, match="decoder.edge is -1.0?; it must be 0 or more"):
        train.main([*arguments, "decoder.edge=-1"])
    with pytest.raises(UserError, match="unknown key decoder.egde; the nearest known key is decoder.edge"):
        train.main([*arguments, "decoder.egde=1"])


def test_an_unknown_task_is_refused_with_the_list(arguments):
    with pytest.raises(UserError, match="task is 'encoder'; allowed: decoder, distillation, .*, showo, tokenizer"):
        train.main([*arguments, "task=encoder"])
    with pytest.raises(UserError, match="task is decoder, but this script trains tokenizer; take training/train.py"):
        train_magvitv2.main(arguments)


def test_help_lists_the_settings_of_the_task(repository):
    command = [sys.executable, "training/train.py", "task=tokenizer", "--help"]
    output = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert "losses.codebook_entropy=0.03" in output and "training.batch_size_t2i" not in output
