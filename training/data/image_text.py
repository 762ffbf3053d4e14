"""Images with texts: a raw sample → ``{"image" | "codes" | "pixel_values": tensor, "text": str}`` (spec §15).

The text is the sample's own or one from elsewhere, with an instruction or shortened.
"""

import io
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from common.errors import UserError
from common.files import decode_text, read_text
from models.images import DEFAULT, MAX_PIXELS, ImageOptions, has_rotation, open_image, resized
from training.data.json_records import JsonTable
from training.data.shards import CODES, members_of
from training.data.sources import (
    BAD_CODES,
    CUT,
    EMPTY_TEXT,
    MALFORMED_ITEM,
    MISSING_FILE,
    ROTATED,
    UNREADABLE_IMAGE,
    Skipped,
    checked_text,
)

JPEG, EXIF = b"\xff\xd8", b"Exif\0\0"
MAX_CAPTION = 2**24  # bytes of a file with a caption
IMAGE_KEYS = ("jpg", "png", "jpeg", "webp", "image")
TEXT_KEYS = ("text", "txt", "caption")


# ---- images ----


@dataclass(frozen=True)
class ImageTransform:
    """An image in a raw sample → the tensor that the model takes.

    Args:
        resolution: side of the images in pixels.
        num_codes, codebook_size: length and range of codes, for samples that have them in place of pixels.
        flip: mirror each image with probability 0.5.
        jitter: shift and scale each image by up to this share of its size.
        processor: CLIP's image processor; None for the VQ branch.
        root: folder that file names in parquet files and LLaVA jsons are relative to; None: that of the file.
        options: what becomes of EXIF's rotation and of the alpha channel.
    """

    resolution: int
    num_codes: int
    codebook_size: int
    flip: bool = False
    jitter: float = 0.0
    processor: Any = None
    root: str | None = None
    options: ImageOptions = DEFAULT

    def of(self, raw: dict, rng: random.Random) -> dict[str, torch.Tensor]:
        """The image of a raw sample: a member of a shard, or under ``image`` bytes, a file name, both (as Hugging
        Face's data sets have them), or codes. ``notes`` names what is odd about it, if anything is.

        Raises:
            Skipped: there is none, or it is unusable.
            UserError: it is codes, and this flow needs pixels.
        """
        name = raw.get("__key__", "")
        found = next((raw[key] for key in IMAGE_KEYS if raw.get(key) is not None), None)
        if CODES in raw and (found is None or not self.refuses_codes()):
            return self.from_codes(_array(raw[CODES], name), name)
        if isinstance(found, dict):
            found = found.get("bytes") or found.get("path")
        if isinstance(found, list):
            return self.from_codes(_array(found, name), name)
        if found is None:
            raise Skipped(MALFORMED_ITEM, f"{name} has no image; {members_of(raw, IMAGE_KEYS)}")
        if isinstance(found, str):
            found = os.path.join(self.root or os.path.dirname(raw.get("__url__", "")), found)
        return self.from_encoded(found, rng, name)

    def from_encoded(self, encoded: bytes | str | None, rng: random.Random, name: str) -> dict[str, torch.Tensor]:
        """``image`` (res, res, 3) uint8, or ``pixel_values`` (3, S, S) of CLIP's processor."""
        pixels = decode_jpeg(encoded) if self.options.exif == "ignore" else None
        as_it_is = not self.flip and not self.jitter and self.processor is None
        if as_it_is and pixels is not None and pixels.shape[:2] == (self.resolution, self.resolution):
            return {"image": torch.from_numpy(pixels)} | _notes(encoded)
        image = self._opened(encoded, name) if pixels is None else Image.fromarray(pixels)
        notes = _notes(image if pixels is None else encoded)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            image = jittered(image, self.jitter, rng)
        try:
            if self.processor is None:
                return {"image": resized(image, self.resolution)} | notes
            return {"pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0]} | notes
        except ValueError as error:  # of a strip so long that it cannot be resized
            raise Skipped(UNREADABLE_IMAGE, f"{name}: {error}") from None

    def _opened(self, encoded: bytes | str | None, name: str) -> Image.Image:
        """Encoded bytes, or a path → RGB; `Skipped` if that is impossible."""
        if not isinstance(encoded, bytes | str):
            raise Skipped(MALFORMED_ITEM, f"{name}: no image")
        if isinstance(encoded, str) and not os.path.exists(encoded):
            raise Skipped(MISSING_FILE, encoded)
        try:
            return open_image(encoded, name if isinstance(encoded, bytes) else encoded, self.options)
        except UserError as error:
            raise Skipped(UNREADABLE_IMAGE, str(error)) from None

    def from_codes(self, codes: np.ndarray, name: str) -> dict[str, torch.Tensor]:
        """``codes`` (N,) int64."""
        if refused := self.refuses_codes():
            raise UserError(f"{name} holds codes in place of an image; {refused}")
        if codes.shape != (self.num_codes,) or codes.dtype.kind not in "ui":
            raise Skipped(
                BAD_CODES, f"{name}: {codes.shape} of {codes.dtype}, the model takes {self.num_codes} whole numbers"
            )
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise Skipped(BAD_CODES, f"{name}: codes up to {codes.max()}, the codebook has {self.codebook_size}")
        return {"codes": torch.from_numpy(codes.astype(np.int64))}

    def refuses_codes(self) -> str:
        """Why this flow cannot use codes; empty if it can."""
        if self.processor is not None:
            return "the CLIP-ViT branch sees pixels; give it the shards with the images"
        if self.flip or self.jitter:
            keys = "dataset.preprocessing.random_flip, und_random_flip and und_jitter"
            return f"codes cannot be mirrored or moved; turn {keys} off, or give the shards with the images"
        return ""


def decode_jpeg(encoded: Any) -> np.ndarray | None:
    """(H, W, 3) uint8 of an ordinary jpeg; None for anything else, which is left to PIL.

    It uses the same library as PIL and gives the same pixels (tests/data/test_image_text.py), with fewer copies.
    """
    if not isinstance(encoded, bytes) or not encoded.startswith(JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:  # damaged, or odd
        return None


def noted(sample: dict, note: str) -> dict:
    """The sample with one more note."""
    return sample | {"notes": (*sample.get("notes", ()), note)}


def _notes(image: bytes | Image.Image) -> dict:
    """``{"notes": (ROTATED,)}`` if EXIF data say that the image, which is as it is stored, is to be rotated."""
    if isinstance(image, bytes) and image.find(EXIF, 0, 2**16) < 0:  # an ordinary jpeg, whose EXIF data come first
        return {}
    return {"notes": (ROTATED,)} if has_rotation(image) else {}


def jittered(image: Image.Image, amount: float, rng: random.Random) -> Image.Image:
    """Shifted and scaled by up to `amount` (a share of the size); the rim takes the colour of the top left corner."""
    width, height = image.size
    scale = 1 + rng.uniform(-amount, amount)
    shift_x, shift_y = (rng.uniform(-amount, amount) * side for side in image.size)
    matrix = (scale, 0, width / 2 * (1 - scale) + shift_x, 0, scale, height / 2 * (1 - scale) + shift_y)
    corner = image.getpixel((0, 0))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=corner)


def _array(codes: bytes | list, name: str) -> np.ndarray:
    try:
        loaded = np.load(io.BytesIO(codes), allow_pickle=False) if isinstance(codes, bytes) else np.asarray(codes)
        if not isinstance(loaded, np.ndarray):
            raise ValueError("an archive of arrays, not one")
        return loaded
    except Exception as error:  # numpy raises OSError, ValueError, EOFError, even SyntaxError of a broken header
        raise Skipped(BAD_CODES, f"{name}: {error}") from None


# ---- texts ----

CAPTION_INSTRUCTIONS = (
    "Describe this image.",
    "What does the picture show?",
    "Give a short description of the image.",
    "Please caption this picture.",
    "Tell me what you see in this image.",
    "What can be seen here?",
    "Write a caption for the image.",
    "Summarise the content of this picture.",
    "Explain what is in this image.",
    "What is depicted in the picture?",
    "Describe the scene.",
    "What is going on in this image?",
    "Put this picture into words.",
    "How would you describe this picture?",
    "Provide a description of the picture.",
    "Could you say what this image shows?",
    "Describe the picture for someone who cannot see it.",
    "What would be a good caption for this?",
    "Name the main things in this image.",
    "Give a clear account of the image.",
    "Look at the picture and describe it.",
    "What do you notice in this picture?",
    "Say what the image is about.",
    "Please describe what is shown.",
    "Compose a caption that fits this image.",
    "What is the subject of this picture?",
    "Can you describe the image?",
    "Report what is visible in the picture.",
    "Characterise this image in words.",
    "I would like a description of this image.",
    "Which objects and surroundings does the picture show?",
    "Translate this image into a sentence.",
    "Sum up the picture.",
    "Tell a reader what the picture contains.",
)
OPENINGS = (  # of machine-made captions; before any that are their prefixes
    "The image features ",
    "The image shows ",
    "The image displays ",
    "The image contains ",
    "The image depicts ",
    "The picture shows ",
    "The picture features ",
    "The photo shows ",
    "The scene shows ",
    "This image features ",
    "This image shows ",
    "In this image, there is ",
    "In this image, ",
    "In this picture, ",
    "In the photo, ",
)


@dataclass(frozen=True)
class ExternalCaptions:
    """Captions that replace the samples' own ones; the first rule that matches a sample wins.

    Args:
        folder: `external_caption_path`, for keys with ``SA1B``: ``{folder}/{name}.txt``.
        laion, cc12m: for shards whose address holds the word: ``{laion}/{shard}/{key}.caption`` and
            ``{cc12m}/{shard}/{name}.caption``.
        journeydb: key → one caption or several.
    """

    folder: str
    laion: str | None = None
    cc12m: str | None = None
    journeydb: JsonTable | None = None

    def file_of(self, key: str, url: str) -> Path | None:
        """Where the caption of a sample lies, if the first three rules say so."""
        name, shard = key.rpartition("/")[2], url.rpartition("/")[2].partition(".")[0]
        if "SA1B" in key:
            return Path(self.folder, f"{name}.txt")
        if self.laion and "laion" in url:
            return Path(self.laion, shard, f"{key}.caption")
        if self.cc12m and "cc12m" in url:
            return Path(self.cc12m, shard, f"{name}.caption")
        return None


@dataclass(frozen=True)
class Captions:
    """Raw sample → text.

    Args:
        external: captions from elsewhere.
        instructions: put ``USER: \\n{instruction} ASSISTANT: `` before the text.
        shorten: for generation: of captions from the first three places elsewhere, half are cut to their first
            sentence, and the openings are removed.
    """

    external: ExternalCaptions | None = None
    instructions: bool = False
    shorten: bool = False

    def __call__(self, raw: dict, rng: random.Random) -> str:
        """The text of one sample; `Skipped` if there is none, or it is empty or no UTF-8."""
        text = self._text(raw, rng).strip()
        if not text:
            raise Skipped(EMPTY_TEXT, str(raw.get("__key__", "")))
        return f"USER: \n{rng.choice(CAPTION_INSTRUCTIONS)} ASSISTANT: {text}" if self.instructions else text

    def _text(self, raw: dict, rng: random.Random) -> str:
        key, url = raw.get("__key__", ""), raw.get("__url__", "")
        file = self.external and self.external.file_of(key, url)
        if file:
            text = _first_line(file)
            return _shortened(text, rng) if self.shorten else text
        found = self.external and self.external.journeydb and self.external.journeydb.get(key)
        return own_text(raw, rng) if found is None else _one_of(found, key, rng)


def own_text(raw: dict, rng: random.Random) -> str:
    """The caption a sample brings along; one of several by chance."""
    key = raw.get("__key__", "")
    if not any(suffix in raw for suffix in TEXT_KEYS):
        raise Skipped(MALFORMED_ITEM, f"{key} has no text; {members_of(raw, TEXT_KEYS)}")
    value = next(raw[suffix] for suffix in TEXT_KEYS if suffix in raw)
    if isinstance(value, bytes):
        try:
            value = decode_text(value)
        except UnicodeDecodeError as error:
            raise Skipped(MALFORMED_ITEM, f"{key}: the caption is no UTF-8 ({error})") from None
    return _one_of(value, key, rng)


def _one_of(value, key: str, rng: random.Random) -> str:
    if isinstance(value, list) and value:
        value = rng.choice(value)
    if value is None or value == []:
        raise Skipped(EMPTY_TEXT, key)
    return checked_text(value, f"caption of {key}")


def _first_line(file: Path) -> str:
    if not file.exists():
        raise Skipped(EMPTY_TEXT, f"{file} does not exist")
    try:
        return re.split(r"[\r\n]", read_text(file, limit=MAX_CAPTION), maxsplit=1)[0]
    except UserError as error:
        raise Skipped(MALFORMED_ITEM, str(error)) from None


def _shortened(text: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        text = re.split(r"[.!?](?:\s|$)", text.strip(), maxsplit=1)[0]
    for opening in OPENINGS:
        text = text.replace(opening, "")
    return text


# ---- samples ----


PIXELS_ONLY = "an image tokenizer is trained on pixels; give it the shards with the images"


class PixelTransform(ImageTransform):
    """Of a run that needs pixels."""

    def refuses_codes(self) -> str:
        return PIXELS_ONLY


def image_sample(raw: dict, rng: random.Random, *, images: ImageTransform, max_shift: int) -> dict:
    """Raw sample → ``{"image": (R, R, 3) uint8, "key"}``, moved by up to `max_shift` pixels; the border is repeated."""
    found = images.of(raw, rng)
    image = found["image"]
    if max_shift:
        height, width = image.shape[:2]
        rows, columns = (
            (torch.arange(size) + rng.randint(-max_shift, max_shift)).clamp(0, size - 1) for size in (height, width)
        )
        image = image[rows[:, None], columns]
    return found | {"image": image, "key": raw.get("__key__", "")}


@dataclass(frozen=True)
class ImageTextSample:
    """Transform of a raw sample with an image and a text.

    Args:
        tokenizer, text_length: of the model, to note texts that will be cut to `text_length` tokens, the two around
            each counted; None: nothing is noted.
    """

    images: ImageTransform
    captions: Captions
    tokenizer: Any = None
    text_length: int | None = None

    def __call__(self, raw: dict, rng: random.Random) -> dict:
        text = self.captions(raw, rng)  # before the image, which need not be decoded if there is no text
        sample = {**self.images.of(raw, rng), "text": text, "key": raw.get("__key__", "")}
        return noted(sample, CUT) if self._is_cut(text) else sample

    def _is_cut(self, text: str) -> bool:
        if self.tokenizer is None or self.text_length is None:
            return False
        room = self.text_length - 2
        # No text has more tokens than bytes, so most need not be tokenised here.
        return len(text.encode()) > room and len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) > room
