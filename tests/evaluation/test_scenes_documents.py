"""The scene world's tasks of documents: judging by hand-made scenes, figures of true and wrong images, tiny runs."""

from dataclasses import replace

import pytest
from PIL import Image

from evaluation.tasks import GROUPS
from examples.scenes.benchmark import CHANGED, KEPT, RIGHT
from examples.scenes.document_benchmark import changed_scene, rate_edit
from examples.scenes.parts import CHANGES
from examples.scenes.world import Thing, generator
from tests.evaluation.test_scenes import checkpoint, scenes, write_images  # noqa: F401  fixtures

DRAWN = ("scenes_editing", "scenes_stories")


@pytest.mark.parametrize("kind", CHANGES)
def test_edits(kind):
    for number in range(4):
        before, done = changed_scene(generator("test", kind, number), 12, "seen", kind)
        assert rate_edit(before, done.scene, kind, done.scene) == {RIGHT: True, CHANGED: True, KEPT: True}
        nothing = rate_edit(before, done.scene, kind, before)
        assert not nothing[RIGHT] and not nothing[CHANGED], "nothing was done"
        more = replace(done.scene, things=(*done.scene.things, Thing("car", "red", "small", 4, 4)))
        assert not rate_edit(before, done.scene, kind, more)[RIGHT], "and something else came"
        if rest := set(before.things) & set(done.scene.things):
            lost = replace(done.scene, things=tuple(t for t in done.scene.things if t != min(rest, key=str)))
            assert rate_edit(before, done.scene, kind, lost) == {RIGHT: False, CHANGED: True, KEPT: False}


def test_an_added_thing_may_stand_anywhere_in_its_place():
    before, done = changed_scene(generator("test", "add", 0), 12, "seen", "add")
    (new,) = set(done.scene.things) - set(before.things)
    spots = [replace(new, x=x, y=y) for x in range(8) for y in range(8)]
    for spot in spots:
        things = tuple(spot if thing == new else thing for thing in done.scene.things)
        same_place = done.scene.place(spot) == done.scene.place(new)
        if spot not in before.things:
            assert rate_edit(before, done.scene, "add", replace(done.scene, things=things))[RIGHT] == same_place


@pytest.mark.slow
@pytest.mark.parametrize("task", DRAWN)
def test_true_images_are_right_and_empty_ones_are_not(scenes, task):  # noqa: F811
    figures = write_images(scenes, task, "scenes_samples=3")
    assert set(figures.values()) == {100}
    empty = write_images(
        scenes.inside("empty"), task, change=lambda index, image: Image.new("RGB", image.size, "white")
    )
    assert empty["mean of kinds, held out"] == 0 and empty["mean of kinds, held out: true images"] == 100


@pytest.mark.slow
def test_the_tiny_model_is_asked_about_all_of_it(scenes, monkeypatch):  # noqa: F811
    monkeypatch.setattr("examples.scenes.benchmark.read", lambda cells, images: [_EMPTY] * len(images))
    results = scenes.run("scenes_documents", "max_items=3", "batch_size=3", "device=cpu")
    assert list(results) == list(GROUPS["scenes_documents"])
    assert results["scenes_editing"]["figures"]["edit, seen"]["value"] == 0


_EMPTY = replace(changed_scene(generator("test", 0), 8, "seen", "ground")[0], things=())
