"""spec §11 against torch's own antialiased resize and hand-made crops; and files that are no good images."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from models.images import (
    MASK,
    ImageOptions,
    from_pixels,
    has_rotation,
    load_image,
    open_image,
    preprocess,
    read_image,
    to_pil,
)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.randint(0, 256, shape, dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """Away from black and white, so that nothing is clipped on the way."""
    return noise(8, 8).resize((width, height), Image.Resampling.BICUBIC).point(lambda value: 50 + value * 0.6)


# --- preprocess


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (37, 100), (31, 33), (300, 201), (20, 90), (451, 300)])
@pytest.mark.parametrize("resolution", [16, 48, 65])
def test_resize_and_crop_agree_with_torch(size, resolution):
    image = smooth(*size)
    new_width, new_height = (int(resolution * side / min(size)) for side in size)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double()[None]  # (1, 3, H, W)
    pixels = torch.nn.functional.interpolate(pixels, (new_height, new_width), mode="bicubic", antialias=True)
    top, left = round((new_height - resolution) / 2), round((new_width - resolution) / 2)
    expected = pixels[0, :, top : top + resolution, left : left + resolution].clamp(0, 255)

    result = preprocess(image, resolution, normalize=False)
    assert (result.shape, result.dtype) == ((3, resolution, resolution), torch.float32)
    assert (result * 255 - expected).abs().max() <= 1.2  # PIL rounds to whole steps after each direction


@pytest.mark.parametrize(("extra", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)])
@pytest.mark.parametrize("wide", [True, False])
def test_the_crop_is_centred_and_rounds_half_to_even(extra, offset, wide):
    image = noise(24 + extra, 24) if wide else noise(24, 24 + extra)  # the short side fits: nothing is resized
    values = np.asarray(image)
    expected = values[:, offset : offset + 24] if wide else values[offset : offset + 24]
    result = preprocess(image, 24, normalize=False)
    assert torch.equal(result, torch.from_numpy(expected.copy()).permute(2, 0, 1) / 255)


def test_normalized_values_and_the_way_back():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    pixels = preprocess(image, 16)
    levels = torch.arange(256, dtype=torch.float32) / 255
    assert torch.equal(pixels[0].flatten(), (levels - 0.5) / 0.5)
    (back,) = to_pil(pixels[None])
    difference = np.asarray(image).astype(int) - np.asarray(back)
    assert set(np.unique(difference)) <= {0, 1}  # truncation may lose one step, never gain one


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGBa", "CMYK", "1", "LA", "La", "I;16"])
def test_any_mode_is_read_as_rgb(mode):
    assert preprocess(Image.new(mode, (20, 30)), 16).shape == (3, 16, 16)


def test_a_mask_keeps_one_channel_unless_normalized():
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (20, 0, 40, 20))
    values = preprocess(mask, 20, normalize=False)
    assert values.shape == (1, 20, 20)
    assert torch.equal(values[0, 0], torch.tensor([0.0] * 10 + [1.0] * 10))
    assert preprocess(mask, 20).shape == (3, 20, 20)


def test_a_strip_that_would_grow_beyond_all_bounds_is_refused():
    with pytest.raises(UserError, match="at most"):
        preprocess(Image.new("RGB", (20000, 2)), 512)


# --- to_pil


def test_to_pil_clamps_and_truncates():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0])
    pixels = values.view(1, 1, 1, 6).expand(2, 3, 1, 6)
    images = to_pil(pixels.to(torch.float64).requires_grad_())
    assert len(images) == 2 and images[0].size == (6, 1) and images[0].mode == "RGB"
    assert [images[1].getpixel((x, 0))[0] for x in range(6)] == [0, 0, 127, 254, 255, 255]
    assert np.asarray(to_pil(pixels.bfloat16())[0]).max() == 255


# --- pixels of other programs


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays_and_tensors_are_the_images_that_they_came_from(channels):
    values = np.random.randint(0, 256, (6, 9, *channels), dtype=np.uint8)
    image = Image.fromarray(values[..., 0] if channels == (1,) else values)
    tensor = torch.from_numpy(values)
    tensor = tensor.permute(2, 0, 1) if channels else tensor
    for pixels in (
        values,
        values / 255,
        (values / 255).astype(np.float32),
        tensor,
        tensor / 255,
        tensor.double() / 255,
    ):
        made = from_pixels(pixels)
        assert made.mode == image.mode and made.tobytes() == image.tobytes()
        assert read_image(pixels).mode == "RGB"
    if not channels:
        assert np.array_equal(np.asarray(from_pixels(values > 100)), (values > 100) * 255)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\), expected an array \(H, W, 3\)"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\), expected a tensor \(3, H, W\)"),
        (torch.zeros(1, 3, 8, 8), r"shape \(1, 3, 8, 8\)"),
        (np.zeros((0, 8, 3)), r"shape \(0, 8, 3\)"),
        (np.full((8, 8, 3), 255.0), "float64 has values from 255 to 255, expected 0 to 1, or uint8"),
        (torch.full((3, 8, 8), -1.0), "torch.float32 has values from -1 to -1"),
        (np.full((8, 8), np.nan), "values from nan to nan"),
        (np.zeros((8, 8, 3), int), "dtype int64, expected uint8"),
    ],
)
def test_pixels_that_are_no_image_are_refused_in_words(pixels, message):
    with pytest.raises(ValueError, match=message):
        read_image(pixels)


def test_what_is_no_image_at_all_is_of_the_wrong_type():
    with pytest.raises(TypeError, match="an image is of type int, expected a PIL image, a path"):
        read_image(7)


# --- load_image


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_load_image_converts(tmp_path, suffix):
    noise(30, 20).save(tmp_path / f"x.{suffix}")
    image = load_image(str(tmp_path / f"x.{suffix}"))
    assert (image.mode, image.size) == ("RGB", (30, 20))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_a_truncated_image_is_refused(tmp_path, suffix, part):
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * part)])
    with pytest.raises(UserError, match=f"cut.{suffix}"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"BM" + b"\xff" * 60, b"GIF89a" + b"\0" * 9])
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "no.png").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path / "no.png")


def test_missing_files_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # reading it would never end
    found = {"": "is a folder", "none.png": "does not exist", "pipe.png": "no regular file"}
    for name, message in found.items():
        with pytest.raises(UserError, match=message):
            load_image(tmp_path / name)


@pytest.mark.parametrize("size", [(14000, 13000), (30000, 30000)])  # PIL itself refuses from twice the limit on
def test_enormous_images_are_refused_before_they_are_decoded(tmp_path, size):
    (tmp_path / "bomb.ppm").write_bytes(b"P6 %d %d 255\n" % size)  # claims a size and holds no rows
    with pytest.raises(UserError, match=r"178,956,970"):
        load_image(tmp_path / "bomb.ppm")


# --- more than RGB of 8 bits

RAMP = np.linspace(0, 1, 5)[None].repeat(3, 0)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("pixels", "format"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * 65535000).astype(np.int32), "TIFF"),
        ((RAMP * 3000 - 1000).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 2 - 1).astype(np.float32), "TIFF"),
    ],
)
def test_greys_of_more_than_8_bits_are_scaled_not_clipped(pixels, format):
    image = open_image(saved(Image.fromarray(pixels), format), "ramp")
    assert np.allclose(np.asarray(image)[0, :, 0], [0, 64, 127, 191, 255], atol=1)
    assert preprocess(Image.fromarray(pixels), 3).std() > 0.2  # images that a program passes, too


def test_dark_16_bits_stay_dark():
    assert np.asarray(open_image(saved(Image.fromarray(np.full((2, 2), 2570, np.uint16)), "PNG"), "x")).max() == 10


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="NaN"):
        open_image(saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"), "x")


def test_transparent_pixels_lie_on_the_background():
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30] * 256)
    files = [
        saved(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG"),
        saved(Image.new("LA", (4, 4), (10, 0)), "PNG"),
        saved(palette, "PNG", transparency=b"\0"),
        saved(palette, "GIF", transparency=0),
        saved(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG", transparency=(10, 20, 30)),
    ]
    for file in files:
        assert open_image(file, "x").getpixel((0, 0)) == (255, 255, 255)
        assert open_image(file, "x", MASK).getpixel((0, 0)) == (0, 0, 0)
        assert open_image(file, "x", ImageOptions(background="#00ff00")).getpixel((0, 0)) == (0, 255, 0)
        assert open_image(file, "x", ImageOptions(background=None)).getpixel((0, 0))[0] == 10  # as published


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_an_image_if_asked_to(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = saved(noise(60, 40), format, exif=exif)
    plain, turned = open_image(file, "x"), open_image(file, "x", ImageOptions("apply"))
    assert (plain.size, turned.size) == ((60, 40), (40, 60)) and has_rotation(plain) and not has_rotation(turned)
    assert np.array_equal(np.asarray(plain.rotate(-90, expand=True)), np.asarray(turned))


def test_files_for_interpreters_are_not_opened():
    with pytest.raises(UserError, match="known format"):
        open_image(saved(noise(8, 8), "EPS"), "x")
