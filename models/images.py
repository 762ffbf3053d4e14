"""Image files ↔ PIL images ↔ tensors (spec §11)."""

import io
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from common.errors import UserError, shown
from common.files import check_file, expand

MAX_PIXELS = 178_956_970  # PIL's own limit, beyond which it raises DecompressionBombError
MAX_BYTES = 2**30  # of an image file
# PIL's readers that decode by themselves: EPS, for one, hands the file to an interpreter of PostScript.
FORMATS = "JPEG MPO PNG WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF ICO ICNS TGA PCX SGI DDS".split()


@dataclass(frozen=True)
class ImageOptions:
    """What becomes of facts that the published code ignores: it drops the alpha channel and EXIF's rotation.

    Args:
        exif: ``apply`` turns images as their EXIF orientation says; ``ignore``, as published, does not.
        background: colour under transparent pixels, a name or ``#rrggbb``; None: alpha is dropped as published, which
            shows whatever colours the transparent pixels happen to have.
    """

    exif: str = "ignore"
    background: str | None = "white"


DEFAULT = ImageOptions()
MASK = ImageOptions(background="black")  # of inpainting: what is transparent is kept
OUTPUT_TYPES = ("pil", "np", "pt")  # see `converted`
# An image, the path of one, or its pixels: an array (H, W, C) or a tensor (C, H, W), see `from_pixels`.
ImageInput = Image.Image | str | Path | np.ndarray | torch.Tensor


def read_image(image: ImageInput, options: ImageOptions = DEFAULT) -> Image.Image:
    """An image in any form that a program may have it → RGB, see `to_rgb`.

    Raises:
        UserError: a file cannot be read, see `open_image`, or pixels are not as `from_pixels` expects them.
        TypeError: it is something else.
    """
    if isinstance(image, (str, Path)):
        return load_image(image, options)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = from_pixels(image)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise TypeError(f"an image is of type {kind}, expected a PIL image, a path, a numpy array or a torch tensor")
    return to_rgb(image, options)


def from_pixels(pixels: np.ndarray | torch.Tensor) -> Image.Image:
    """Pixels → a PIL image of the same values.

    Args:
        pixels: uint8 in [0, 255], floats in [0, 1] or bool. An array (H, W) or (H, W, C), a tensor (H, W) or (C, H, W);
            C is 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        UserError: another shape or type, or floats out of range.
    """
    shape, dtype, expected = tuple(pixels.shape), pixels.dtype, "an array (H, W, 3)"
    if isinstance(pixels, torch.Tensor):
        expected = "a tensor (3, H, W)"
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).detach().cpu().numpy()
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)) or 0 in shape:
        raise UserError(f"an image has pixels of shape {shape}, expected {expected}, or 1 or 4 channels instead of 3")
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            found = f"{pixels.min():.4g} to {pixels.max():.4g}"
            raise UserError(f"an image of dtype {dtype} has values from {found}, expected 0 to 1, or uint8")
        pixels = np.rint(pixels * 255)
    elif pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif pixels.dtype != np.uint8:
        raise UserError(f"an image has pixels of dtype {dtype}, expected uint8, or floats from 0 to 1")
    pixels = np.ascontiguousarray(pixels, np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def converted(images: list[Image.Image], output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """RGB images of one size as ``pil``: a list, ``np``: (B, H, W, 3), or ``pt``: (B, 3, H, W), float32 in [0, 1]."""
    if output_type == "pil":
        return images
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def load_image(path: str | Path, options: ImageOptions = DEFAULT) -> Image.Image:
    """Reads and decodes an image file, see `open_image`; `~` at the beginning of a text is the home folder."""
    return open_image(expand(path) if isinstance(path, str) else path, shown(path), options)


def open_image(source: bytes | str | Path, name: str, options: ImageOptions = DEFAULT) -> Image.Image:
    """Decodes an image: the only way in which images are read, in inference, training, evaluation and tools.

    Args:
        source: encoded bytes, or a file, in any of `FORMATS`; the first frame of an animation.
        name: for messages.

    Returns:
        RGB, see `to_rgb`.

    Raises:
        UserError: it is missing, no regular file, truncated, no image, has NaN pixels or more than 178,956,970.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else check_file(source, f"image {name}", MAX_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, odd EXIF data and palettes
            with Image.open(file, formats=_formats()) as image:
                _check_size(image.size, name)
                image.load()
                return to_rgb(image, options)
    except Image.DecompressionBombError:
        raise UserError(f"image {name} has more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except UserError:
        raise
    except Exception as error:  # the decoders raise many unrelated classes
        reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"image {name} cannot be read; it is damaged or not an image ({reason})") from None


def to_rgb(image: Image.Image, options: ImageOptions = DEFAULT) -> Image.Image:
    """An image of any mode → RGB: more than 8 bits are scaled, transparency lies on the background; see `ImageOptions`.

    Raises:
        UserError: pixels are NaN or infinite.
    """
    if is_deep(image):
        image = _scaled(image)
    elif image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if options.exif == "apply" and has_rotation(image):
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if options.background is not None and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, options.background), image)
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of 16 or 32 bits, or of floats, which PIL would clip to 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def has_rotation(image: Image.Image | bytes) -> bool:
    """Whether the EXIF data of an image, which may be encoded, say that it is to be turned or mirrored."""
    try:
        image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # of broken EXIF data, which are none
        return False


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats → L.

    The full range is that of the type where it has one (16 bits); else the smallest of [0, 1] for floats, [0, 255],
    [0, 65535] that holds all pixels; else that of the pixels themselves.
    """
    values, info = np.asarray(image).astype(np.float64), image.info
    if not np.isfinite(values).all():
        raise UserError("an image has pixels that are NaN or infinite; save it with finite values")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        low, high = 0.0, 65535.0
    else:
        ranges = ([1.0] if image.mode == "F" else []) + [255.0, 65535.0]
        full = next((top for top in ranges if low >= 0 and high <= top), None)
        low, high = (low, max(high, low + 1e-12)) if full is None else (0.0, full)
    scaled = Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8))
    scaled.info = {key: value for key, value in info.items() if key == "exif"}
    return scaled


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def preprocess(image: Image.Image, resolution: int, *, normalize: bool = True) -> torch.Tensor:
    """Resizes the shorter side (bicubic), crops the centre and scales the values: an image as the models take it.

    Args:
        image: any mode; converted to RGB, except for masks (mode `L` with `normalize=False`), which keep one channel.
        resolution: side of the result in pixels.
        normalize: scale to [-1, 1] instead of [0, 1].

    Returns:
        (3 or 1, resolution, resolution) float32.

    Raises:
        UserError: the resized image would have more than 178,956,970 pixels.
    """
    pixels = resized(image, resolution, keep_grey=not normalize)
    if normalize:
        return normalized(pixels)
    return pixels.permute(2, 0, 1).contiguous().float() / 255  # (C, res, res)


def resized(image: Image.Image, resolution: int, *, keep_grey: bool = False) -> torch.Tensor:
    """The geometric half of `preprocess`: (resolution, resolution, 3 or 1) uint8."""
    if not (keep_grey and image.mode == "L"):
        image = to_rgb(image)
    size = resized_size(image.size, resolution, f"of {image.width} x {image.height} pixels")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if size != (resolution, resolution):
        left, top = (int(round((side - resolution) / 2)) for side in size)  # half to even, as published
        image = image.crop((left, top, left + resolution, top + resolution))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(resolution, resolution, -1)


def resized_size(size: tuple[int, int], resolution: int, what: str | Path) -> tuple[int, int]:
    """(width, height) after the shorter side was resized to `resolution`.

    Args:
        what: names the image in the error message.

    Raises:
        UserError: more than 178,956,970 pixels, as for a long strip whose shorter side grows.
    """
    short, long = min(size), max(size)
    new_long = int(resolution * long / short)
    size = (resolution, new_long) if size[0] == short else (new_long, resolution)
    _check_size(size, what)
    return size


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """(…, H, W, C) uint8 → (…, C, H, W) float32 in [-1, 1]; also called on batches, after they left the workers."""
    values = pixels.movedim(-1, -3).contiguous().float()
    return values.div_(255).sub_(0.5).div_(0.5)


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1], any float dtype and device → B PIL images; values outside are clamped."""
    values = torch.clamp((pixels.detach().float() + 1) / 2, 0, 1) * 255
    values = values.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)  # Faithful: truncated, not rounded
    return [Image.fromarray(value) for value in values]


def _check_size(size: tuple[int, int], what: str | Path) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        grown = f"{size[0]} x {size[1]} pixels"
        raise UserError(f"image {what} would become {grown}, at most {MAX_PIXELS:,} in all are allowed; crop it first")
