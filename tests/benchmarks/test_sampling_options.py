"""The table of sampling options: which images count as right, and that the one command runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import sampling_options
from benchmarks.sampling_options import OPTIONS, PLACES, WAYS, SceneWorld, WaysConfig, settings_of
from common.config import load_config
from common.errors import UserError
from examples.scenes.parts import sample
from examples.scenes.world import render
from models import ShowoPipeline
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq

CONFIG = "config=configs/showo_demo.yaml"
ARGUMENTS = [CONFIG, "dataset.preprocessing.resolution=64", "samples=3", "device=cpu", "repeats=0"]


@pytest.fixture
def pipeline(monkeypatch):
    made = ShowoPipeline(tiny_showo(num_vq_tokens=64), tiny_vq(), prompting())
    monkeypatch.setattr(ShowoPipeline, "from_config", lambda config: made)
    return made


@pytest.mark.slow
def test_an_image_is_right_if_it_shows_what_its_caption_says(pipeline, monkeypatch):
    world = SceneWorld(load_config(ARGUMENTS, WaysConfig))
    assert world.places == ["seen"] * 3 + ["held_out"] * 3
    splits = ["seen"] * 3 + list(PLACES["held_out"])
    scenes = [sample("captions", n % 3 if n < 3 else 0, split=s, cells=8).scenes[0] for n, s in enumerate(splits)]
    images = [Image.fromarray(render(scene)) for scene in scenes]
    images[1] = Image.new("RGB", (64, 64), "white")
    monkeypatch.setattr(pipeline, "decode", lambda codes: images)
    found = world.right(torch.zeros(6, 64))
    interval = {"low": 0.4365, "high": 0.9700}  # Wilson's of five in six
    assert found == pytest.approx({"right": 5 / 6, "seen": 2 / 3, "held_out": 1.0} | interval, abs=1e-4)


@pytest.mark.slow
def test_the_table(pipeline, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "decode", lambda codes: [Image.new("RGB", (64, 64), "white")] * len(codes))
    sampling_options.main([*ARGUMENTS, "steps=[1, 3]", "ways=[another seed, top_k 20]"])
    *table, last = capsys.readouterr().out.splitlines()
    ways, results = ["published", "another seed", "top_k 20"], json.loads(last)["results"]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {way}" for way in ways]
    assert list(results) == ways and set(results["published"]) == {"random_s", "1", "3"}
    assert results["published"]["3"]["differ"] == 0 < results["top_k 20"]["3"]["differ"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_is_made_of_settings_that_exist(way):
    assert way.keys() <= {*OPTIONS, "seed", "schedule", "temperature"}
    settings = settings_of(way, 4, SimpleNamespace(generation_temperature=1.0))
    assert all(getattr(settings["sampling"], key) == value for key, value in way.items() if key in OPTIONS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ways=[best]", "ways has 'best'; known: published; another seed"),
        ("steps=[0]", "steps is 0; it must be from 1"),
    ],
)
def test_mistakes(argument, message):
    with pytest.raises(UserError, match=message):
        load_config([*ARGUMENTS, argument], WaysConfig)


def test_a_model_of_another_size_is_refused():
    with pytest.raises(UserError, match="resolution is 256; give a model of 64, 96, 128 pixels"):
        SceneWorld(load_config([CONFIG], WaysConfig))
