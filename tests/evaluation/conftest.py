"""All benchmarks in small, tiny checkpoints of both branches, and answers that a test chooses."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import evaluate
from common.config import load_config
from evaluation.answers import AnswerStore, model_settings
from evaluation.runner import Processes, Run
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

    def arguments(self, tasks: str, *more: str) -> list[str]:
        given = [f"config={self.yaml}", f"tasks={tasks}", f"data_root={self.root}", f"output_dir={self.folder}"]
        given += [f"fid_features={self.root / 'inception.pt'}", f"clip_score_model={self.root / 'clip'}"]
        given += [f"reconstruction_images={self.root / 'pictures'}", "fid_size=16"]
        return [*given, "bootstrap_samples=200", "max_new_tokens=4", "seed=1", *more]

    def run(self, tasks: str, *more: str) -> dict:
        """The tasks' part of `results.json`."""
        evaluate.main(self.arguments(tasks, *more))
        return json.loads((self.folder / "results.json").read_text())["tasks"]

    def prepared(self, task: str, *more: str) -> Run:
        """The task as the runner would begin it."""
        config = load_config(self.arguments(task, *more), EvaluationConfig)
        return Run.of(task_class(task)(config, self.root, self.folder / task), model_settings(config))

    def answer(self, task: str, answers: dict[str, str], *more: str) -> dict:
        """Figures of the task when these are the model's answers, by key; the rest of the run is the real one."""
        run = self.prepared(task, *more)
        store: AnswerStore = run.store
        store.begin()
        assert {item.key for item in run.items} == set(answers)
        store.add(Processes().rank, run.items, [answers[item.key] for item in run.items])
        result = self.run(task, *more)[task]
        return {name: figure["value"] for name, figure in result["figures"].items()}

    def submission(self, task: str, name: str) -> str:
        return (self.folder / task / "submission" / name).read_text()


@pytest.fixture
def evaluation(places, benchmarks, tmp_path) -> Evaluation:
    return Evaluation(places["demo"], benchmarks, tmp_path / "out")
