"""All benchmarks in small, tiny checkpoints of both branches, and answers that a test chooses."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import evaluate
from common.config import load_config
from common.errors import UserError
from evaluation.answers import model_settings
from evaluation.runner import Run
from evaluation.schema import EvaluationConfig
from evaluation.tasks import task_class
from tests.evaluation.official import WRITERS
from tests.tiny import write_checkpoints


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory) -> Path:
    """All data sets; tests that change files write their own."""
    root = tmp_path_factory.mktemp("benchmarks")
    for write in WRITERS.values():
        write(root)
    return root


@dataclass
class Evaluation:
    """`evaluate.py` on one output folder."""

    yaml: Path
    root: Path
    folder: Path

    def inside(self, name: str) -> "Evaluation":
        """Another one, in a folder within this one's."""
        return replace(self, folder=self.folder / name)

    def arguments(self, tasks: str, *more: str) -> list[str]:
        given = [f"config={self.yaml}", f"tasks={tasks}", f"data_root={self.root}", f"output_dir={self.folder}"]
        given += [f"fid_features={self.root}/inception.pt", f"clip_score_model={self.root}/clip", "fid_size=16"]
        given += [f"reconstruction_images={self.root}/images", "bootstrap_samples=200", "max_new_tokens=4", "seed=1"]
        return [*given, *more]

    def run(self, tasks: str, *more: str) -> dict:
        """The tasks' part of `results.json`."""
        evaluate.main(self.arguments(tasks, *more))
        return self.json("results.json")["tasks"]

    def figures(self, task: str, *more: str) -> dict[str, float]:
        return {name: figure["value"] for name, figure in self.run(task, *more)[task]["figures"].items()}

    def refuses(self, message: str, tasks: str, *more: str) -> None:
        with pytest.raises(UserError, match=message):
            self.run(tasks, *more)

    def prepared(self, task: str, *more: str) -> Run:
        """The task as the runner would begin it."""
        config = load_config(self.arguments(task, *more), EvaluationConfig)
        return Run.of(task_class(task)(config, self.root, self.folder / task), model_settings(config))

    def answer(self, task: str, answers: dict[str, str], *more: str) -> dict[str, float]:
        """Figures of the task when these are the model's answers, by key; the rest of the run is the real one."""
        run = self.prepared(task, *more)
        run.store.begin()
        assert {item.key for item in run.items} == set(answers)
        run.store.add(0, run.items, [answers[item.key] for item in run.items])
        return self.figures(task, *more)

    def compare(self, tasks: str, first: Path, second: Path) -> dict:
        """The tasks' part of `compare.json`."""
        evaluate.main(self.arguments(tasks, f"compare={first},{second}"))
        return self.json("compare.json")["tasks"]

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def json(self, name: str):
        return json.loads(self.text(name))

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in self.text(name).splitlines()]


@pytest.fixture
def evaluation(places, benchmarks, tmp_path) -> Evaluation:
    return Evaluation(places["demo"], benchmarks, tmp_path / "out")


@pytest.fixture
def own(evaluation, tmp_path) -> Evaluation:
    """The same on data that the test writes."""
    (tmp_path / "data").mkdir()
    return replace(evaluation, root=tmp_path / "data")
