"""The command that shows what the alignment tasks gain: what it runs, in which order, and the table it makes."""

import json
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import UserError
from evaluation.schema import EvaluationConfig
from examples.scenes import alignment
from training.tasks import find_task
from training.train import read_key

GAIN = {1: 4.0, 2: 8.0}  # by seed


class Runs:
    """In place of the commands: reads their settings as they do, and writes a comparison with known numbers."""

    def __init__(self):
        self.found: list[tuple[str, str]] = []

    def __call__(self, script: str, *arguments: str) -> None:
        if script == "training/train.py":
            settings = find_task(str(read_key(list(arguments), "task") or "showo")).settings
            config = load_config(list(arguments), settings)
            self.found.append(("train", Path(config.experiment.output_dir).name))
            self.seed, self.steps = config.training.seed, config.training.max_train_steps
            return
        config = load_config(list(arguments), EvaluationConfig)
        folder = Path(config.output_dir)
        self.found.append(("compare" if config.compare else "score", folder.name))
        if config.compare:
            gain = GAIN[config.seed]
            interval = {"value": gain, "low": gain - 1.96, "high": gain + 1.96}
            one = {"first": 50.0, "second": 50.0 + gain, "difference": interval, "p": 0.01}
            folder.mkdir(parents=True)
            tasks = {name: {alignment.FIGURE: one} for name in alignment.SCORED}
            (folder / "compare.json").write_text(json.dumps({"tasks": tasks}))


@pytest.fixture
def runs(monkeypatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(alignment, "run", found)
    return found


def arguments(tmp_path, **given) -> list[str]:
    (tmp_path / "start").mkdir(exist_ok=True)
    settings = {"start": tmp_path / "start", "output_dir": tmp_path / "out", "seeds": "[1,2]"} | given
    return [f"{key}={value}" for key, value in settings.items()]


def test_the_table(runs, tmp_path, capsys):
    """Two seeds with gains of 4 and 8, standard error 1 each: mean 6, 2 seeds: 12.71 · sqrt(8) / sqrt(2) = 25.4."""
    alignment.main(arguments(tmp_path, tasks="policy"))
    lines = (tmp_path / "out/alignment.md").read_text().splitlines()
    compared = "policy | start, 16 steps → policy, 16 steps | scenes_answers"
    assert lines[-1] == f"| {compared} | 50.0 | 56.0 | +6.0 [-19.4, +31.4] | +4.0, +8.0 |"
    assert lines[-1] in capsys.readouterr().out
    one_seed = [
        ("score", "start-16-steps-seed-1"),
        ("train", "policy-seed-1"),
        ("score", "policy-16-steps-seed-1"),
        ("compare", "start-16-steps-seed-1-policy-16-steps-seed-1"),
    ]
    assert runs.found[:4] == one_seed and len(runs.found) == 8


def test_every_task_reads_its_settings(runs, tmp_path):
    """Plain training takes as many steps as reconstruction; the student is scored in 4 steps."""
    alignment.main(arguments(tmp_path, seeds="[1]", train="[training.max_train_steps=7]"))
    trained = dict.fromkeys(name for kind, name in runs.found if kind == "train")
    assert list(trained) == [f"{name}-seed-1" for name in ("plain", *alignment.COMPARISONS)]
    scored = [name for kind, name in runs.found if kind == "score"]
    assert {"distillation-4-steps-unguided-seed-1", "start-4-steps-unguided-seed-1"} < set(scored)
    assert runs.steps == 7 and runs.seed == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "rlhf"}, "tasks holds 'rlhf'; allowed: reconstruction"),
        ({"start": "gone"}, "start=gone does not exist"),
        ({"seeds": "[]"}, "must name one at least"),
    ],
)
def test_refusals(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        alignment.main(arguments(tmp_path, **given))
    assert not (tmp_path / "out").exists()


def test_a_command_that_fails_ends_this_one():
    with pytest.raises(UserError, match="evaluate.py ended with exit code 2"):
        alignment.run("evaluate.py", "tasks=none")
