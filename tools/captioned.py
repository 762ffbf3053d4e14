"""Images with captions, found but not yet read: texts beside images, folders of classes, tables (csv, json, COCO).

A source yields blocks: lists of `Captioned` images, and of `Skipped` for entries that are unusable. A block fits in
memory: a whole listing, or one row group of a parquet file.
"""

import csv
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from training.data.imagenet import ImageFolder
from training.data.paths import choose_column
from training.data.sources import MALFORMED_ITEM, Skipped

NO_CAPTION = "no_caption"  # an image without a caption; `empty_text` is an empty caption
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file", "filepath", "image_name", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "description", "sentences", "sentence", "comment", "title")
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"training": "train", "test": "test"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEXT_SUFFIXES = (".txt", ".text", ".caption")
TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
DELIMITERS = ("\t", "|", ";", ",")


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


# ---- files ----


def list_files(folder: Path) -> list[Path]:
    """All files at any depth, sorted, without hidden ones; links to folders are followed."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def is_image_file(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


# ---- texts beside the images ----


def beside_texts(files: list[Path], root: Path, lines: bool) -> list[Captioned | Skipped]:
    """``a.jpg`` with ``a.txt`` or ``a.jpg.txt``; empty if there is not one such text.

    Args:
        files: images, texts and anything else, below `root`.
        lines: each line of a text is a caption of its own, not the whole text one.
    """
    texts = {file for file in files if file.suffix in TEXT_SUFFIXES}
    image_files = [file for file in files if is_image_file(file)]
    entries = [_beside(file, texts, root, lines) for file in image_files]
    nothing = all(isinstance(entry, Skipped) and entry.kind == NO_CAPTION for entry in entries)
    return [] if nothing else entries


def _beside(image_file: Path, texts: set[Path], root: Path, lines: bool) -> Captioned | Skipped:
    names = [name for suffix in TEXT_SUFFIXES for name in (image_file.stem + suffix, image_file.name + suffix)]
    text = next((image_file.with_name(name) for name in names if image_file.with_name(name) in texts), None)
    if text is None:
        return Skipped(NO_CAPTION, f"{image_file}: no {names[0]} beside it")
    try:
        content = text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Skipped(MALFORMED_ITEM, f"{text}: {error}")
    captions = [line for line in content.splitlines() if line.strip()] if lines else []
    extra = {"file_name": image_file.relative_to(root).as_posix()}
    return Captioned(image_file, str(image_file), captions or [content], extra)


def in_class_folders(folder: Path) -> list[Captioned]:
    """``{class}/{file}``, called by the name of its class as the imagenet1k flow calls it."""
    classes, unused = ImageFolder(str(folder)), random.Random(0)
    raws = (raw for index in range(len(classes)) for raw in classes.read(index, unused))
    return [Captioned(Path(raw["image"]), raw["image"], [raw["text"]], {"file_name": raw["__key__"]}) for raw in raws]


# ---- tables ----


def in_table(table: Path, folder: Path, image_column: str = "", caption_column: str = "") -> list[Captioned | Skipped]:
    """Images that a csv, tsv, jsonl or json (COCO captions, a list of records, or file → captions) names.

    Rows of one image come together, at the place of the first.

    Args:
        folder: that file names of images are relative to.
        image_column, caption_column: empty means the first of `IMAGE_COLUMNS`, `CAPTION_COLUMNS` that there is.

    Raises:
        UserError: the table cannot be read, or has not these columns.
    """
    entries: dict[str, Captioned | Skipped] = {}
    columns: tuple[str, str] | None = None
    for number, row in enumerate(_rows(table), 1):
        where = f"{table}: record {number}"
        if isinstance(row, Skipped):
            entries[where] = row
            continue
        columns = columns or (
            choose_column(table, row, [image_column] if image_column else IMAGE_COLUMNS, "image_column=…"),
            choose_column(table, row, [caption_column] if caption_column else CAPTION_COLUMNS, "caption_column=…"),
        )
        file = row.get(columns[0])
        try:
            if not isinstance(file, str):
                raise TypeError(f"the image is {file!r}, not the name of a file")
            captions = captions_of(row.get(columns[1]))
        except TypeError as error:
            entries[where] = Skipped(MALFORMED_ITEM, f"{where}: {error}")
            continue
        if file in entries:
            entries[file].captions.extend(captions)
        else:
            extra = {key: value for key, value in row.items() if key and key != columns[1]}
            entries[file] = Captioned(folder / file, str(folder / file), list(captions), extra)
    return list(entries.values())


def _rows(table: Path) -> Iterator[dict | Skipped]:
    """Records of a table, each a dictionary by column."""
    if not table.is_file():
        raise UserError(f"captions={table} does not exist (or is no file)")
    readers = {".jsonl": _json_lines, ".json": _json_records}
    if table.suffix.lower() not in TABLES:
        raise UserError(f"captions={table} must be a file of {', '.join(TABLES)}")
    try:
        yield from readers.get(table.suffix.lower(), _csv_rows)(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"captions={table} cannot be read: {error}") from None


def _csv_rows(table: Path) -> Iterator[dict]:
    """The first line names the columns; the separator is the one of tab, | ; , that occurs most often in it."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max(DELIMITERS, key=header.count)
        yield from csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)


def _json_lines(table: Path) -> Iterator[dict | Skipped]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield _record(json.loads(line), table)
            except ValueError as error:
                yield Skipped(MALFORMED_ITEM, f"{table}: line {number}: {error}")


def _json_records(table: Path) -> Iterable[dict | Skipped]:
    try:
        content = json.loads(table.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"captions={table} is no valid JSON ({error}); for one record a line, name it .jsonl") from None
    if isinstance(content, list):
        return [_record(item, table) for item in content]
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return _coco(content, table)
    if isinstance(content, dict):
        return [{"file_name": file, "caption": caption} for file, caption in content.items()]
    raise UserError(f"captions={table} holds neither COCO captions nor a list of records nor file names with captions")


def _record(item, table: Path) -> dict | Skipped:
    return item if isinstance(item, dict) else Skipped(MALFORMED_ITEM, f"{table}: {str(item)[:60]!r} is no record")


def _coco(content: dict, table: Path) -> Iterator[dict | Skipped]:
    """One record for each image of COCO's captions (``images`` by ``id``, ``annotations`` by ``image_id``)."""
    captions: dict[int, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            if image["id"] in captions:
                yield {"file_name": image["file_name"], "caption": captions[image["id"]], "image_id": image["id"]}
            else:
                yield Skipped(NO_CAPTION, f"{table}: image {image['id']} ({image['file_name']})")
    except (KeyError, TypeError) as error:
        wanted = "take COCO's captions_*.json, not its instances or keypoints"
        raise UserError(f"captions={table} is like COCO but lacks captions ({error!r} is missing); {wanted}") from None
