"""The scene world's tasks: judging by hand-made scenes, figures of true and of wrong images, the tiny model's runs."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.tasks import GROUPS
from examples.scenes.benchmark import CHANGED, KEPT, RIGHT, extended, new_window, rate_change, rate_claims
from examples.scenes.reader import find_grounds
from examples.scenes.world import GROUNDS, Scene, Thing, held_out, holds, is_possible, render
from models import ShowoPipeline
from tests.evaluation.conftest import Evaluation
from tests.parity.goldens import prompting, tiny_showo
from tests.tiny import showo_config, tiny_vq, write_published

TASKS = GROUPS["scenes"]
DRAWN = ("scenes_drawing", "scenes_inpainting", "scenes_extrapolation")
CAR, TREE, KEY = (
    Thing("car", "red", "small", 0, 0),
    Thing("tree", "blue", "large", 7, 1),
    Thing("key", "red", "small", 1, 8),
)
TWO = {
    "ground": "sand",
    "things": [{"icon": "car", "colour": "red"}, {"icon": "tree", "colour": "blue"}],
    "relations": [[0, "left of", 1]],
}
ONE = {"ground": "sand", "things": [{"icon": "car", "colour": "red", "size": "small", "place": "top left"}]}


@dataclass
class Scenes(Evaluation):
    """With a model of 64 x 64 pixels, the least that the world has."""

    def arguments(self, tasks: str, *more: str) -> list[str]:
        given = ["model.showo.num_vq_tokens=64", "dataset.preprocessing.resolution=64", "scenes_samples=1"]
        return super().arguments(tasks, *given, *more)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    state = tiny_showo(num_vq_tokens=64).state_dict()
    return write_published(tmp_path_factory.mktemp("scenes") / "showo", showo_config(num_vq_tokens=64), state)


@pytest.fixture
def scenes(places, benchmarks, checkpoint, tmp_path) -> Scenes:
    text = places["demo"].read_text().replace(str(places["showo"]), str(checkpoint))
    (tmp_path / "demo.yaml").write_text(text)
    return Scenes(tmp_path / "demo.yaml", benchmarks, tmp_path / "out")


# ---- judging ----


@pytest.mark.parametrize(
    ("claims", "things", "ground", "wrong"),
    [
        (TWO, (TREE, CAR), "sand", set()),
        (TWO, (replace(CAR, colour="pink"), TREE), "sand", {"colour"}),
        (TWO, (replace(CAR, icon="bus"), TREE), "sand", {"icon", "relation"}),
        (TWO, (CAR, TREE), "sky", {"ground"}),
        (TWO, (replace(CAR, x=9, y=9), replace(TREE, x=0)), "sand", {"relation"}),
        (TWO, (replace(CAR, colour="blue"), replace(TREE, colour="red")), "sand", {RIGHT}),  # all but the binding
        (TWO, (CAR, TREE, KEY), "sand", {"number", "icon", "colour", "relation"}),
        (TWO, (CAR,), "sand", {"number", "icon", "colour", "relation"}),
        (ONE, (CAR,), "sand", set()),
        (ONE, (replace(CAR, size="large"),), "sand", {"size"}),
        (ONE, (replace(CAR, x=9),), "sand", {"place"}),
        (ONE, (), "sand", {"number", "icon", "colour", "size", "place"}),
        ({"things": [{"icon": "car"}] * 3}, (CAR, replace(CAR, x=4), replace(CAR, x=8)), "sky", set()),
        ({"things": [{"icon": "car"}] * 3}, (CAR, replace(CAR, x=4)), "sky", {"number", "icon"}),
    ],
)
def test_claims_and_their_parts(claims, things, ground, wrong):
    found = rate_claims(claims, Scene(ground, things))
    assert {name for name, value in found.items() if not value} == wrong | ({RIGHT} if wrong else set())


@pytest.mark.parametrize(
    ("things", "ground", "shown", "kept"),
    [
        ((CAR, TREE), "sand", True, True),
        ((TREE, CAR), "sand", True, True),
        ((CAR, replace(TREE, colour="red")), "sand", False, True),
        ((CAR, replace(TREE, y=2)), "sand", True, True),  # elsewhere in the region
        ((CAR,), "sand", False, True),
        ((CAR, TREE, replace(TREE, icon="key", size="small", x=9, y=8)), "sand", False, True),
        ((CAR, TREE, KEY), "sand", True, False),  # invented outside the region
        ((replace(CAR, x=1), TREE), "sand", True, False),
        ((TREE,), "sand", True, False),
        ((CAR, TREE), "grey", True, False),
    ],
)
def test_changes(things, ground, shown, kept):
    """The right half is generated, and a tree is to be there."""
    found = rate_change(Scene(ground, things), Scene("sand", (CAR,)), TWO, lambda thing: thing.x >= 6)
    assert found == {RIGHT: shown and kept, CHANGED: shown, KEPT: kept}


def test_a_region_to_be_emptied():
    claims = {"ground": None, "things": [{"icon": "car", "colour": "red"}]}
    for things, right in (((CAR,), True), ((CAR, TREE), False), ((), False)):
        found = rate_change(Scene("sand", things), Scene("sand", (CAR,)), claims, lambda thing: thing.x >= 6)
        assert found[RIGHT] == right


def test_windows_of_a_canvas():
    canvas = torch.arange(12 * 8).view(12, 8)
    above, below = canvas[:8], canvas[4:]
    assert (extended(above, below, "down") == canvas).all() and (extended(below, above, "up") == canvas).all()
    assert (new_window(above, below, "down") == below).all() and (new_window(below, above, "up") == above).all()
    left, right = canvas.T[:, :8], canvas.T[:, 4:]
    assert (extended(left, right, "right") == canvas.T).all() and (extended(right, left, "left") == canvas.T).all()
    assert (new_window(left, right, "right") == right).all() and (new_window(right, left, "left") == left).all()


# ---- what is asked ----


@pytest.mark.slow
def test_items_are_what_they_say(scenes):
    """All prompts are true of their scenes, held out as their split says; a change is needed, and possible."""
    for name in DRAWN:
        run = scenes.prepared(name, "scenes_samples=5", "dataset.preprocessing.resolution=96")
        assert len({item.key for item in run.items}) == len(run.items) == 5 * sum(map(len, run.task.kinds.values()))
        for item in run.items:
            facts, scene = item.facts, item.facts["scene"]
            assert holds(facts["claims"], scene) and is_possible(scene), item.key
            assert held_out(scene.things) == {facts["split"]} - {"seen"}, item.key
            if name == "scenes_inpainting":
                assert not holds(facts["claims"], facts["before"]) and is_possible(facts["before"])
                assert run.task.rate(item, [facts["before"]]) == {RIGHT: False, CHANGED: False, KEPT: True}
            if name == "scenes_extrapolation":
                assert facts["given"].ground == scene.ground and is_possible(facts["given"])
                assert run.task.rate(item, [facts["given"], facts["rest"]])[RIGHT] is False
    counted = [item for item in scenes.prepared("scenes_drawing", "scenes_samples=5").items if item.key[:5] == "count"]
    assert sorted(len(item.facts["scene"].things) for item in counted)[:4] == [1, 1, 1, 1]


def test_a_size_that_the_world_has_not(scenes):
    message = "resolution is 32, but scenes_answers has images of 64, 96, 128 pixels only"
    sizes = ("dataset.preprocessing.resolution=32", "model.showo.num_vq_tokens=16")
    scenes.refuses(message, "scenes_answers", *sizes)


# ---- figures ----


def words(text: str) -> set[str]:
    """In which order things are read does not matter."""
    return set(re.findall(r"\w+", text))


def write_images(evaluation: Evaluation, task: str, *more: str, change=lambda index, image: image) -> dict[str, float]:
    """The figures of images that are true but for what `change` does; reconstructions are true."""
    run, answers = evaluation.prepared(task, *more), {}
    for index, item in enumerate(run.items):
        image, (answer, restored) = run.task.true_image(item), run.task.files_of(item)
        for name, one in ((answer, change(index, image)), (restored, image)):
            (run.task.folder / name).parent.mkdir(parents=True, exist_ok=True)
            one.save(run.task.folder / name)
        answers[item.key] = answer
    return evaluation.answer(task, answers, *more)


@pytest.mark.slow
@pytest.mark.parametrize("task", DRAWN)
def test_true_images_are_right_and_so_are_the_ceilings(scenes, task):
    figures = write_images(scenes, task, f"scenes_samples={4 if task == 'scenes_extrapolation' else 1}")
    assert set(figures.values()) == {100}
    assert {"mean of kinds, seen", "mean of kinds, held out: reconstructions"} < set(figures)


@pytest.mark.slow
@pytest.mark.parametrize("task", DRAWN)
def test_wrong_images_are_wrong(scenes, task):
    """Every image is an empty ground, but the first."""
    figures = write_images(
        scenes, task, change=lambda index, image: image if not index else Image.new("RGB", image.size, "white")
    )
    kind = next(iter(scenes.prepared(task).task.kinds))
    assert figures[f"{kind}, seen"] == 100 and figures["mean of kinds, held out"] == 0
    assert figures["mean of kinds, held out: true images"] == figures[f"{kind}, held out: reconstructions"] == 100
    lines = scenes.lines(f"{task}/predictions.jsonl")
    assert lines[0]["score"] == 1 and words(lines[0]["parsed"]) == words(lines[0]["expected"])
    assert lines[-1]["parsed"].startswith("nothing on a white ground") and lines[-1]["score"] < 1
    table = scenes.text("results.md")
    assert f"| {task} | ours [95 % interval] | reconstructions | true images |" in table
    assert f"\n| {kind}, seen | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |\n" in table
    assert Image.open(scenes.folder / task / "best_worst.png").width > 4 * 128


@pytest.mark.slow
def test_parts_of_drawings_by_hand(scenes):
    """A figure counts what the prompts of its kind say: the ground is wrong in all, the rest is right."""

    def on_grey(index: int, image: Image.Image) -> Image.Image:
        ground = np.asarray(image)[0, 0] if not (np.asarray(image)[0, 0] == 186).all() else None
        pixels = np.asarray(image).copy()
        pixels[(pixels == ground).all(-1)] = (186, 188, 192)
        return Image.fromarray(pixels)

    chosen = scenes.prepared("scenes_drawing").items
    figures = write_images(scenes, "scenes_drawing", change=on_grey)
    grey = {item.facts["kind"] for item in chosen if item.facts["scene"].ground == "grey" and "-seen-" in item.key}
    for kind in ("single thing", "two things", "count"):
        assert figures[f"{kind}, seen"] == figures[f"{kind}, seen, ground"] == 100 * (kind in grey)
        assert figures[f"{kind}, seen, icon"] == figures[f"{kind}, seen, number"] == 100
    assert figures["single thing, seen, place"] == figures["two things, seen, relation"] == 100
    assert figures["count, seen, 1 thing"] == figures["count, seen"] and "two things, seen, size" not in figures


def test_answers_by_hand(scenes):
    """Always yes: half of what is to be answered yes or no is right, and nothing else."""
    run = scenes.prepared("scenes_answers", "scenes_samples=4")
    assert {item.facts["kind"] for item in run.items} == set(run.task.kinds)
    figures = scenes.answer("scenes_answers", {item.key: "yes" for item in run.items}, "scenes_samples=4")
    assert figures["yes-no, held out"] == figures["yes-no, pairs"] == 50
    assert figures["yes-no, seen, answered yes"] == 100 and figures["what, seen"] == figures["count, held out"] == 0
    own = scenes.inside("own")
    right = own.answer("scenes_answers", {item.key: item.expected for item in run.items}, "scenes_samples=4")
    assert right.pop("yes-no, seen, answered yes") == right.pop("yes-no, held out, answered yes") == 50
    assert set(right.values()) == {100}


def test_reconstructions_by_hand(scenes):
    """One of two seen scenes comes back as an empty ground."""
    task, settings, answers = "scenes_reconstruction", "scenes_samples=2", {}
    run = scenes.prepared(task, settings)
    for item in run.items:
        answers[item.key], codes = run.task.files_of(item)
        (run.task.folder / codes).parent.mkdir(parents=True, exist_ok=True)
        scene = item.facts["scene"]
        empty = item.key == "seen-0001"
        Image.fromarray(render(replace(scene, things=()) if empty else scene)).save(run.task.folder / answers[item.key])
        np.save(run.task.folder / codes, np.array([0, 1 + empty], dtype=np.int32))
    (run.task.folder / "codebook.json").write_text('{"codebook_size": 64}')
    figures = scenes.answer(task, answers, settings)
    first, second = (len(item.facts["scene"].things) for item in run.items[:2])
    assert figures["things right, seen"] == pytest.approx(100 * first / (first + second))
    assert figures["scenes all right, seen"] == 50 and figures["things invented, seen"] == 0
    assert figures["things right, held out"] == figures["things right, seen: true images"] == 100
    assert figures["PSNR, dB, held out"] == 100 > figures["PSNR, dB, seen"] > 50 and figures["codes used"] == 3


# ---- the tiny model ----


@pytest.mark.slow
def test_images_are_the_pipelines(scenes):
    """A change that is asked for alone is what `inpaint` and `extrapolate` give with the batch's generator."""
    pipeline = ShowoPipeline(tiny_showo(num_vq_tokens=64), tiny_vq(), prompting())
    for name in DRAWN[1:]:
        run = scenes.prepared(name, "scenes_samples=4", "max_items=6")
        for item in run.items:
            settings = {"guidance_scale": 2.0, "timesteps": 3}
            own = run.task.generated_by(pipeline, [item], pipeline.generator(5))
            if name == "scenes_inpainting":
                before, mask = Image.fromarray(render(item.facts["before"])), run.task.mask_of(item)
                expected = pipeline.inpaint(before, mask, item.prompt, generator=pipeline.generator(5), **settings)
            else:
                given, direction = Image.fromarray(render(item.facts["given"])), item.facts["direction"]
                expected = pipeline.extrapolate(
                    given, direction, item.prompt, generator=pipeline.generator(5), **settings
                )
                assert own[0].size == ((96, 64) if direction in ("left", "right") else (64, 96))
            assert own[0].tobytes() == expected[0].tobytes()


@pytest.mark.slow
def test_two_runs_are_equal_and_a_cut_one_resumes(scenes, monkeypatch):
    """Of what is read only the ground, since the noise that the tiny model makes takes seconds to read."""

    def read_grounds(cells: int, images: list[Image.Image]) -> list[Scene]:
        grounds = find_grounds(torch.stack([torch.from_numpy(np.array(image)).float() for image in images]))
        return [Scene(tuple(GROUNDS)[index], (), cells) for index in grounds]

    monkeypatch.setattr("examples.scenes.benchmark.read", read_grounds)
    settings = ("max_items=5", "batch_size=2", "device=cpu")
    one, two = scenes.inside("one"), scenes.inside("two")
    results = one.run("scenes", *settings)
    assert list(results) == list(TASKS)
    for task in TASKS:
        headline = "what, seen" if task == "scenes_answers" else results[task]["headline"]  # one scene is asked about
        assert headline in results[task]["figures"], task
    two.run("scenes_drawing,scenes_inpainting", *settings)
    for task in ("scenes_drawing", "scenes_inpainting"):
        answers = two.folder / task / "answers-000.jsonl"
        answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:1]))
        next((two.folder / task / "drawings").iterdir()).unlink()
    assert two.run("scenes", *settings) == results
    images = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*.png"))
    assert len(images) == 2 * (5 + 5 + 3) + 4 + 5  # drawings and reconstructions, reconstructions alone, sheets
    for name in images:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    one.refuses("scenes=1 of each kind .* now it is 2 of each kind", "scenes", *settings, "scenes_samples=2")
