"""Images with captions, found but not yet read: texts beside images, folders of classes, tables (csv, json, COCO).

A source yields blocks: lists of `Captioned` images, and of `Skipped` for entries that are unusable. A block fits in
memory: a whole listing, or one row group of a parquet file.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.files import check_file, json_lines, kind_of, read_json, read_text
from common.files import field as member
from training.data.delimited import MAX_TABLE, Delimited
from training.data.imagenet import ImageFolder
from training.data.paths import IMAGES, choose_column, has_suffix
from training.data.sources import EMPTY_TEXT, MALFORMED_ITEM, MISSING_FILE, Skipped

NO_CAPTION = "no_caption"  # an image without a caption; `empty_text` is an empty caption
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "file", "filepath", "image_name", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "description", "sentences", "sentence", "comment", "title")
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"training": "train", "test": "test"}
TEXT_SUFFIXES = (".txt", ".text", ".caption")
TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
MAX_CAPTIONS = 2**24  # bytes of a text beside an image
Choose = Callable[[list[str] | dict], tuple[str, str]]  # the columns of a table → those of images and captions


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


def captions_of(value: Any, where: str) -> list[str]:
    """A cell as captions: none, a text, or several texts; raises `Skipped` if it is neither."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise Skipped(MALFORMED_ITEM, f"{where}: the caption is {str(value)[:60]!r}, not text")
    return texts


def of_one_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """The files of one split, so that held-out images do not slip into a training set unnoticed; `UserError` if `split`
    has no file; or it is not given, and the files belong to several."""
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


def is_image_file(file: Path) -> bool:
    return has_suffix(file.name, IMAGES)


# ---- texts beside the images ----


def beside_texts(files: list[Path], root: Path, lines: bool) -> list[Captioned | Skipped]:
    """``a.jpg`` with ``a.txt`` or ``a.jpg.txt``; empty if there is not one such text.

    Args:
        files: images, texts and anything else, below `root`.
        lines: each line of a text is a caption of its own, not the whole text one.
    """
    found = [file for file in files if has_suffix(file.name, TEXT_SUFFIXES)]
    # `IMG_1.JPG` has `IMG_1.TXT` or `IMG_1.txt` beside it; a text has its exact name before that of another.
    texts = {file.with_suffix(file.suffix.lower()): file for file in found} | {file: file for file in found}
    places = {file: _text_of(file, texts) for file in files if is_image_file(file)}
    if not any(places.values()):
        return []
    # A text of no image is counted: its image may be a dangling link, or of a format that nobody knows.
    alone = sorted(set(texts.values()) - set(places.values()))
    entries = [_beside(image, text, root, lines) for image, text in places.items()]
    return [
        *entries,
        *(Skipped(MISSING_FILE, f"{text}: no {text.stem}.png or other image beside it") for text in alone),
    ]


def _text_of(image: Path, texts: dict[Path, Path]) -> Path | None:
    names = (name + suffix for suffix in TEXT_SUFFIXES for name in (image.stem, image.name))
    return next((texts[place] for name in names if (place := image.with_name(name)) in texts), None)


def _beside(image: Path, text: Path | None, root: Path, lines: bool) -> Captioned | Skipped:
    if text is None:
        return Skipped(NO_CAPTION, f"{image}: no {image.stem}{TEXT_SUFFIXES[0]} beside it")
    try:
        content = read_text(text, limit=MAX_CAPTIONS)
    except UserError as error:
        return Skipped(MALFORMED_ITEM, str(error))
    captions = [line for line in content.splitlines() if line.strip()] if lines else []
    return Captioned(image, str(image), captions or [content], {"file_name": image.relative_to(root).as_posix()})


def in_class_folders(folder: Path) -> list[Captioned]:
    """``{class}/{file}``, called by the name of its class as the imagenet1k flow calls it."""
    classes, unused = ImageFolder(str(folder), suffixes=IMAGES), random.Random(0)
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

    def choose(names: list[str] | dict) -> tuple[str, str]:
        images, captions = (
            [image_column] if image_column else IMAGE_COLUMNS,
            [caption_column] if caption_column else CAPTION_COLUMNS,
        )
        image = choose_column(table, names, spelled(images, names), "image_column=…")
        return image, choose_column(table, names, spelled(captions, names), "caption_column=…")

    entries: dict[str, Captioned | Skipped] = {}
    columns: tuple[str, str] | None = None
    for number, row in enumerate(_rows(table, choose), 1):
        where = f"{table}: record {number}"
        if isinstance(row, Skipped):
            entries[where] = row
            continue
        columns = columns or choose(row)
        file = row.get(columns[0])
        try:
            if not isinstance(file, str) or not file.strip():
                raise Skipped(MALFORMED_ITEM, f"{where}: the image is {kind_of(file)}, not the name of a file")
            captions = captions_of(row.get(columns[1]), where)
        except Skipped as skipped:
            entries[where] = skipped
            continue
        if not any(map(str.strip, captions)):  # counted even if the image has a caption in another row
            entries[where] = Skipped(EMPTY_TEXT if captions else NO_CAPTION, f"{where}: {file}")
        elif file in entries:
            entries[file].captions.extend(captions)
        else:
            extra = {key: value for key, value in row.items() if key and key != columns[1]}
            entries[file] = Captioned(folder / file, str(folder / file), list(captions), extra)
    return list(entries.values())


def spelled(candidates: Iterable[str], names: Iterable[str]) -> list[str]:
    """Candidates for a column, each followed by those names that differ from it in capitals only."""
    return [name for one in candidates for name in (one, *names) if name.lower() == one.lower()]


def _rows(table: Path, choose: Choose) -> Iterator[dict | Skipped]:
    """Records of a table, each a dictionary by column."""
    check_file(table, f"captions={table}")
    if not has_suffix(table.name, TABLES):
        raise UserError(f"captions={table} must be a file of {', '.join(TABLES)}")
    if has_suffix(table.name, (".jsonl",)):
        records = (record for _, _, record in json_lines(table))
        yield from (one if isinstance(one, dict) else Skipped(MALFORMED_ITEM, str(one)) for one in records)
    else:
        yield from _json_records(table) if has_suffix(table.name, (".json",)) else _delimited_rows(table, choose)


def _delimited_rows(table: Path, choose: Choose) -> Iterator[dict | Skipped]:
    content = Delimited(read_text(table, f"captions={table}", limit=MAX_TABLE))
    if not (header := content.header):
        raise UserError(f"captions={table} is empty")
    _, caption = choose(header)
    for row in content.rows(text_is_last=caption == header[-1]):
        if row.problem:
            yield Skipped(MALFORMED_ITEM, f"{table}: {row.problem}")
        else:
            yield dict(zip(header, row.cells, strict=True))


def _json_records(table: Path) -> Iterator[dict | Skipped]:
    try:
        content = read_json(table, f"captions={table}", kind=None, limit=MAX_TABLE)
    except UserError as error:
        raise UserError(f"{error}; for one record a line, name it .jsonl") from None
    if isinstance(content, list):
        for number, item in enumerate(content, 1):
            where = f"{table}: record {number} is {kind_of(item)}, no object"
            yield item if isinstance(item, dict) else Skipped(MALFORMED_ITEM, where)
    elif isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        yield from _coco(content, table)
    elif isinstance(content, dict):
        yield from ({"file_name": file, "caption": caption} for file, caption in content.items())
    else:
        wanted = "neither COCO captions nor a list of records nor file names with captions"
        raise UserError(f"captions={table} holds {wanted}")


def _coco(content: dict, table: Path) -> Iterator[dict | Skipped]:
    """One record for each image of COCO's captions (``images`` by ``id``, ``annotations`` by ``image_id``)."""
    images, notes = (member(content, key, list, f"captions={table}") for key in ("images", "annotations"))
    if notes and not any(isinstance(note, dict) and "caption" in note for note in notes):
        wanted = "take COCO's captions_*.json, not its instances or keypoints"
        raise UserError(f"captions={table} is like COCO but lacks captions ('caption' is missing); {wanted}")
    files, captions = {}, {}  # by the image's id; no captions where all are unusable
    for number, image in enumerate(images, 1):
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and "id" in image:
            files[str(image["id"])] = image
        else:
            yield Skipped(MALFORMED_ITEM, f"{table}: image {number} lacks 'id' or 'file_name'")
    for number, note in enumerate(notes, 1):
        where, note = f"{table}: annotation {number}", note if isinstance(note, dict) else {}
        text, key = note.get("caption"), str(note.get("image_id"))
        if not isinstance(text, str) or key not in files:
            yield Skipped(MALFORMED_ITEM, f"{where} has no caption, or names no image of the list: {str(note)[:60]}")
            text = ""
        elif not text.strip():
            yield Skipped(EMPTY_TEXT, where)
        captions.setdefault(key, []).extend([text] if text.strip() else ())
    for key, image in files.items():
        if captions.get(key):
            yield {"file_name": image["file_name"], "caption": captions[key], "image_id": image["id"]}
        elif key not in captions:
            yield Skipped(NO_CAPTION, f"{table}: image {key} ({image['file_name']})")
