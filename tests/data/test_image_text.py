"""Images with texts: pixels, codes, and what cannot be used."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from models.clip_encoder import image_processor_class
from models.images import preprocess
from tests.training.tiny import CAPTIONS, image_bytes, picture, sample
from training.data.captions import Captions
from training.data.image_text import ImageTextSample, ImageTransform, decode_jpeg, jittered
from training.data.skipping import SkipSample
from training.data.streams import unpack


def pictures(resolution: int = 32, **settings) -> ImageTransform:
    return ImageTransform(resolution, num_codes=16, codebook_size=64, **settings)


def item_of(raw: dict, seed: int = 0, captions=None, **settings) -> dict:
    """As it comes out of a loader, with its pixels as numbers."""
    return unpack([ImageTextSample(pictures(**settings), captions or Captions())(raw, random.Random(seed))])[0]


def kind_of(raw: dict, **settings) -> str:
    with pytest.raises(SkipSample) as problem:
        item_of(raw, **settings)
    return problem.value.kind


def codes_bytes(codes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(codes))
    return buffer.getvalue()


# ---- pixels ----


def test_an_item_is_the_preprocessed_picture_and_its_text():
    item = item_of(sample(CAPTIONS[0]), resolution=16)
    assert item["text"] == CAPTIONS[0]
    assert torch.equal(item["image"], preprocess(picture(CAPTIONS[0]), 16))
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32


def saved(image: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(32, 32), (47, 33), (33, 70)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_that_pil_gives_them(size, mode, progressive):
    photo = Image.open("inpainting_validation/coffee.jpg").resize(size).convert(mode)
    kinds = [(quality, subsampling) for quality in (20, 75, 95) for subsampling in (0, 1, 2)]
    for quality, subsampling in kinds:
        data = saved(photo, quality=quality, subsampling=subsampling, progressive=progressive)
        assert (decode_jpeg(data) is None) == (mode == "CMYK")
        expected = preprocess(Image.open(io.BytesIO(data)).convert("RGB"), 32)
        assert torch.equal(item_of({"jpg": data, "txt": b"x"})["image"], expected), (quality, subsampling)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:60], lambda data: data + b"more"])
def test_what_is_odd_about_a_jpeg_is_left_to_pil(damage):
    data = damage(saved(picture(CAPTIONS[0])))
    try:
        expected = preprocess(Image.open(io.BytesIO(data)).convert("RGB"), 32)
    except OSError:
        assert kind_of({"jpg": data, "txt": b"x"}) == "unreadable_image"
    else:
        assert torch.equal(item_of({"jpg": data, "txt": b"x"})["image"], expected)


@pytest.mark.parametrize("image_key", ["jpg", "png", "jpeg", "webp"])
@pytest.mark.parametrize("text_key", ["text", "txt", "caption"])
def test_all_published_suffixes_are_read(image_key, text_key):
    form = "JPEG" if image_key in ("jpg", "jpeg") else image_key.upper()
    item = item_of({image_key: image_bytes(picture(CAPTIONS[1]), form), text_key: b"words"})
    assert item["text"] == "words" and item["image"].shape == (3, 32, 32)


def test_pictures_are_bytes_files_or_both(tmp_path):
    expected = item_of(sample(CAPTIONS[0]))["image"]
    data = image_bytes(picture(CAPTIONS[0]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(data)
    beside = {"__url__": str(tmp_path / "texts.parquet")}
    for value in (data, str(tmp_path / "a/x.png"), {"bytes": data, "path": "gone.png"}):
        assert torch.equal(item_of({"image": value, "text": "x"})["image"], expected)
    for value in ("a/x.png", {"bytes": None, "path": "a/x.png"}):
        assert torch.equal(item_of({"image": value, "text": "x"} | beside)["image"], expected)
        assert torch.equal(item_of({"image": value, "text": "x"}, root=str(tmp_path))["image"], expected)
    assert kind_of({"image": "gone.png", "text": "x"} | beside) == "missing_file"


@pytest.mark.parametrize("value", [None, 7, {"bytes": None, "path": None}, {}])
def test_no_picture_is_a_malformed_item(value):
    assert kind_of({"image": value, "text": "x"}) == "malformed_item"
    assert kind_of({"text": "x"}) == "malformed_item"


def test_unreadable_pictures_are_skipped(monkeypatch):
    good = sample(CAPTIONS[0])
    for data in (good["png"][:60], good["png"][:-40], b"", b"no picture at all"):
        assert kind_of(good | {"png": data}) == "unreadable_image"
    strip = image_bytes(Image.new("RGB", (1, 30_000)))
    assert kind_of({"png": strip, "txt": b"x"}, resolution=256) == "unreadable_image", "it would take 7680000 x 256"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert kind_of(good) == "unreadable_image", "PIL's decompression bomb"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert item_of(good)["image"].shape == (3, 32, 32), "large ones are read, without a warning"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(form):
    whole = image_bytes(picture(CAPTIONS[0]), form)
    rng = random.Random(0)
    kinds = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            item_of({"png": bytes(data[: rng.randrange(1, len(data) + 1)]), "txt": b"x"})
        except SkipSample as skipped:
            kinds.append(skipped.kind)
    assert len(kinds) > 50 and set(kinds) == {"unreadable_image"}


def test_a_sample_without_text_is_skipped_before_its_picture_is_decoded():
    assert kind_of({"png": b"no picture", "txt": b""}) == "empty_text"


# ---- augmentation ----


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


# ---- CLIP ----


def test_the_clip_branch_gets_what_its_processor_makes():
    processor = image_processor_class()(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    item = item_of(sample(CAPTIONS[0]), processor=processor)
    expected = processor(picture(CAPTIONS[0]), return_tensors="pt")["pixel_values"][0]
    assert item.keys() == {"pixel_values", "text", "key"} and torch.equal(item["pixel_values"], expected)
    assert item["pixel_values"].shape == (3, 24, 24)


# ---- codes ----


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint8])
def test_codes_come_in_place_of_the_picture(dtype):
    codes = np.arange(16, dtype=dtype) * 4
    item = item_of({"codes.npy": codes_bytes(codes), "png": b"unread", "txt": b"words"})
    assert item.keys() == {"codes", "text", "key"}
    assert item["codes"].dtype == torch.int64 and item["codes"].tolist() == codes.tolist()
    assert item_of({"image": codes.tolist(), "text": "words"})["codes"].tolist() == codes.tolist(), "of a parquet file"


@pytest.mark.parametrize(
    "data",
    [
        codes_bytes(np.arange(15)),
        codes_bytes(np.arange(16).reshape(4, 4)),
        codes_bytes(np.arange(16) + 49),
        codes_bytes(np.arange(16) - 1),
        codes_bytes(np.arange(16.0)),
        codes_bytes(np.arange(16))[:-5],
        b"",
        b"no numbers",
        codes_bytes(np.array([{}] * 16, dtype=object)),
    ],
)
def test_codes_of_another_length_or_range_are_skipped(data):
    assert kind_of({"codes.npy": data, "txt": b"x"}) == "bad_codes"


@pytest.mark.parametrize("codes", [[[1, 2], [3]], [], [None] * 16, ["a"] * 16])
def test_lists_that_are_no_codes_are_skipped(codes):
    assert kind_of({"image": codes, "text": "x"}) == "bad_codes"


@pytest.mark.parametrize("setting", [{"flip": True}, {"jitter": 0.1}, {"processor": object()}])
def test_codes_cannot_be_mirrored_moved_or_shown_to_clip(setting):
    raw = {"__key__": "a", "codes.npy": codes_bytes(np.arange(16)), "txt": b"x"}
    with pytest.raises(UserError, match="a holds codes in place of an image; .*give (it )?the shards with the images"):
        item_of(raw, **setting)


def test_pictures_beside_codes_serve_where_codes_cannot():
    both = sample(CAPTIONS[0]) | {"codes.npy": codes_bytes(np.arange(16))}
    assert "codes" in item_of(both)
    assert "image" in item_of(both, flip=True)
