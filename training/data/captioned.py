"""Images with captions, found but not yet read: the interface of all their sources.

A source yields blocks: lists of `Captioned` images, and of `Skipped` for entries that are unusable. A block fits in
memory: a whole listing, or one row group of a parquet file.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from training.data.skipping import Skipped

NO_CAPTION = "no_caption"  # an image without a caption; `empty_text` is an empty caption
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file", "filepath", "image_name", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "description", "sentences", "sentence", "comment", "title")
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"training": "train", "test": "test"}


@dataclass(frozen=True, slots=True)
class Captioned:
    """One image with its captions.

    Args:
        image: the encoded bytes, or the file that holds them.
        name: used in messages.
        captions: as found, perhaps none or empty.
        extra: further facts, for JSON.
    """

    image: bytes | Path
    name: str
    captions: list[str]
    extra: dict[str, Any] = field(default_factory=dict)


class CaptionedSource(Protocol):
    """Images with captions, in blocks. `num_images`: entries of all blocks together, skipped ones included."""

    num_images: int

    def blocks(self, order: random.Random | None) -> Iterator[list[Captioned | Skipped]]:
        """The blocks in an order drawn from `order`, or their own."""


class Listing:
    """A source that is one block."""

    def __init__(self, entries: list[Captioned | Skipped]):
        self.entries, self.num_images = entries, len(entries)

    def blocks(self, order: random.Random | None) -> Iterator[list[Captioned | Skipped]]:
        yield self.entries


def captions_of(value: Any) -> list[str]:
    """A cell as captions: none, a text, or several texts.

    Raises:
        TypeError: it is neither.
    """
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"the caption is {str(value)[:60]!r}, not text")
    return texts


def choose_column(setting: str, given: str, candidates: Iterable[str], columns: Iterable[str], where: Path) -> str:
    """The column that a setting names, else the first candidate that there is.

    Raises:
        UserError: there is none.
    """
    columns = [column for column in columns if column]
    found = [name for name in ([given] if given else candidates) if name in columns]
    if not found:
        wanted = f"no column {given!r}" if given else f"no column that can be taken for {setting}"
        raise UserError(f"{where} has {wanted}; its columns are {', '.join(columns)}; name one by {setting}=…")
    return found[0]


def of_one_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """The files of one split, so that held-out images do not slip into a training set unnoticed.

    Raises:
        UserError: `split` has no file; or it is not given, and the files belong to several.
    """
    of_file = {file: split_of(file.relative_to(root).as_posix()) for file in files}
    found = sorted(set(of_file.values()) - {""})
    if not split and len(found) > 1:
        raise UserError(f"source={root} holds the splits {', '.join(found)}; choose one, as in split={found[-1]}")
    if split and split not in found:
        raise UserError(f"split={split}: source={root} has {', '.join(found) or 'no splits, so leave it out'}")
    return [file for file in files if not split or of_file[file] == split]


def split_of(path: str) -> str:
    """``train`` of ``data/train-00000-of-00004.parquet`` and of ``training/metadata.csv``; empty if none is named."""
    if numbered := re.search(r"([^/]+)-\d{5}-of-\d{5}", path):
        return numbered[1]
    words = (re.match(r"[a-z]+", part) for part in path.lower().split("/"))
    return next((SPLITS[word[0]] for word in words if word and word[0] in SPLITS), "")
