"""What callers give to the pipeline: checks of texts, masks and directions; one or several of each; seeds (spec §7)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from common.errors import UserError, shown
from models.images import MASK, ImageInput, has_rotation, preprocess, read_image
from models.vocabulary import PAD_TOKEN, SPECIAL_TOKENS

DIRECTIONS = ("left", "right", "up", "down")
MAX_WINDOWS = 64  # of a canvas, whose pixels are decoded at once
MAX_SEED = 2**63 - 1


def check_texts(texts: Iterable[str]) -> None:
    """Raises `UserError` for a prompt or question that is no UTF-8, or contains a special token such as ``<|soi|>``."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a prompt or question is {text!r:.60} of type {type(text).__name__}, expected text")
        if shown(text) != text:
            raise UserError(f"the text '{shown(text)[:200]}' is no UTF-8; give it in this encoding")
        if held := [token for token in (PAD_TOKEN, *SPECIAL_TOKENS) if token in text]:
            raise UserError(f"the text {text[:200]!r} contains the special token {held[0]}; remove it")


def mask_tokens(mask: ImageInput, image: Image.Image, resolution: int, window: int) -> torch.Tensor:
    """An inpainting mask → (1, N) bool, True = regenerate (spec §7).

    Raises:
        UserError: the mask is coloured, has another aspect ratio than the image, or has no white region.
    """
    mask = read_image(mask, MASK)
    colours = np.asarray(mask.resize((64, 64)), dtype=np.int16)
    if (np.ptp(colours, axis=-1) > 48).mean() > 0.02:
        raise UserError("the inpainting mask is a colour image; it must be black (keep) and white (regenerate)")
    if abs(mask.width * image.height / (mask.height * image.width) - 1) > 0.02:
        hint = "image.exif=apply turns it, in Python image_options=ImageOptions(exif='apply')"
        turned = next((name for name, one in {"image": image, "mask": mask}.items() if has_rotation(one)), None)
        raise UserError(
            f"the inpainting mask has {mask.width} x {mask.height} pixels, the image {image.width} x {image.height}; "
            "they must have the same aspect ratio"
            + (f" (the {turned} carries an EXIF rotation, which is ignored; {hint})" * bool(turned))
        )
    # Faithful: bicubic without antialiasing, although it skips most pixels (pinned by test_pipeline_showo.py).
    tokens = F.interpolate(mask_pixels(mask, resolution), size=(window, window), mode="bicubic")
    unknown = tokens.flatten(1) >= 0.5
    if not unknown.any():
        raise UserError(
            "the inpainting mask has no white region, so nothing would be regenerated; paint that part white"
        )
    return unknown


def mask_pixels(mask: Image.Image, resolution: int) -> torch.Tensor:
    """(1, 1, P, P) float32 in [0, 1], 1 = white."""
    return preprocess(mask.convert("L"), resolution, normalize=False)[None]


def check_extrapolation(directions: Sequence[str], prompts: Sequence[str], offset: int, window: int) -> None:
    """Raises `UserError` for unknown directions, a number of prompts other than that of directions, or a bad offset."""
    if unknown := [direction for direction in directions if direction not in DIRECTIONS]:
        raise UserError(f"{unknown[0]!r} is no direction; allowed: {', '.join(DIRECTIONS)}")
    if not directions or len(directions) != len(prompts):
        raise UserError(
            f"there are {len(directions)} directions and {len(prompts)} prompts; give one prompt for each direction"
        )
    limit = window // 2 - 1
    if abs(offset) > limit:
        raise UserError(
            f"offset is {offset}; with a window of {window} x {window} tokens it must be from {-limit} to {limit}"
        )
    across, down = (
        1 + sum(direction in axis for direction in directions) * (window // 2 + offset) / window
        for axis in (DIRECTIONS[:2], DIRECTIONS[2:])
    )
    if across * down > MAX_WINDOWS:
        raise UserError(
            f"{len(directions)} directions make the image {across * down:.0f} times as large; at most {MAX_WINDOWS} "
            "times are possible; leave some out"
        )


def soft_mask(mask: Image.Image, resolution: int, factor: int) -> Image.Image:
    """The white of a mask as the model sees it, in mode L, which fades within half a token around it."""
    white = Image.fromarray((mask_pixels(mask, resolution)[0, 0].numpy() >= 0.5).astype(np.uint8) * 255)
    radius = max(factor // 4, 1)
    return white.filter(ImageFilter.MaxFilter(2 * radius + 1)).filter(ImageFilter.BoxBlur(radius))


def image_seed(seed: int, number: int) -> int:
    """The seed of this image among those of one call or run, counted from 0."""
    return (seed + number) % (MAX_SEED + 1)


def as_list(items) -> list:
    """A list of one or several texts or images; arrays and tensors with a fourth dimension are several images."""
    if isinstance(items, (np.ndarray, torch.Tensor)):
        return list(items) if items.ndim == 4 else [items]
    if isinstance(items, (str, Path, Image.Image)):
        return [items]
    if not isinstance(items, Iterable):
        raise TypeError(
            f"got {items!r:.60} of type {type(items).__name__}, expected texts or images, or a list of them"
        )
    return list(items)


def for_each(name: str, items, count: int, what: str = "image") -> list:
    """A list of `count` texts or images, of one that all have or a list with as many; else a `UserError`."""
    items = as_list(items)
    if len(items) not in (1, count):
        raise UserError(f"{name} holds {len(items)}, expected one for all, or {count}: one for each {what}")
    return items if len(items) == count else items * count


def distinct(images: Sequence[ImageInput]) -> tuple[list[ImageInput], list[int]]:
    """The objects without repetitions, and the index of each one among them."""
    found = {id(image): image for image in images}
    place = {key: index for index, key in enumerate(found)}
    return list(found.values()), [place[id(image)] for image in images]


def batches(items: Sequence, size: int | None) -> Iterator[Sequence]:
    size = size or max(len(items), 1)
    return (items[start : start + size] for start in range(0, len(items), size))
