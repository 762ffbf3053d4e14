"""The reader of scenes: truth equals image, on true images and on degraded ones."""

import numpy as np
import pytest

from common.errors import UserError
from examples.scenes import reader
from examples.scenes.reader import DEGRADED, Reader, compare
from examples.scenes.world import Scene, Thing, generator, render, sample_scene


@pytest.fixture(scope="module")
def readers():
    return {size: Reader(size) for size in (64, 96, 128)}


def scenes_of(size: int, count: int, split: str = "train") -> list[Scene]:
    return [sample_scene(generator("test", split, number), size // 8, split) for number in range(count)]


def images_of(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "split"), [(64, "train"), (96, "train"), (96, "pairs"), (96, "counts"), (128, "train")]
)
def test_true_images_are_read_as_what_they_show(readers, size, split):
    scenes = scenes_of(size, 40 if size == 128 else 60, split)
    found = readers[size].read(images_of(scenes))
    counts = sum(map(compare, scenes, found), start=compare(scenes[0], scenes[0]))
    assert counts["right"] >= 0.995 * counts["things"] and counts["ground"] == counts["scenes"]
    for scene, read in zip(scenes, found, strict=True):
        if set(read.things) == set(scene.things):
            assert (render(read) == render(scene)).all(), "in front of each other as they are"


def test_an_empty_ground_shows_nothing(readers):
    for ground in ("white", "grey", "sky", "sand"):
        (read,) = readers[64].read(render(Scene(ground, (), 8))[None])
        assert read == Scene(ground, (), 8)


def test_images_of_another_size_are_refused(readers):
    with pytest.raises(ValueError, match=r"expected images of \(N, 96, 96, 3\) uint8, got \(1, 64, 64, 3\)"):
        readers[96].read(np.zeros((1, 64, 64, 3), np.uint8))


def test_what_is_in_front_is_told_from_what_is_behind(readers):
    heart, star = Thing("heart", "red", "large", 2, 2), Thing("star", "blue", "small", 5, 4)
    for order in ((heart, star), (star, heart)):
        (read,) = readers[96].read(render(Scene("sand", order))[None])
        assert read == Scene("sand", order)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blur, radius 0.7", "half the pixels", "noise, 25 dB"])
def test_degraded_images_are_still_read(readers, name):
    scenes = scenes_of(96, 30)
    worse = np.stack([DEGRADED[name](image) for image in images_of(scenes)])
    counts = sum(map(compare, scenes, readers[96].read(worse)), start=compare(scenes[0], scenes[0]))
    assert counts["right"] >= 0.98 * counts["things"]


def test_reading_does_not_depend_on_the_batch(readers):
    images = images_of(scenes_of(64, 5))
    assert readers[64].read(images) == [scene for image in images for scene in readers[64].read(image[None])]


def test_what_is_counted():
    car, tree = Thing("car", "red", "small", 0, 0), Thing("tree", "blue", "large", 7, 1)
    true = Scene("white", (car, tree))
    assert compare(true, Scene("white", (tree, car)))["all"] == 1
    blue = compare(true, Scene("white", (Thing("car", "blue", "small", 0, 0), tree)))
    assert (blue["right"], blue["icon"], blue["colour"], blue["invented"], blue["all"]) == (1, 2, 1, 0, 0)
    moved = compare(true, Scene("sky", (Thing("car", "red", "small", 1, 0), tree, Thing("key", "red", "small", 3, 9))))
    assert (moved["right"], moved["place"], moved["invented"], moved["ground"]) == (1, 1, 1, 0)
    lost = compare(true, Scene("white", (Thing("car", "red", "small", 5, 5),)))
    assert (lost["found"], lost["invented"], lost["things"]) == (0, 1, 2)


def test_the_error_table(capsys):
    reader.main(["sizes=64", "scenes=4", "degraded=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| size | images") and any("true, all" in line for line in lines)
    assert sum("dB" in line or "JPEG" in line for line in lines) >= 4
    with pytest.raises(UserError, match="sizes=64,100: '100' is not allowed; allowed: 64, 96, 128"):
        reader.main(["sizes=64,100"])
