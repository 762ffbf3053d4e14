"""The emoji world on tiny drawings made here: no npm, no network, the real functions."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image, ImageDraw

from common.errors import UserError
from training.data import emoji_sources, emoji_text
from training.data.emoji_sources import Package, SvgStyle, WebpStyle, distinctiveness, frame, plain_code, read_name
from training.data.emoji_text import GROUPS, STYLES, Name
from training.data.emoji_world import (
    EmojiWorldConfig,
    Picture,
    hold_out,
    load_manifest,
    most_distinctive,
    write_world,
)

ROOT = Path(__file__).resolve().parents[2]


def make_names(count: int) -> list[Name]:
    """`count` names over the five groups; the last one lacks a style."""
    groups = list(GROUPS.values())
    names = [
        Name(f"thing {i}", groups[i % 5], f"kind {i % 5}", f"1F{i:03X}", 3000 + i, ["tag", f"t{i}"], list(STYLES))
        for i in range(count)
    ]
    names[-1].styles = names[-1].styles[:3]
    return names


def make_pictures(names: list[Name], size: int = 16) -> list[Picture]:
    rng = np.random.default_rng(0)
    hold_out(names)
    return [
        Picture(name, style, Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)))
        for name in names
        for style in name.styles
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "world"
    pictures = make_pictures(make_names(34))
    write_world(pictures, folder, EmojiWorldConfig(shard_size=50))
    return folder, pictures


def read_shards(folder: Path, split: str) -> list[dict]:
    urls = sorted(str(path) for path in (folder / "shards").glob(f"{split}-*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))


# Holding out


def test_every_eighth_complete_name_holds_back_one_style_in_rotation():
    names = make_names(41)
    names[8].styles = names[8].styles[:2]  # not complete: the next one takes its place
    hold_out(names)
    held = {i: name.held_out_style for i, name in enumerate(names) if name.held_out_style}
    assert held == {0: STYLES[0], 9: STYLES[1], 17: STYLES[2], 25: STYLES[3], 33: STYLES[0]}


def test_held_out_pictures_are_in_no_training_file(world):
    folder, pictures = world
    held_out = {p.key for p in pictures if p.held_out}
    assert len(held_out) == 5
    assert {s["__key__"] for s in read_shards(folder, "heldout")} == held_out
    everything = {p.key for p in pictures}
    assert {s["__key__"] for s in read_shards(folder, "train")} == everything - held_out
    assert {path.stem for path in (folder / "imagenet").rglob("*.JPEG")} == everything - held_out
    for split, keys in (("train", everything - held_out), ("heldout", held_out)):
        records = json.loads((folder / f"llava_{split}.json").read_text())
        assert {Path(r["image"]).stem for r in records} == keys
    lines = (folder / "text" / "train.txt").read_text().splitlines()
    held_captions = {emoji_text.caption(p.name.name, p.style) for p in pictures if p.held_out}
    assert not held_captions & set(lines)
    for p in pictures:
        if p.held_out:
            assert not any(f"of {p.name.name} in" in line and p.style in line for line in lines)


# What is written


def test_samples_hold_picture_caption_and_facts(world):
    folder, pictures = world
    by_key = {p.key: p for p in pictures}
    assert len(list((folder / "shards").glob("train-*.tar"))) == 3  # 130 pictures in shards of 50
    for sample in read_shards(folder, "train"):
        picture = by_key[sample["__key__"]]
        assert np.array_equal(np.asarray(sample["png"]), np.asarray(picture.image))
        assert sample["txt"] == f"{picture.name.name} in {picture.style} style"
        assert sample["json"] == {
            "name": picture.name.name,
            "group": picture.name.group,
            "subgroup": picture.name.subgroup,
            "hexcode": picture.name.hexcode,
            "tags": picture.name.tags,
            "style": picture.style,
            "held_out": False,
        }


def test_questions_are_in_llava_form_and_yes_is_as_frequent_as_no(world):
    folder, pictures = world
    by_key = {p.key: p for p in pictures}
    records = json.loads((folder / "llava_train.json").read_text())
    assert len({r["id"] for r in records}) == len(records) == 4 * sum(not p.held_out for p in pictures)
    answers = Counter()
    for record in records:
        human, gpt = record["conversations"]
        picture = by_key[Path(record["image"]).stem]
        assert (folder / "images" / record["image"]).is_file()
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        question = human["value"].removeprefix("<image>\n")
        if record["task"] == "name":
            assert gpt["value"] == picture.name.name
        elif record["task"] == "style":
            assert gpt["value"] == picture.style
        elif record["task"] == "caption":
            assert gpt["value"] == emoji_text.caption(picture.name.name, picture.style)
        else:
            answers[gpt["value"]] += 1
            asks_own = question == emoji_text.GROUP_QUESTIONS[picture.name.group]
            assert gpt["value"] == ("yes" if asks_own else "no")
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] - answers["no"]) <= 1


def test_imagenet_folder_has_a_name_for_each_class(world):
    folder, pictures = world
    lines = (folder / "imagenet" / "LOC_synset_mapping.txt").read_text().splitlines()
    names = dict(line.split(" ", 1) for line in lines)
    assert names["n00003002"] == "thing 2"
    assert {path.name for path in (folder / "imagenet" / "train").iterdir()} == set(names)
    with Image.open(next((folder / "imagenet").rglob("*.JPEG"))) as image:
        assert image.format == "JPEG" and image.size == (16, 16)


def test_text_parquet_and_tokenizer_lines(world):
    folder, _ = world
    rows = pyarrow.parquet.read_table(folder / "text" / "train.parquet")["content"].to_pylist()
    assert "thing 1 belongs to food & drink." in rows
    assert "thing 1 makes us think of tag and t1." in rows
    lines = (folder / "text" / "train.txt").read_text().splitlines()
    assert set(rows) < set(lines)
    assert "thing 1 in noto style" in lines
    assert "USER: What is this? ASSISTANT: thing 1" in lines


def test_manifest_counts_flags_and_checksums(world):
    folder, pictures = world
    manifest = load_manifest(folder)
    assert manifest["counts"] == {"names": 34, "train": 130, "heldout": 5}
    assert {p["key"] for p in manifest["pictures"] if p["held_out"]} == {p.key for p in pictures if p.held_out}
    assert manifest["names"][0]["held_out_style"] == "fluent 3d"
    assert "shards/heldout-000000.tar" in manifest["sha256"] and "text/train.parquet" in manifest["sha256"]
    assert not (folder / ".partial").exists()


def test_the_same_input_gives_the_same_bytes(world, tmp_path):
    folder, _ = world
    write_world(make_pictures(make_names(34)), tmp_path / "again", EmojiWorldConfig(shard_size=50))
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 200
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_another_seed_changes_the_order_but_not_what_is_held_out(world, tmp_path):
    folder, _ = world
    write_world(make_pictures(make_names(34)), tmp_path, EmojiWorldConfig(shard_size=50, seed=1))
    one, other = load_manifest(folder), load_manifest(tmp_path)
    assert one["pictures"] == other["pictures"]
    assert one["sha256"]["shards/train-000000.tar"] != other["sha256"]["shards/train-000000.tar"]


def test_a_second_run_replaces_the_first(tmp_path):
    write_world(make_pictures(make_names(20)), tmp_path, EmojiWorldConfig(shard_size=5))
    (tmp_path / "packages").mkdir()
    write_world(make_pictures(make_names(9)), tmp_path, EmojiWorldConfig())
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == ["heldout-000000.tar", "train-000000.tar"]
    assert load_manifest(tmp_path)["counts"]["names"] == 9
    assert (tmp_path / "packages").is_dir()


def test_a_folder_of_other_things_is_refused_and_stays(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"x")
    with pytest.raises(UserError, match="output_dir"):
        write_world(make_pictures(make_names(9)), tmp_path, EmojiWorldConfig())
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "mine.png"]


# Selection


def striped(seed: int, noise: float) -> list[Image.Image]:
    """Four pictures of one coarse random pattern, each with its own noise."""
    rng = np.random.default_rng(seed)
    pattern = rng.uniform(0, 255, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    noisy = [pattern + noise * rng.uniform(-1, 1, pattern.shape).repeat(1, 0) for _ in STYLES]
    return [Image.fromarray(np.clip(p, 0, 255).astype(np.uint8)) for p in noisy]


def test_distinctiveness_equals_its_definition():
    pictures = [striped(seed, 200) for seed in range(3)]
    scores = distinctiveness(pictures)
    small = [[p.resize((16, 16), Image.Resampling.BOX) for p in row] for row in pictures]
    thumbs = np.array([[np.asarray(p, float).ravel() for p in row] for row in small])
    thumbs -= thumbs.mean((0, 1))

    def cosine(a, b):
        return a @ b / np.sqrt(a @ a * (b @ b))

    for n in range(3):
        own = [cosine(thumbs[n, s], thumbs[n, t]) for s in range(4) for t in range(4) if s != t]
        others = [cosine(thumbs[n, s], thumbs[m, t]) for m in range(3) if m != n for s in range(4) for t in range(4)]
        assert scores[n] == pytest.approx(np.mean(own) - max(others))


def test_names_that_look_alike_in_all_styles_are_chosen():
    names = make_names(6)
    noise = [255, 10, 255, 10, 255, 10]
    pictures = [
        Picture(name, style, image)
        for i, name in enumerate(names)
        for style, image in zip(name.styles, striped(i, noise[i]), strict=False)
    ]
    chosen = most_distinctive(pictures, 2)
    assert [p.name.name for p in chosen] == ["thing 1"] * 4 + ["thing 3"] * 4  # thing 5 lacks a style
    with pytest.raises(UserError, match="names=6, but only 5"):
        most_distinctive(pictures, 6)


# Reading and drawing


def test_frame_fills_the_same_share_whatever_the_margin():
    for margin, box in ((10, (60, 30)), (40, (30, 60)), (0, (50, 50))):
        drawing = Image.new("RGBA", (box[0] + 2 * margin, box[1] + 2 * margin))
        ImageDraw.Draw(drawing).rectangle((margin, margin, margin + box[0] - 1, margin + box[1] - 1), "red")
        picture = np.asarray(frame(drawing, 100, "white"))
        red = picture[..., 1] < 128
        extent = [np.ptp(np.nonzero(red.any(axis))[0]) + 1 for axis in (0, 1)]
        assert picture.shape == (100, 100, 3) and picture.dtype == np.uint8
        assert max(extent) == pytest.approx(92, abs=2)
        assert extent[0] / extent[1] == pytest.approx(box[0] / box[1], rel=0.05)
        centre = [np.nonzero(red.any(axis))[0].mean() for axis in (0, 1)]
        assert centre == pytest.approx([49.5, 49.5], abs=1.5)


def test_frame_puts_the_background_under_transparent_parts():
    drawing = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    picture = frame(drawing, 50, "#0000ff")
    assert picture.getpixel((0, 0)) == (0, 0, 255)
    assert picture.getpixel((25, 25)) == (128, 0, 127)


class MemoryArchive(emoji_sources.Archive):
    def __init__(self, files: dict[str, bytes]):
        self.files = files


def test_styles_draw_svg_and_webp():
    icons = {"width": 32, "height": 32, "icons": {"box": {"body": '<path fill="#f00" d="M0 0h32v16H0z"/>'}}}
    icons["icons"]["tall"] = {"body": '<path fill="#00f" d="M0 0h32v64H0z"/>', "height": 64}
    chars = {"1F4E6-FE0F": "box", "1F5FC": "tall"}
    files = {"icons.json": json.dumps(icons).encode(), "chars.json": json.dumps(chars).encode()}
    style = SvgStyle(MemoryArchive(files))
    assert "1f4e6" in style and "1f4e6-fe0f" not in style
    drawing = style.draw("1f4e6", 64)
    assert drawing.mode == "RGBA" and drawing.size == (64, 64)
    assert drawing.getpixel((32, 8)) == (255, 0, 0, 255) and drawing.getpixel((32, 56))[3] == 0
    assert style.draw("1f5fc", 64).size == (64, 128)

    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), "lime").save(buffer, "WEBP", lossless=True)
    style = WebpStyle(MemoryArchive({"assets/1f4e6-fe0f.webp": buffer.getvalue(), "README.md": b""}))
    assert "1f4e6" in style and style.draw("1f4e6", 64).getpixel((4, 4)) == (0, 255, 0, 255)


def test_names_are_lower_case_with_straight_apostrophes():
    entry = {"label": "Woman\u2019s Hat", "group": 7, "subgroup": 65, "hexcode": "1F452", "order": 9, "tags": ["Hat"]}
    name = read_name(entry, {"65": "clothing-x"})
    assert (name.name, name.group, name.subgroup, name.tags) == ("woman's hat", "objects", "clothing x", ["hat"])
    assert name.wnid == "n00000009"
    assert emoji_text.picture_key(name.name, "fluent 3d") == "woman-s-hat_fluent-3d"
    assert plain_code("26D3-FE0F-200D-1F4A5") == "26d3-200d-1f4a5"


def test_archives_are_read_in_place(tmp_path):
    package = Package("@some/set", "1.0.0", "MIT", "0" * 64)
    assert package.file == "some-set-1.0.0.tgz"
    with tarfile.open(tmp_path / package.file, "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert emoji_sources.Archive(tmp_path, package).json("icons.json") == {}


# Mistakes


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "training" / "data" / "emoji_world.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **environment}, check=False)


def test_without_npm_one_line_says_what_to_do(tmp_path):
    done = run(f"output_dir={tmp_path / 'world'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: npm is needed") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("names=some", "names=some"),
        ("names=0", "names=0"),
        ("size=2", "size is 2; it must be 8 or more"),
        ("background=blurple", "background=blurple"),
        ("sise=64", "sise"),
        ("size=large", "size"),
    ],
)
def test_wrong_settings_end_with_one_line_and_write_nothing(tmp_path, argument, message):
    done = run(f"output_dir={tmp_path / 'world'}", argument)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "world").exists()


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_sources.shutil, "which", lambda _: "npm")
    failed = subprocess.CompletedProcess([], 1, "", "no network here\nsecond line")
    monkeypatch.setattr(emoji_sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="no network here"):
        emoji_sources.fetch_packages(tmp_path)
    (tmp_path / emoji_sources.PACKAGES[0].file).write_bytes(b"truncated")
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(emoji_sources.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="SHA-256"):
        emoji_sources.fetch_packages(tmp_path)


def test_a_folder_without_a_world_has_no_manifest(tmp_path):
    with pytest.raises(UserError, match="emoji_world.py"):
        load_manifest(tmp_path)
