"""Images that are files: texts beside them, folders named after their classes, a table (csv, jsonl, json, COCO)."""

import csv
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import UserError
from training.data.captioned import CAPTION_COLUMNS, IMAGE_COLUMNS, NO_CAPTION, Captioned, captions_of, choose_column
from training.data.imagenet import ImageFolder
from training.data.skipping import MALFORMED_ITEM, Skipped

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEXT_SUFFIXES = (".txt", ".text", ".caption")
TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
DELIMITERS = ("\t", "|", ";", ",")


def list_files(folder: Path) -> list[Path]:
    """All files at any depth, sorted, without hidden ones; links to folders are followed."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def is_image_file(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES


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
            choose_column("image_column", image_column, IMAGE_COLUMNS, row, table),
            choose_column("caption_column", caption_column, CAPTION_COLUMNS, row, table),
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
