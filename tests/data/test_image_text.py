"""Images with texts: pixels, codes, captions with instructions or shortened, and what cannot be used (spec §15)."""

import io
import json
import os
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from models.clip_encoder import image_processor_class
from models.images import ImageOptions, preprocess
from tests.training.tiny import CAPTIONS, image_bytes, picture, sample
from training.data.image_text import (
    CAPTION_INSTRUCTIONS,
    OPENINGS,
    Captions,
    ExternalCaptions,
    ImageTextSample,
    ImageTransform,
    decode_jpeg,
    jittered,
)
from training.data.json_records import JsonTable
from training.data.sources import CUT, ROTATED, Skipped
from training.data.streams import unpack

DATA = image_bytes(picture(CAPTIONS[0]))


def item_of(raw: dict, seed: int = 0, resolution: int = 32, **settings) -> dict:
    """As it comes out of a loader, with its pixels as numbers."""
    images = ImageTransform(resolution, num_codes=16, codebook_size=64, **settings)
    return unpack([ImageTextSample(images, Captions())(raw, random.Random(seed))])[0]


def kind_of(call, *args, **settings) -> str:
    with pytest.raises(Skipped) as problem:
        call(*args, **settings)
    return problem.value.kind


def codes_bytes(codes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(codes))
    return buffer.getvalue()


# ---- pixels ----


def saved(image: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def of_pil(data: bytes) -> torch.Tensor:
    return preprocess(Image.open(io.BytesIO(data)).convert("RGB"), 32)


@pytest.mark.parametrize("size", [(32, 32), (47, 33), (33, 70)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_that_pil_gives_them(size, mode, progressive):
    photo = Image.open("inpainting_validation/coffee.jpg").resize(size).convert(mode)
    for quality, subsampling in ((20, 0), (75, 1), (95, 2)):
        data = saved(photo, quality=quality, subsampling=subsampling, progressive=progressive)
        assert (decode_jpeg(data) is None) == (mode == "CMYK")
        assert torch.equal(item_of({"jpg": data, "txt": b"x"})["image"], of_pil(data)), (quality, subsampling)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:60], lambda data: data + b"more"])
def test_what_is_odd_about_a_jpeg_is_left_to_pil(damage):
    raw = {"jpg": damage(saved(picture(CAPTIONS[0]))), "txt": b"x"}
    try:
        expected = of_pil(raw["jpg"])
    except OSError:
        assert kind_of(item_of, raw) == "unreadable_image"
    else:
        assert torch.equal(item_of(raw)["image"], expected)


SUFFIXES = [("jpg", "text"), ("png", "txt"), ("jpeg", "caption"), ("webp", "txt"), ("image", "text")]


@pytest.mark.parametrize(("image_key", "text_key"), SUFFIXES)
def test_all_published_suffixes_are_read(image_key, text_key):
    form = {"png": "PNG", "webp": "WEBP"}.get(image_key, "JPEG")
    item = item_of({image_key: image_bytes(picture(CAPTIONS[1]), form), text_key: b"words"}, resolution=16)
    assert item["text"] == "words" and item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32


def test_images_are_bytes_files_or_both(tmp_path):
    expected = preprocess(picture(CAPTIONS[0]), 32)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(DATA)
    beside = {"__url__": str(tmp_path / "texts.parquet")}
    for value in (DATA, str(tmp_path / "a/x.png"), {"bytes": DATA, "path": "gone.png"}):
        assert torch.equal(item_of({"image": value, "text": "x"})["image"], expected)
    for value in ("a/x.png", {"bytes": None, "path": "a/x.png"}):
        assert torch.equal(item_of({"image": value, "text": "x"} | beside)["image"], expected)
        assert torch.equal(item_of({"image": value, "text": "x"}, root=str(tmp_path))["image"], expected)


STRIP = image_bytes(Image.new("RGB", (1, 30_000)))  # resized it would take 7680000 x 256


@pytest.mark.parametrize(
    ("members", "kind", "limit"),
    [
        *(({"image": value}, "malformed_item", None) for value in (None, 7, {"bytes": None, "path": None}, {})),
        ({}, "malformed_item", None),
        ({"image": "gone.png"}, "missing_file", None),
        *(({"png": data}, "unreadable_image", None) for data in (DATA[:60], DATA[:-40], b"", b"no image", STRIP)),
        ({"png": DATA}, "unreadable_image", 100),  # PIL's decompression bomb
        ({"png": b"no image", "text": ""}, "empty_text", None),  # the text comes first
    ],
)
def test_unusable_images_are_skipped(members, kind, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit or Image.MAX_IMAGE_PIXELS)
    assert kind_of(item_of, {"text": "x"} | members, resolution=256) == kind


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(form):
    whole, rng, kinds = image_bytes(picture(CAPTIONS[0]), form), random.Random(0), []
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            item_of({"png": bytes(data[: rng.randrange(1, len(data) + 1)]), "txt": b"x"})
        except Skipped as skipped:
            kinds.append(skipped.kind)
    assert len(kinds) > 50 and set(kinds) == {"unreadable_image"}


def test_the_members_of_an_unusable_sample_are_named():
    raw = {"__key__": "v1.0/s", "__url__": "a.tar", "input.png": DATA, "outputs.txt": b"x"}
    for members, message in (
        (raw, "v1.0/s has no text; its members are input.png, outputs.txt; read are text, txt, caption"),
        (
            raw | {"txt": b"x"},
            "v1.0/s has no image; its members are input.png, outputs.txt, txt; read are jpg, png, jpeg,",
        ),
    ):
        with pytest.raises(Skipped, match="malformed_item") as problem:
            item_of(members)
        assert message in problem.value.detail


def grey(mode: str, values: list) -> bytes:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image_bytes(image, "TIFF" if mode == "F" else "PNG")


@pytest.mark.parametrize(
    "data", [grey("I;16", [257 * x for x in range(0, 256, 5)]), grey("F", [x / 255 for x in range(0, 256, 5)])]
)
def test_more_than_eight_bits_are_scaled(data):
    images = ImageTransform(1, 0, 0)
    assert images._opened(data, "a").tobytes() == bytes(x for x in range(0, 256, 5) for _ in range(3))


def test_rotation_is_noted_or_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 32, 16))  # above; to the right of what viewers show
    for form in ("JPEG", "PNG", "WEBP"):
        data = io.BytesIO()
        image.save(data, form, exif=exif)
        for options, reddest in ((ImageOptions(), (0, 0)), (ImageOptions(exif="apply"), (0, 31))):
            sample = ImageTransform(32, 0, 0, options=options).of({"image": data.getvalue()}, random.Random(0))
            assert sample["image"][reddest][0] > 200 > 100 > sample["image"][31, 0][0]
            assert sample.get("notes") == ((ROTATED,) if options.exif == "ignore" else None)
    assert "notes" not in ImageTransform(32, 0, 0).of({"image": saved(image)}, random.Random(0))


def test_files_that_are_none_are_skipped_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("/dev/zero", str(tmp_path / "fifo.png"), str(tmp_path), "a\0b", "x" * 5000):
        assert kind_of(item_of, {"image": name, "text": "x"}) in ("unreadable_image", "missing_file")
    external = ExternalCaptions(str(tmp_path))
    os.mkfifo(tmp_path / "SA1B_1.txt")
    assert kind_of(Captions(external), {"__key__": "SA1B_1"}, random.Random(0)) == "malformed_item"


def test_texts_that_will_be_cut_are_noted():
    class Words:
        def __call__(self, text, **_):
            return {"input_ids": text.split()}

    images = ImageTransform(32, 0, 0)
    for words, notes in ((6, None), (7, (CUT,))):
        raw = {"__key__": "a", "png": DATA, "txt": b"word " * words}
        assert ImageTextSample(images, Captions(), Words(), 8)(raw, random.Random(0)).get("notes") == notes


def test_flipping_mirrors_half_of_the_images():
    plain = item_of(sample(CAPTIONS[0]))["image"]
    seen = [item_of(sample(CAPTIONS[0]), seed, flip=True)["image"] for seed in range(60)]
    flipped = sum(torch.equal(image, plain.flip(-1)) for image in seen)
    assert 15 < flipped < 45 and flipped + sum(torch.equal(image, plain) for image in seen) == 60


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 90)])
def test_jitter_keeps_size_and_background(background):
    image = Image.new("RGB", (40, 24), background)
    image.paste((0, 0, 0), (10, 6, 30, 18))
    results = [jittered(image, 0.12, random.Random(seed)) for seed in range(30)]
    for result in results:
        rim = [result.getpixel(at) for at in ((0, 0), (39, 0), (0, 23), (39, 23))]
        assert result.size == (40, 24) and rim == [background] * 4
        assert result.getpixel((20, 12)) == (0, 0, 0), "the middle moves by at most an eighth"
    assert len({result.tobytes() for result in results}) > 20
    assert jittered(image, 0.0, random.Random(0)).tobytes() == image.tobytes()


def test_the_clip_branch_gets_what_its_processor_makes():
    processor = image_processor_class()(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    item = item_of(sample(CAPTIONS[0]), processor=processor)
    expected = processor(picture(CAPTIONS[0]), return_tensors="pt")["pixel_values"][0]
    assert item.keys() == {"pixel_values", "text", "key"} and torch.equal(item["pixel_values"], expected)


# ---- codes ----


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint8])
def test_codes_come_in_place_of_the_image(dtype):
    codes = np.arange(16, dtype=dtype) * 4
    item = item_of({"codes.npy": codes_bytes(codes), "png": b"unread", "txt": b"words"})
    assert item.keys() == {"codes", "text", "key"}
    assert item["codes"].dtype == torch.int64 and item["codes"].tolist() == codes.tolist()
    assert item_of({"image": codes.tolist(), "text": "words"})["codes"].tolist() == codes.tolist(), "of a parquet file"


WRONG_CODES = [np.arange(15), np.arange(16).reshape(4, 4), np.arange(16) + 49, np.arange(16) - 1, np.arange(16.0)]
WRONG_CODES += [np.array([{}] * 16, dtype=object)]
ARCHIVE = io.BytesIO()
np.savez(ARCHIVE, codes=np.arange(16))
HUGE = codes_bytes(np.arange(16)).replace(b"(16,), }", b"(10**9,)")


@pytest.mark.parametrize(
    "member",
    [{"codes.npy": codes_bytes(codes)} for codes in WRONG_CODES]
    + [{"codes.npy": data} for data in (codes_bytes(np.arange(16))[:-5], b"", b"no numbers", ARCHIVE.getvalue(), HUGE)]
    + [{"image": codes} for codes in ([[1, 2], [3]], [], [None] * 16, ["a"] * 16)],
)
def test_codes_of_another_length_or_range_are_skipped(member):
    assert kind_of(item_of, {"txt": b"x"} | member) == "bad_codes"


@pytest.mark.parametrize("setting", [{"flip": True}, {"jitter": 0.1}, {"processor": object()}])
def test_codes_cannot_be_mirrored_moved_or_shown_to_clip(setting):
    raw = {"__key__": "a", "codes.npy": codes_bytes(np.arange(16)), "txt": b"x"}
    with pytest.raises(UserError, match="a holds codes in place of an image; .*give (it )?the shards with the images"):
        item_of(raw, **setting)
    if "processor" not in setting:
        assert "image" in item_of(raw | {"png": DATA}, **setting), "the image beside them serves"


# ---- texts ----

LONG = "The image features a red kite. In this image, it flies over 3.5 km of sea! Two people watch."


@pytest.fixture
def external(tmp_path):
    files = {
        "sa1b/sa_1.txt": LONG + "\nanother line",
        "laion/00012/x/000120007.caption": "laion's words",
        "cc12m/cc12m-0003/42.caption": "cc12m's words",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "sa1b/sa_3.txt").write_bytes(b"\xff")
    (tmp_path / "journeydb.json").write_text(json.dumps({"db/1": ["first", "second"], "db/2": "In this image, a dog."}))
    folders = (str(tmp_path / name) for name in ("sa1b", "laion", "cc12m"))
    return ExternalCaptions(*folders, JsonTable(str(tmp_path / "journeydb.json")))


def raw(key: str, url: str = "/data/other-0001.tar") -> dict:
    return {"__key__": key, "__url__": url, "txt": b"its own words"}


def texts(captions: Captions, sample: dict, count: int = 60) -> set[str]:
    return {captions(sample, random.Random(seed)) for seed in range(count)}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": "  ein Bär \n".encode()}, {"ein Bär"}),
        *(({"txt": "ein Bär".encode(name)}, {"ein Bär"}) for name in ("utf-8-sig", "utf-16", "utf-32")),
        ({"text": ["\ufeffone\ufeff"]}, {"one"}),
        ({"caption": b"c", "text": b"t", "txt": b"x"}, {"t"}),
        ({"text": ["one", "two"]}, {"one", "two"}),
        ({"txt": LONG.encode()}, {LONG}),  # only captions from elsewhere are shortened
    ],
)
def test_a_sample_has_one_text_without_the_blanks_around_it(members, expected):
    assert texts(Captions(shorten=True), {"__key__": "a"} | members) == expected


@pytest.mark.parametrize(
    ("members", "kind"),
    [({}, "malformed_item"), *(({"text": text}, "empty_text") for text in (None, [], b"", b" \n "))]
    + [({"text": text}, "malformed_item") for text in (b"\xff\xfe\xfa", 3.5, "half of \ud83d")],
)
def test_what_is_no_text_is_skipped(members, kind):
    assert kind_of(Captions(), {"__key__": "a", **members}, random.Random(0)) == kind


@pytest.mark.parametrize(
    ("key", "expected"), [("a", "its own words"), ("SA1B/sa_1", LONG), ("db/2", "In this image, a dog.")]
)
def test_an_instruction_precedes_any_whole_caption(external, key, expected):
    assert len(set(CAPTION_INSTRUCTIONS)) == 34
    found = texts(Captions(external, instructions=True), raw(key), 200)
    parts = [re.fullmatch(r"USER: \n(.+?[.?]) ASSISTANT: (.+)", text) for text in found]
    assert {part[1] for part in parts} <= set(CAPTION_INSTRUCTIONS) and len(found) > 20
    assert {part[2] for part in parts} == {expected}


@pytest.mark.parametrize(
    ("key", "url", "expected"),
    [
        ("SA1B/sa_1", "/laion/00012.tar", {LONG}),  # the first line, by the first rule that matches
        ("x/000120007", "/laion/00012.tar", {"laion's words"}),
        ("y/42", "/data/cc12m-0003.tar.gz", {"cc12m's words"}),
        ("db/1", "/data/other-0001.tar", {"first", "second"}),
        ("db/9", "/data/other-0001.tar", {"its own words"}),
    ],
)
def test_captions_from_elsewhere_replace_the_own_ones(external, key, url, expected):
    assert texts(Captions(external), raw(key, url)) == expected
    without_paths = Captions(ExternalCaptions(external.folder))
    assert texts(without_paths, raw(key, url)) == (expected if "SA1B" in key else {"its own words"})


@pytest.mark.parametrize(("key", "kind"), [("SA1B/sa_2", "empty_text"), ("SA1B/sa_3", "malformed_item")])
def test_a_missing_or_unreadable_caption_is_skipped(external, key, kind):
    assert kind_of(Captions(external), raw(key), random.Random(0)) == kind


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_from_elsewhere_have_no_mark(tmp_path, encoding):
    (tmp_path / "SA1B_1.txt").write_bytes("ä street.\r\nmore".encode(encoding))
    assert Captions(ExternalCaptions(str(tmp_path)))({"__key__": "SA1B_1"}, random.Random(0)) == "ä street."


def test_for_generation_half_are_the_first_sentence_without_openings(external):
    found = [Captions(external, shorten=True)(raw("SA1B/sa_1"), random.Random(seed)) for seed in range(400)]
    whole = "a red kite. it flies over 3.5 km of sea! Two people watch."
    assert set(found) == {"a red kite", whole} and 150 < found.count(whole) < 250
    assert texts(Captions(external, shorten=True), raw("db/2")) == {"In this image, a dog."}, "JourneyDB's stay"
    assert len(set(OPENINGS)) == 15
    shadowed = [b for n, a in enumerate(OPENINGS) for b in OPENINGS[n + 1 :] if b.startswith(a)]
    assert not shadowed, "the rest of a longer opening must not be left behind"
