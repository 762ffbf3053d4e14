"""Where the items of the three flows come from, and what is done to them (SPEC §15)."""

import io
import random
import re
import time
from itertools import islice

import pytest
import torch
from PIL import Image

from common.errors import UserError
from models.images import preprocess
from tests.training.tiny import CAPTIONS, config_of, image_bytes, picture, sample, write_shard, write_texts, write_world
from training.data.flows import (
    CAPTION_INSTRUCTIONS,
    build_flows,
    collate_images,
    expand_paths,
    image_text_item,
    jittered,
    read_shards,
    read_texts,
    text_item,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "tiny")


def item_of(raw: dict, seed: int = 0, **options) -> dict | None:
    settings = {"resolution": 32, "flip": False, "jitter": 0.0, "add_caption_prompt": False} | options
    return image_text_item(raw, random.Random(seed), **settings)


# ---- paths ----


def test_paths_are_brace_lists_globs_and_lists_of_them(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}-{i:03d}.tar" for name in ("a", "b") for i in range(3)]
    for file in files:
        file.touch()
    a, b = map(str, files[:3]), map(str, files[3:])
    assert expand_paths("x", str(tmp_path / "{a,b}-{000..002}.tar")) == list(map(str, files))
    assert expand_paths("x", str(tmp_path / "b-*.tar")) == list(b)
    assert expand_paths("x", [str(tmp_path / "a-00?.tar"), str(files[3])]) == [*a, str(files[3])]
    monkeypatch.chdir(tmp_path)
    assert expand_paths("x", "a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]


def test_relative_paths_are_found_in_the_repository_from_elsewhere(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert expand_paths("x", "configs/showo_demo.yaml") == [str(repository / "configs/showo_demo.yaml")]
    assert str(repository / "configs/showo_demo.yaml") in expand_paths("x", "configs/showo_demo*.yaml")


def test_missing_files_are_counted_and_named(tmp_path):
    (tmp_path / "a-0.tar").touch()
    with pytest.raises(UserError, match=r"some\.setting: 2 of 3 files do not exist, first .*a-1\.tar"):
        expand_paths("some.setting", str(tmp_path / "a-{0..2}.tar"))
    with pytest.raises(UserError, match=r"some\.setting is not set"):
        expand_paths("some.setting", None)


def test_all_missing_sources_are_listed_at_once(world):
    keys = [f"dataset.params.train_{flow}_shards_path_or_url" for flow in ("t2i", "lm", "mmu")]
    paths = dict(zip(keys, ("/nowhere/a-{000..003}.tar", None, "/nowhere/c.tar"), strict=True))
    with pytest.raises(UserError) as error:
        build_flows(config_of(world, overrides=paths))
    assert all(key in str(error.value) for key in keys)
    assert "4 of 4" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flow_of_batch_size_0_needs_no_data(world):
    off = {"training.batch_size_mmu": 0, "dataset.params.train_mmu_shards_path_or_url": "/nowhere.tar"}
    assert list(build_flows(config_of(world, overrides=off))) == ["t2i", "lm"]
    all_off = {f"training.batch_size_{flow}": 0 for flow in ("t2i", "lm", "mmu")}
    with pytest.raises(UserError, match="all 0"):
        build_flows(config_of(world, overrides=all_off))


@pytest.mark.parametrize(
    ("key", "kind"), [("gen_type", "imagenet1k"), ("gen_type", "t2i_parquet"), ("und_type", "llava_tuning")]
)
def test_kinds_that_are_not_there_yet_are_refused_by_name(world, key, kind):
    other = {f"dataset.{key}": kind, "dataset.params.train_lm_shards_path_or_url": "/nowhere.parquet"}
    with pytest.raises(UserError, match=f"dataset.{key} is '{kind}'.*trains from") as error:
        build_flows(config_of(world, overrides=other))
    assert "/nowhere.parquet" in str(error.value), "all problems in one error"


# ---- language ----


def test_newlines_are_removed_and_long_texts_cut_to_a_window():
    assert text_item("one\ntwo\n three", random.Random(0)) == "onetwo three"
    assert text_item("x" * 8000, random.Random(0)) == "x" * 8000
    long = "".join(f"{i:06d}" for i in range(3000))
    windows = {text_item(long, random.Random(seed)) for seed in range(20)}
    assert len(windows) > 10
    assert all(len(window) == 8000 and window in long for window in windows)
    assert len(text_item("a\n" * 7000, random.Random(0))) == 7000, "cut after the newlines have gone"


def test_empty_texts_are_passed_over():
    assert [text_item(text, random.Random(0)) for text in ("", "\n\n", None)] == [None] * 3


def test_texts_come_once_per_round_through_all_files_in_changing_order(tmp_path):
    texts = [f"text {i}" for i in range(23)]
    paths = [write_texts(tmp_path / "a.parquet", texts[:12]), write_texts(tmp_path / "b.parquet", texts[12:])]
    read = list(islice(read_texts(list(map(str, paths)), seed=3), 46))
    assert sorted(read[:23]) == sorted(read[23:]) == sorted(texts)
    assert read[:23] != read[23:] and read[:23] != texts
    assert read == list(islice(read_texts(list(map(str, paths)), seed=3), 46))
    assert read != list(islice(read_texts(list(map(str, paths)), seed=4), 46))


def test_a_parquet_without_the_column_is_named(tmp_path):
    path = write_texts(tmp_path / "a.parquet", ["x"], column="body")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'content'; its columns are body"):
        next(read_texts([str(path)], seed=0))


# ---- pictures ----


def test_an_item_is_the_preprocessed_picture_and_its_text():
    raw = sample(CAPTIONS[0])
    item = item_of(raw | {"txt": "  ein Bär \n".encode()}, resolution=16)
    assert item["text"] == "ein Bär"
    assert torch.equal(item["image"], preprocess(picture(CAPTIONS[0]), 16))
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32


@pytest.mark.parametrize("image_key", ["jpg", "png", "jpeg", "webp"])
@pytest.mark.parametrize("text_key", ["text", "txt", "caption"])
def test_all_published_suffixes_are_read(image_key, text_key):
    form = "JPEG" if image_key in ("jpg", "jpeg") else image_key.upper()
    item = item_of({image_key: image_bytes(picture(CAPTIONS[1]), form), text_key: b"words"})
    assert item["text"] == "words" and item["image"].shape == (3, 32, 32)


def test_unreadable_samples_are_none():
    good = sample(CAPTIONS[0])
    bad = [
        good | {"png": good["png"][:60]},
        good | {"png": b""},
        good | {"png": b"no picture at all"},
        good | {"txt": b"\xff\xfe\xfa"},
        {"png": good["png"]},
        {"txt": good["txt"]},
    ]
    assert [item_of(raw) for raw in bad] == [None] * len(bad)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_raise(form):
    whole = image_bytes(picture(CAPTIONS[0]), form)
    rng = random.Random(0)
    unreadable = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        unreadable += item_of({"png": bytes(data[: rng.randrange(1, len(data) + 1)]), "txt": b"x"}) is None
    assert unreadable > 50


def test_captions_get_one_of_many_instructions():
    texts = [item_of(sample(CAPTIONS[0]), seed, add_caption_prompt=True)["text"] for seed in range(60)]
    parts = [re.fullmatch(rf"USER: \n(.+) ASSISTANT: {CAPTIONS[0]}", text) for text in texts]
    assert all(parts)
    instructions = {part[1] for part in parts}
    assert instructions <= set(CAPTION_INSTRUCTIONS) and len(instructions) > 5
    assert item_of(sample(CAPTIONS[0]))["text"] == CAPTIONS[0]


def test_flipping_mirrors_half_of_the_pictures():
    plain = item_of(sample(CAPTIONS[0]))["image"]
    seen = [item_of(sample(CAPTIONS[0]), seed, flip=True)["image"] for seed in range(60)]
    flipped = [torch.equal(image, plain.flip(-1)) for image in seen]
    assert all(flip or torch.equal(image, plain) for image, flip in zip(seen, flipped, strict=True))
    assert 15 < sum(flipped) < 45


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 90)])
def test_jitter_keeps_size_and_background(background):
    image = Image.new("RGB", (40, 24), background)
    image.paste((0, 0, 0), (10, 6, 30, 18))
    results = [jittered(image, 0.12, random.Random(seed)) for seed in range(30)]
    for result in results:
        assert result.size == (40, 24)
        rim = [result.getpixel(at) for at in ((0, 0), (39, 0), (0, 23), (39, 23))]
        assert rim == [background] * 4
        assert result.getpixel((20, 12)) == (0, 0, 0), "the middle moves by at most an eighth"
    assert len({result.tobytes() for result in results}) > 20
    assert jittered(image, 0.0, random.Random(0)).tobytes() == image.tobytes()


# ---- shards ----


def test_shards_are_drawn_endlessly_in_an_order_of_the_seed(world):
    urls = sorted(map(str, world.glob("train-*.tar")))

    def keys(seed, buffer_size=4):
        return [raw["__key__"] for raw in islice(read_shards(urls, buffer_size, seed), 60)]

    assert keys(1) == keys(1) != keys(2)
    assert len(set(keys(1))) == len(CAPTIONS)
    unmixed = keys(1, buffer_size=0)
    runs = [unmixed[i : i + 6] for i in range(0, 60, 6)]  # six samples in each shard
    assert all(run == sorted(run) for run in runs)
    assert keys(1) != unmixed


def test_a_truncated_or_missing_shard_costs_only_its_own_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # webdataset rests after each warning
    write_shard(tmp_path / "whole.tar", [sample(text) for text in CAPTIONS[:4]])
    data = write_shard(tmp_path / "cut.tar", [sample(text) for text in CAPTIONS[4:8]]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "noise.tar").write_bytes(random.Random(0).randbytes(4096))
    urls = [str(tmp_path / name) for name in ("whole.tar", "cut.tar", "noise.tar")] + [str(tmp_path / "gone.tar")]
    with pytest.warns(UserWarning):
        keys = {raw["__key__"] for raw in islice(read_shards(urls, 0, 5), 40)}
    assert {f"whole-{i:03d}" for i in range(4)} <= keys
    assert 4 < len(keys) < 8, "the whole samples of the cut shard are kept"


# ---- the flows of a run ----


def test_flows_give_batches_of_the_configured_sizes(world):
    flows = build_flows(config_of(world, overrides={"dataset.preprocessing.resolution": 16}))
    assert list(flows) == ["t2i", "lm", "mmu"]
    pixels, texts = collate_images(next(flows["t2i"]))
    assert pixels.shape == (4, 3, 16, 16) and -1 <= pixels.min() < pixels.max() <= 1
    assert set(texts) <= set(CAPTIONS)
    assert all("\n" not in text for text in next(flows["lm"])) and len(next(flows["lm"])) == 1
    answers = [item["text"] for item in next(flows["mmu"])]
    assert len(answers) == 2 and all(text.startswith("USER: \n") for text in answers)


def test_the_instruction_can_be_left_out_and_t2i_never_has_it(world):
    flows = build_flows(config_of(world, overrides={"dataset.params.add_caption_prompt": False}))
    assert {item["text"] for name in ("t2i", "mmu") for item in next(flows[name])} <= set(CAPTIONS)


def test_augmentation_of_the_mmu_flow_leaves_t2i_pictures_alone(world):
    plain = {image_bytes(picture(text)) for text in CAPTIONS}
    plain = {preprocess(Image.open(io.BytesIO(data)).convert("RGB"), 32).numpy().tobytes() for data in plain}
    flows = build_flows(config_of(world, overrides={"dataset.preprocessing.und_jitter": 0.2}))
    t2i = [item["image"].numpy().tobytes() for _ in range(3) for item in next(flows["t2i"])]
    mmu = [item["image"].numpy().tobytes() for _ in range(3) for item in next(flows["mmu"])]
    assert set(t2i) <= plain and not set(mmu) & plain


def test_processes_and_flows_have_data_of_their_own(world):
    def captions(process, name, seed=10086):
        flow = build_flows(config_of(world, overrides={"training.seed": seed}), process=process)[name]
        return [item["text"][-24:] for _ in range(5) for item in next(flow)]

    assert captions(0, "t2i") == captions(0, "t2i")
    assert captions(0, "t2i") != captions(1, "t2i")
    assert captions(0, "t2i") != captions(0, "t2i", seed=1)
    assert captions(0, "t2i")[:10] != captions(0, "mmu")
