"""The fifty images of a new icon, and how images of its prompts are scored."""

import json
from itertools import islice

import numpy as np
import pytest
import webdataset
from PIL import Image

from common.errors import UserError
from examples.scenes import new_icon
from examples.scenes.reader import Reader
from examples.scenes.world import ICONS, holds, is_possible, render

SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "ladder"
    new_icon.main([f"output_dir={folder}", "images=12", "prompts=8", f"size={SIZE}"])
    return folder


def test_every_image_shows_what_its_caption_says_and_a_ladder(folder):
    samples = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False).decode("pil"))
    assert len(samples) == 12 and all("ladder" in sample["txt"] for sample in samples)
    images = np.stack([np.asarray(sample["png"].convert("RGB")) for sample in samples])
    found = Reader(SIZE, icons=(*ICONS, new_icon.NAME)).read(images)
    assert sum(thing.icon == new_icon.NAME for scene in found for thing in scene.things) == 12
    without = Reader(SIZE).read(images)
    assert not any(thing.icon == new_icon.NAME for scene in without for thing in scene.things)
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == 8 and not set(prompts) & {sample["txt"] for sample in samples}


def test_the_scenes_keep_the_rules_of_the_world():
    assert all(is_possible(scene) for scene in islice(new_icon.scenes(new_icon.NewIconConfig(size=SIZE), "train"), 200))


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    new_icon.main([f"output_dir={tmp_path}", "images=12", "prompts=8", f"size={SIZE}"])
    for name in ("train-000000.tar", "prompts.txt", "prompts.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_right_and_wrong_images_are_told_apart(folder, tmp_path, capsys):
    known = {line["prompt"]: line["claims"] for line in map(json.loads, (folder / "prompts.jsonl").open())}
    config = new_icon.NewIconConfig(output_dir=str(folder), size=SIZE)
    right = {}
    for scene in new_icon.scenes(config, "prompts"):
        right |= {prompt: scene for prompt, claims in known.items() if prompt not in right and holds(claims, scene)}
        if len(right) == len(known):
            break
    blank = Image.new("RGB", (SIZE, SIZE), "white")
    lines = []
    for number, prompt in enumerate(known):
        image = Image.fromarray(render(right[prompt])) if number % 2 else blank
        image.save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "prompt": prompt}))
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, json.dumps({"file": "x.png", "prompt": "another"})]))
    new_icon.main([f"output_dir={folder}", f"score={tmp_path}", f"size={SIZE}"])
    assert capsys.readouterr().out == "8 images: scenes right 50%, ladders right 50%\n"
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no image of the prompts"):
        new_icon.main([f"output_dir={folder}", f"score={tmp_path}", f"size={SIZE}"])
