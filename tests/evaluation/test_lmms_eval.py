"""The plug-in for lmms-eval, on the harness's interface: the real one where it is installed, else a stand-in for it."""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import ShowoPipeline
from tests.evaluation.official import noise
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq

ROOT = Path(__file__).resolve().parents[2]
DOCS = [{"image": noise(number), "target": target} for number, target in enumerate(("a b", "c", "d"))]


def stand_in(monkeypatch) -> dict:
    """`lmms` and `register_model` as lmms_eval 0.7 has them, as far as a model sees them."""
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

    for name, parts in (("lmms_eval", {}), ("lmms_eval.api", {}), ("lmms_eval.api.model", {"lmms": lmms})):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**parts, __path__=[]))
    api = SimpleNamespace(register_model=register_model, MODEL_REGISTRY=registry)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.registry", api)
    return registry


@pytest.fixture
def plugin(monkeypatch):
    registry = importlib.import_module("lmms_eval.api.registry").MODEL_REGISTRY if find_spec("lmms_eval") else None
    registry = stand_in(monkeypatch) if registry is None else registry
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
    with pytest.raises(NotImplementedError, match="task task, document 0: Show-o answers questions about one image"):
        model.generate_until([request("No image?", short, 0, lambda doc: [])])


def test_further_images_are_dropped_with_one_warning(make, capsys):
    model, kwargs = make(), {"max_new_tokens": 3}
    several = [request("Which?", kwargs, n, lambda doc: [doc["image"], DOCS[2]["image"]]) for n in (0, 1)]
    answers = model.generate_until(several)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert "task task, document 0 has 2 images; of each document the first is shown" in line
    assert answers == model.generate_until([request("Which?", kwargs, n) for n in (0, 1)])
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.slow
def test_sampling_follows_the_request(make):
    """A temperature samples; the same seed samples the same."""
    sampled = [request("What?", {"max_new_tokens": 8, "temperature": 2.0}, 0)]
    first, second = (make().generate_until(sampled) for _ in range(2))
    assert first == second != make().generate_until([request("What?", {"max_new_tokens": 8}, 0)])


def test_loglikelihood(make, pipeline):
    """The loss of the continuation's tokens after the question, from one pass over the whole row."""
    found = make().loglikelihood([request("Which?", "a b", 0), request("Which?", lambda doc: doc["target"], 1)])
    for (loss, is_greedy), doc in zip(found, DOCS, strict=False):
        rows = pipeline._question_rows([doc["image"]], [0], ["Which?"])
        ids = pipeline.prompting.tokenizer(f" {doc['target']}", add_special_tokens=False)["input_ids"]
        row = torch.cat([rows["input_ids"], torch.tensor([ids])], dim=1)
        logs = pipeline.model(row).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        assert loss == pytest.approx(-float(logs[range(len(ids)), ids].mean()), rel=1e-4)
        assert is_greedy == (logs.argmax(-1).tolist() == ids)


def test_an_answer_ends_where_the_harness_says(plugin):
    assert plugin.cut("a b. c", ".") == "a b" and plugin.cut("a\n\nb", ["x", "\n\n"]) == plugin.cut("a", []) == "a"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_the_harness_one_line_says_so(tmp_path):
    given = [sys.executable, str(ROOT / "evaluation/lmms_eval_showo.py"), "--model", "showo"]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: lmms_eval is not installed; pip install lmms-eval (it brings torchvision)\n"
