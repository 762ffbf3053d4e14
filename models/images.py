"""Image files ↔ PIL images ↔ tensors (spec §11)."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError

MAX_PIXELS = 178_956_970  # PIL's own limit, beyond which it raises DecompressionBombError


def load_image(path: str | Path, mode: str | None = "RGB") -> Image.Image:
    """Reads and decodes an image file.

    Args:
        path: any format that PIL reads; the first frame of an animation.
        mode: PIL mode of the result, `RGB` for images and `L` for inpainting masks; None keeps the file's.

    Raises:
        UserError: the file is missing, truncated, not an image, or has more than 178,956,970 pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image {path} does not exist or is not a file; relative paths start at the current folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised from half of the limit on
            with Image.open(path) as image:
                _check_size(image.size, path)
                return image.convert(mode)  # Faithful: EXIF rotation is not applied
    except Image.DecompressionBombError:
        raise UserError(f"image {path} has more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except UserError:
        raise
    except Exception as error:  # the decoders raise many unrelated classes
        raise UserError(f"image {path} cannot be read; it is damaged or not an image ({error})") from None


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
    if image.mode != "RGB" and not (keep_grey and image.mode == "L"):
        image = image.convert("RGB")
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
