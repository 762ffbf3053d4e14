"""The plug-in for lmms-eval, on the harness's interface: the real one where it is installed, else a stand-in for it."""

import importlib
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from models import ShowoPipeline
from tests.evaluation.official import picture
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq

ROOT = Path(__file__).resolve().parents[2]


def stand_in(monkeypatch) -> dict:
    """`lmms` and `register_model` as lmms_eval 0.7 has them, as far as a model sees them."""
    registry = {}

    class Hook:
        def add_partial(self, attribute, request, result) -> None:
            pass

    class lmms:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size, self.cache_hook, self.task_dict = 0, 1, Hook(), {}

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

        @classmethod
        def create_from_arg_string(cls, arguments: str, more: dict | None = None):
            given = dict(pair.split("=", 1) for pair in arguments.split(",") if pair)
            return cls(**given, **{key: value for key, value in (more or {}).items() if value is not None})

    def register_model(*names):
        return lambda cls: registry.update(dict.fromkeys(names, cls)) or cls

    for name, parts in (("lmms_eval", {}), ("lmms_eval.api", {}), ("lmms_eval.api.model", {"lmms": lmms})):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**parts, __path__=[]))
    api = types.SimpleNamespace(register_model=register_model, MODEL_REGISTRY=registry)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.registry", api)
    return registry


@pytest.fixture
def plugin(monkeypatch):
    registry = importlib.import_module("lmms_eval.api.registry").MODEL_REGISTRY if find_spec("lmms_eval") else None
    registry = stand_in(monkeypatch) if registry is None else registry
    monkeypatch.delitem(sys.modules, "evaluation.lmms_eval_showo", raising=False)
    module = importlib.import_module("evaluation.lmms_eval_showo")
    yield module, registry
    sys.modules.pop("evaluation.lmms_eval_showo", None)


DOCS = [{"picture": picture(number), "target": target} for number, target in enumerate(("a b", "c", "d"))]


def request(context: str, second, number: int, visuals=lambda doc: [doc["picture"]]):
    return types.SimpleNamespace(args=(context, second, visuals, number, "task", "test"))


def made(plugin, places, more: str = "", batch_size: int = 2):
    module, registry = plugin
    assert registry["showo"] is module.ShowoLmms
    settings = {"batch_size": batch_size, "device": "cpu", "max_batch_size": None}
    model = module.ShowoLmms.create_from_arg_string(f"config={places['demo']},seed=3{more}", settings)
    model.task_dict = {"task": {"test": DOCS}}
    return model


def test_generate_until(plugin, places):
    """Requests in their order, whatever they are batched with; pictures and marks as the harness gives them."""
    model = made(plugin, places)
    questions = ["What is it?", "<image>\nWhy?", "How many?"]
    short, long = {"max_new_tokens": 3, "temperature": 0, "until": ["\n\n"]}, {"max_new_tokens": 6}
    requests = [
        request(text, kwargs, n) for n, (text, kwargs) in enumerate(zip(questions, (short, long, short), strict=True))
    ]
    answers = model.generate_until(requests)
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    for number, (question, tokens) in enumerate((("What is it?", 3), ("Why?", 6), ("How many?", 3))):
        (expected,) = pipeline.answer_each([DOCS[number]["picture"]], [question], max_new_tokens=tokens)
        assert answers[number] == expected
    with pytest.raises(NotImplementedError, match="task task, document 0: Show-o answers questions about one image"):
        model.generate_until([request("No picture?", short, 0, lambda doc: [])])


def test_further_pictures_are_dropped_with_one_warning(plugin, places, capsys):
    model, kwargs = made(plugin, places), {"max_new_tokens": 3}
    several = [request("Which?", kwargs, n, lambda doc: [doc["picture"], DOCS[2]["picture"]]) for n in (0, 1)]
    answers = model.generate_until(several)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert "task task, document 0 has 2 images; of each document the first is shown" in line
    assert answers == model.generate_until([request("Which?", kwargs, n) for n in (0, 1)])
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.slow
def test_sampling_follows_the_request(plugin, places):
    """A temperature draws; the same seed draws the same."""
    kwargs = {"max_new_tokens": 8, "temperature": 2.0}
    first, second = (made(plugin, places).generate_until([request("What?", kwargs, 0)]) for _ in range(2))
    assert first == second
    assert first != made(plugin, places).generate_until([request("What?", {"max_new_tokens": 8}, 0)])


def test_loglikelihood(plugin, places):
    """The loss of the continuation's tokens behind the question, from one pass over the whole row."""
    model = made(plugin, places)
    found = model.loglikelihood([request("Which?", "a b", 0), request("Which?", lambda doc: doc["target"], 1)])
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    for (loss, is_greedy), doc in zip(found, DOCS, strict=False):
        rows = pipeline._question_rows([doc["picture"]], [0], ["Which?"])
        ids = pipeline.prompting.tokenizer(f" {doc['target']}", add_special_tokens=False)["input_ids"]
        logs, greedy = [], []
        for token in ids:
            with torch.no_grad():
                logits = pipeline.model(rows["input_ids"]).logits[0, -1]
            logs.append(float(logits.log_softmax(-1)[token]))
            greedy.append(int(logits.argmax()) == token)
            rows["input_ids"] = torch.cat([rows["input_ids"], torch.tensor([[token]])], dim=1)
        assert loss == pytest.approx(-sum(logs) / len(logs), rel=1e-4) and is_greedy == all(greedy)
    greedy = pipeline.answer_each([DOCS[0]["picture"]], ["Which?"], max_new_tokens=1)[0]
    if greedy and pipeline.prompting.tokenizer.tokenize(f" {greedy}")[1:] == []:
        assert model.loglikelihood([request("Which?", greedy, 0)])[0][1]


@pytest.mark.parametrize(
    ("text", "until", "expected"), [("a b. c", ".", "a b"), ("a\n\nb", ["x", "\n\n"], "a"), ("a", [], "a")]
)
def test_an_answer_ends_where_the_harness_says(plugin, text, until, expected):
    assert plugin[0].cut(text, until) == expected


def test_wrong_settings_are_refused(plugin, places):
    from common.errors import UserError

    with pytest.raises(UserError, match="unknown key tempratur"):
        made(plugin, places, ",tempratur=1")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_the_harness_one_line_says_so(tmp_path):
    script = ROOT / "evaluation/lmms_eval_showo.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model", "showo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: lmms_eval is not installed; pip install lmms-eval (it brings torchvision)\n"
