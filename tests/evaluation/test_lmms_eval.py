"""The plug-in for lmms-eval, on the harness's interface: the real one where it is installed, else a stand-in for it."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from common.errors import UserError
from models import ShowoPipeline
from tests.evaluation.official import noise
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = find_spec("lmms_eval") is not None
DOCS = [{"image": noise(number), "target": target} for number, target in enumerate(("a b", "c", "d"))]


@dataclass
class GenerationResult:
    text: object
    token_counts: object = None


def stand_in(monkeypatch) -> dict:
    """What a model sees of lmms_eval 0.7: its base class and registry, and the command line around it."""
    registry = {}

    class lmms:
        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

        def __init__(self) -> None:
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_hook = SimpleNamespace(add_partial=lambda attribute, request, result: None)

        @classmethod
        def create_from_arg_string(cls, arguments: str, more: dict):
            given = dict(pair.split("=", 1) for pair in arguments.split(",") if pair)
            return cls(**given, **{key: value for key, value in more.items() if value is not None})

    def register_model(*names):
        return lambda cls: registry.update(dict.fromkeys(names, cls)) or cls

    def cli_evaluate() -> None:
        """As the harness's: any error is printed, and the exit code is 0."""
        with suppress(Exception):
            harness.cli_evaluate_single(SimpleNamespace(tasks=harness.tasks))

    def cli_evaluate_single(args) -> None:
        raise ValueError("Tasks not found: x")

    harness = SimpleNamespace(cli_evaluate=cli_evaluate, cli_evaluate_single=cli_evaluate_single, tasks="x")
    manifests = SimpleNamespace(register_manifest=lambda manifest, overwrite: None)
    modules = {"": {"__main__": harness}, ".api": {}, ".api.model": {"lmms": lmms}}
    modules[".api.instance"] = {"GenerationResult": GenerationResult}
    modules[".api.registry"] = {"register_model": register_model, "MODEL_REGISTRY": registry}
    modules[".models"] = {"MODEL_REGISTRY_V2": manifests}
    modules[".models.registry_v2"] = {"ModelManifest": SimpleNamespace}
    for name, parts in modules.items():
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", SimpleNamespace(**parts, __path__=[]))
    return registry


@pytest.fixture
def plugin(monkeypatch):
    registry = importlib.import_module("lmms_eval.api.registry").MODEL_REGISTRY if INSTALLED else stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, "evaluation.lmms_eval_showo", raising=False)
    module = importlib.import_module("evaluation.lmms_eval_showo")
    assert registry["showo"] is module.ShowoLmms
    yield module
    sys.modules.pop("evaluation.lmms_eval_showo", None)


@pytest.fixture
def pipeline():
    return ShowoPipeline(tiny_showo(), tiny_vq(), prompting())


@pytest.fixture
def make(plugin, places):
    def make():
        settings = {"batch_size": 2, "device": "cpu", "max_batch_size": None}
        model = plugin.ShowoLmms.create_from_arg_string(f"config={places['demo']},seed=3", settings)
        model.task_dict = {"task": {"test": DOCS}}
        return model

    return make


def request(context: str, second, number: int, visuals=lambda doc: [doc["image"]]):
    return SimpleNamespace(args=(context, second, visuals, number, "task", "test"))


def test_generate_until(make, pipeline):
    """Requests in their order, whatever they are batched with; images and marks as the harness gives them."""
    short, long = {"max_new_tokens": 3, "temperature": 0, "until": ["\n\n"]}, {"max_new_tokens": 6}
    asked = [("What is it?", short), ("<image>\nWhy?", long), ("How many?", short)]
    model = make()
    answers = model.generate_until([request(text, kwargs, n) for n, (text, kwargs) in enumerate(asked)])
    for number, (question, tokens) in enumerate((("What is it?", 3), ("Why?", 6), ("How many?", 3))):
        assert [answers[number]] == pipeline.answer_each([DOCS[number]["image"]], [question], max_new_tokens=tokens)
    with pytest.raises(UserError, match="task task, document 0: Show-o answers questions about images; it has none"):
        model.generate_until([request("No image?", short, 0, lambda doc: [])])


def test_a_question_may_be_about_several_images(make, pipeline):
    """Also in a batch with one about a single image."""
    model, kwargs, both = make(), {"max_new_tokens": 3}, lambda doc: [doc["image"], DOCS[2]["image"]]
    asked = [request("<image><image>Which?", kwargs, 0, both), request("Which?", kwargs, 1)]
    images = [[DOCS[0]["image"], DOCS[2]["image"]], DOCS[1]["image"]]
    assert model.generate_until(asked) == [pipeline.answer([one], "Which?", max_new_tokens=3)[0][0] for one in images]
    (found,) = model.loglikelihood([request("Which?", "a b", 0, both)])
    assert (
        found.text
        == pipeline.answer_loss(images[0], "Which?", "a b")
        != pipeline.answer_loss(images[1], "Which?", "a b")
    )


@pytest.mark.slow
def test_sampling_follows_the_request(make):
    """A temperature samples; the same seed samples the same."""
    sampled = [request("What?", {"max_new_tokens": 8, "temperature": 2.0}, 0)]
    first, second = (make().generate_until(sampled) for _ in range(2))
    assert first == second != make().generate_until([request("What?", {"max_new_tokens": 8}, 0)])


def test_loglikelihood(make, pipeline):
    """The loss of the continuation's tokens after the question, from one pass over the whole row. The harness unpacks
    its own type of result only, and its cache of responses must pass over what is no text."""
    found = make().loglikelihood([request("Which?", "a b", 0), request("Which?", lambda doc: doc["target"], 1)])
    for result, doc in zip(found, DOCS, strict=False):
        assert type(result).__name__ == "GenerationResult" and not result.text
        loss, is_greedy = result.text
        rows = pipeline._question_rows([doc["image"]], ["Which?"])
        ids = pipeline.prompting.tokenizer(f" {doc['target']}", add_special_tokens=False)["input_ids"]
        row = torch.cat([rows["input_ids"], torch.tensor([ids])], dim=1)
        logs = pipeline.model(row).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        assert loss == pytest.approx(-float(logs[range(len(ids)), ids].detach().mean()), rel=1e-4)
        assert is_greedy == (logs.argmax(-1).tolist() == ids)


def test_what_is_not_supported_is_one_line(make, plugin):
    model = make()
    for ask, message in (
        (lambda: model.loglikelihood([SimpleNamespace(args=("", "a"))]), "acc_mutual_info"),
        (lambda: model.generate_until_multi_round([]), "several rounds are not supported"),
        (lambda: model.chat_template, "--apply_chat_template has no effect"),
        (lambda: plugin.ShowoLmms(batch_size="auto"), "--batch_size is auto; it must be a whole number of 1 or more"),
        (lambda: plugin.ShowoLmms(batch_size=0), "--batch_size is 0"),
        (lambda: plugin.ShowoLmms(), "no config given; add config=FILE.yaml"),
    ):
        with pytest.raises(UserError, match=message):
            ask()


def test_the_harness_finds_what_it_reads_with_several_processes(make):
    model = make()
    assert torch.tensor(2, device=model.device).device.type == "cpu"
    assert int(model.accelerator.gather(torch.tensor(2))) == 2 and (model.rank, model.world_size) == (0, 1)


@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
@pytest.mark.parametrize(
    ("tasks", "error", "expected"),
    [
        ("x", UserError("--batch_size is auto"), UserError),
        ("x", KeyError("a mistake of ours"), KeyError),
        ("x", None, UserError),  # of the harness's own command line: no such task
        (None, None, UserError),
    ],
)
def test_a_failure_passes_the_harness(plugin, monkeypatch, tasks, error, expected):
    """It prints every error and exits with 0."""
    harness = sys.modules["lmms_eval"].__main__
    harness.tasks = tasks
    if error:
        monkeypatch.setattr(harness, "cli_evaluate_single", Mock(side_effect=error))
    with pytest.raises(expected):
        plugin.main([])


GENERATE = """
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {max_new_tokens: 4, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/docs.jsonl}}}}
test_split: test
doc_to_visual: !function visual.doc_to_visual
doc_to_text: "{{{{question}}}}"
"""


def write_tasks(folder: Path) -> None:
    """Two tasks over the same five images, with a request of each kind."""
    docs = []
    for number in range(5):
        noise(number).save(folder / f"{number}.png")
        doc = {"image": str(folder / f"{number}.png"), "question": "What is this?", "target": "a"}
        docs.append(doc | {"choices": ["a b", "c", "d e"], "answer": number % 3})
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "visual.py").write_text(
        "from PIL import Image\ndef doc_to_visual(doc): return [Image.open(doc['image'])]\n"
    )
    for name, own in (("local_generate", GENERATE), ("local_choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(f"task: {name}{TASK.format(folder)}{own}")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_the_harness_itself(places, tmp_path):
    """Both kinds of requests with one and two processes, and a mistake."""
    write_tasks(tmp_path)
    given = [str(ROOT / "evaluation/lmms_eval_showo.py"), "--model", "showo", "--include_path", str(tmp_path)]
    given += ["--model_args", f"config={places['demo']},device=cpu", "--tasks", "local_generate,local_choose"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def call(*command: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    runs = [call(*launch, *given, "--batch_size", "2") for launch in ([], two)]
    tables = []
    for run in runs:
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
        tables.append([line for line in run.stdout.splitlines() if line.startswith("|local_")])
    assert tables[0] == tables[1] and len(tables[0]) == 2
    mistake = call(*given, "--batch_size", "auto")
    assert mistake.returncode == 2 and "Traceback" not in mistake.stderr
    assert mistake.stderr.endswith("error: --batch_size is auto; it must be a whole number of 1 or more\n")


def test_an_answer_ends_where_the_harness_says(plugin):
    assert plugin.cut("a b. c", ".") == "a b" and plugin.cut("a\n\nb", ["x", "\n\n"]) == plugin.cut("a", []) == "a"


@pytest.mark.slow
@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
def test_without_the_harness_one_line_says_so(tmp_path):
    given = [sys.executable, str(ROOT / "evaluation/lmms_eval_showo.py"), "--model", "showo"]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: lmms_eval is not installed; pip install lmms-eval (it brings torchvision)\n"
