"""Turns images with captions, however they are kept, into WebDataset shards that every image flow reads.

    python3 tools/make_shards.py source=~/pets output=data/pets/train

`source` is a folder: images with a text beside each (``a.jpg``, ``a.txt``), or with ``metadata.csv`` or
``metadata.jsonl`` (Hugging Face's imagefolder), or parquet files (a data set as the hub keeps it). With `captions=FILE`
a table names the images, with `captions=folders` the folders they lie in (ImageNet):

    … source=coco/train2017 captions=coco/annotations/captions_train2017.json output=data/coco/train
    … source=flickr8k/Images captions=flickr8k/captions.txt output=data/flickr/train       (csv, tsv, jsonl, json)
    … source=~/datasets/some-hub-dataset split=train caption_column=prompt output=data/some/train resize=512

    … source=imagenet captions=folders output=data/imagenet/train

With `documents=FILE` (json, jsonl, csv or parquet) it makes samples of documents, in which texts and images take turns,
in any form that docs/data.md describes; image names are relative to `source`, or to the folder of the file:

    … source=vist/images documents=vist/stories.json output=data/vist/train

Each sample is the image's own bytes and ``txt``. An image with several captions (COCO has five) becomes several
samples, so that an epoch sees all; `captions_per_image=join` or `first` makes one. A document is ``json`` and its
images, ``0.jpg``, ``1.png``, …. Images that cannot be read, documents with such images, files that are missing and
empty captions are left out and counted. `holdout=0.05` keeps a twentieth of the images for evaluation, in
``{output}_heldout-000000.tar``; documents that begin with the same image stay together. `{output}-manifest.json` lists
the shards. The same source and settings give the same bytes; an existing set is kept until the new one is complete.
"""

import io
import json
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import common  # noqa: F401  Ctrl-C is one word from here on

from PIL import ExifTags, Image

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import check_file, kind_of, visible_files
from common.progress import progress
from common.schema import ImageSection
from common.settings import setting
from models.images import DEFAULT, MAX_BYTES, ImageOptions, has_rotation, is_deep, open_image, resized_size
from tools.captioned import (
    NO_CAPTION,
    Captioned,
    CaptionedSource,
    Listing,
    beside_texts,
    in_class_folders,
    in_table,
    is_image_file,
    of_one_split,
)
from tools.captioned_parquet import CaptionedParquet
from tools.holdout import Holdout
from tools.shard_writing import counted, heldout_prefix, in_order, new_set, write_manifest, write_shards
from training.data.documents import TurnWords, form_of, located, open_documents, read_segments, record_of
from training.data.llava import read_turns
from training.data.paths import JSON, PARQUET, TABLES, expand_paths, has_suffix
from training.data.sources import (
    EMPTY_TEXT,
    MALFORMED_ITEM,
    MISSING_FILE,
    ROTATED,
    UNREADABLE_IMAGE,
    SkipCounters,
    Skipped,
    Units,
    checked_text,
)

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # PIL's name → member; others become PNG
DOCUMENTS = PARQUET + JSON + TABLES
OF_CAPTIONS = ("captions", "image_column", "caption_column", "split", "captions_per_image", "txt_lines")
CLASS_FOLDERS = "folders"  # in place of a table


@dataclass
class MakeShardsConfig:
    source: str = setting("???", "folder of images or of a Hugging Face data set")
    output: str = setting("???", "prefix of the shards: {output}-000000.tar")
    captions: str = setting("", "table that names images in source; folders: their classes; empty: those in source")
    documents: str = setting("", "file, brace list or glob of documents, whose images are in source")
    image_column: str = setting("", "of a table or parquet; empty: the usual names")
    caption_column: str = setting("", "of a table or parquet; empty: the usual names")
    split: str = setting("", "of a Hugging Face data set; needed where it has several")
    captions_per_image: str = setting("each", "samples of an image", choices=("each", "join", "first"))
    txt_lines: bool = setting(False, "each line of a .txt beside an image is a caption")
    metadata: bool = setting(False, "keep the other columns, or keys of a document, in the member json")
    resize: int = setting(0, "scale larger images until their shorter side is this; 0 keeps every byte", low=0)
    quality: int = setting(95, "of the JPEG and WebP images that were scaled", low=1, high=100)
    shard_size: int = setting(1000, "samples in a shard", low=1)
    holdout: float = setting(0.0, "share of the images kept out for evaluation, in {output}_heldout", low=0, high=0.5)
    shuffle: bool = setting(True, "shuffle images; of parquet, row groups, and rows within each")
    seed: int = setting(0, "of the shuffled order and of what is held out")
    num_workers: int = setting(4, "threads that read and check images", low=1, high=1024)
    overwrite: bool = setting(False, "replace another data set of this prefix")
    image: ImageSection = field(default_factory=ImageSection)


# ---- where images and captions are ----


class DocumentSource:
    """Documents as `CaptionedSource` has images: raw samples, in blocks of a record or a row group of parquet."""

    def __init__(self, units: Units):
        self.units, self.num_images = units, units.samples

    def blocks(self, order: random.Random | None) -> Iterator[list[dict | Skipped]]:
        numbers = range(len(self.units))
        for number in order.sample(numbers, len(numbers)) if order else numbers:
            yield list(self.units.read(number, order or random.Random(0)))


def open_source(config) -> CaptionedSource | DocumentSource:
    """The images, or documents, that the settings name; `UserError` if there are none, or none with a caption, or a
    table or column is missing."""
    folder = Path(config.source)
    if not folder.is_dir():
        raise UserError(f"source={config.source} is no folder that exists; give the one that holds the images")
    if config.documents:
        given = [key for key in OF_CAPTIONS if config[key] != getattr(MakeShardsConfig, key)]
        if given:
            raise UserError(f"{given[0]}={config[given[0]]} is of images with captions; leave it out with documents=…")
        files = expand_paths("documents", config.documents, DOCUMENTS)
        if strange := [file for file in files if not has_suffix(file, DOCUMENTS)]:
            raise UserError(f"documents: {strange[0]} is no file of {', '.join(DOCUMENTS)}")
        return DocumentSource(open_documents(files, buffer_size=0))
    if config.captions == CLASS_FOLDERS:
        return Listing(in_class_folders(folder))
    columns = (config.image_column, config.caption_column)
    if config.captions:
        return Listing(in_table(Path(config.captions), folder, *columns))
    files = visible_files(folder)
    if tables := [file for file in files if file.name.lower() in ("metadata.csv", "metadata.jsonl")]:
        tables = of_one_split(tables, folder, config.split)
        return Listing([entry for table in tables for entry in in_table(table, table.parent, *columns)])
    if entries := beside_texts(files, folder, config.txt_lines):
        return Listing(entries)
    if parquet := [file for file in files if has_suffix(file.name, PARQUET)]:
        return CaptionedParquet(of_one_split(parquet, folder, config.split), *columns, config.metadata)
    raise UserError(f"source={config.source}: no captions found; {_advice(files)}")


def _advice(files: list[Path]) -> str:
    if any(file.suffix == ".arrow" for file in files):
        return "it is a data set saved with save_to_disk: save it with to_parquet instead"
    if num_images := sum(map(is_image_file, files)):
        ways = "put a .txt beside each, name a table with captions=FILE, or take their folders with captions=folders"
        return f"it holds {num_images} images: {ways}"
    return "it holds neither images with a .txt beside them, nor metadata.csv or metadata.jsonl, nor parquet files"


# ---- from images to samples ----


def entries_of(source: CaptionedSource | DocumentSource, config) -> Iterator[Captioned | dict | Skipped]:
    """One entry for each sample, a document or an image with one caption, in the order of the shards."""
    rng = random.Random(config.seed) if config.shuffle else None
    for block in source.blocks(rng):
        entries = [one for entry in block for one in split_captions(entry, config.captions_per_image)]
        if rng:
            rng.shuffle(entries)
        yield from entries


def split_captions(entry: Captioned | dict | Skipped, how: str) -> list[Captioned | dict | Skipped]:
    """The entries with one caption that an entry becomes; `how` is the setting `captions_per_image`."""
    if not isinstance(entry, Captioned):
        return [entry]
    captions = [caption.strip() for caption in entry.captions]
    if not captions:
        return [Skipped(NO_CAPTION, entry.name)]
    if how != "each":
        captions = [" ".join(captions) if how == "join" else captions[0]]
    return [replace(entry, captions=[caption]) for caption in captions]


def make_sample(entry: Captioned | dict | Skipped, config) -> dict[str, bytes] | Skipped:
    """Members of a sample by suffix, read and checked."""
    if isinstance(entry, Skipped):
        return entry
    try:
        if isinstance(entry, dict):
            return document_members(entry, config)
        text = checked_text(entry.captions[0], entry.name).strip()
        if not text:
            return Skipped(EMPTY_TEXT, entry.name)
        image = image_members(entry.image, entry.name, config)
    except Skipped as skipped:
        return skipped
    extra = {"json": json.dumps(entry.extra, default=str).encode()} if config.metadata else {}
    return {**image, "txt": text.encode(), **extra}


def document_members(raw: dict, config) -> dict[str, Any]:
    """The members of a document: its images by number, and its record with their names; `Skipped` as `image_members`,
    or if it is malformed.

    A conversation stays one, since its words depend on the model.
    """
    record, name = record_of(raw), raw["__key__"]
    form, keys = form_of([key for key, value in record.items() if value is not None])
    segments, images, notes = read_segments(record, name, TurnWords()), {}, {}
    for segment in (segment for segment in segments if "image" in segment):
        image = located(segment["image"], raw, config.source).get("image")
        if not isinstance(image, bytes | str):
            raise Skipped(MALFORMED_ITEM, f"{name}: {kind_of(image)} in place of an image")
        made = image_members(Path(image) if isinstance(image, str) else image, name, config)
        notes |= dict.fromkeys(made.pop("_notes", ()))
        ((suffix, data),) = made.items()
        segment["image"] = f"{len(images)}.{suffix}"
        images[segment["image"]] = data
    content = {"segments": segments}
    if "turns" in keys:
        content = {"image": list(images), "conversations": read_turns(record[keys["turns"]], name)}
    if config.metadata:
        content |= {key: value for key, value in record.items() if key not in keys.values()}
    sample = {**images, "json": json.dumps(content, default=str).encode()}
    return sample | ({"_notes": tuple(notes)} if notes else {})


def image_members(image: bytes | Path, name: str, config) -> dict[str, Any]:
    """The member of an image by its suffix; with `_notes` if EXIF data say that it is to be turned.

    Args:
        config: settings `resize`, `quality` and `image`.

    Raises:
        Skipped: it does not exist or cannot be read.
    """
    try:
        data = image if isinstance(image, bytes) else check_file(image, f"image {name}", MAX_BYTES).read_bytes()
    except (UserError, OSError) as error:
        raise Skipped(MISSING_FILE, str(error)) from None
    try:
        options = ImageOptions(config.image.exif, config.image.background)
        suffix, data, is_rotated = checked_image(data, config.resize, config.quality, name, options)
    except UserError as error:
        raise Skipped(UNREADABLE_IMAGE, str(error)) from None
    return {suffix: data} | ({"_notes": (ROTATED,)} if is_rotated else {})


def checked_image(
    data: bytes, resize: int, quality: int, name: str = "", options: ImageOptions = DEFAULT
) -> tuple[str, bytes, bool]:
    """Decode an image to its end; keep its bytes unless it is to be scaled or rotated, or no flow reads its format.

    Returns:
        member suffix, bytes, whether their EXIF data say that the image is to be turned, which `options` ignore.

    Raises:
        UserError: it cannot be decoded.
    """
    rgb = open_image(data, name, options)
    with Image.open(io.BytesIO(data)) as image:
        suffix = SUFFIXES.get(image.format)
        scaled_to_8_bits = is_deep(image)
        if image.format == "TIFF":
            image.load()  # which turns it
        rotation = image.getexif()[ExifTags.Base.Orientation] if has_rotation(image) else None
    is_turned = options.exif == "apply" and rotation is not None
    is_scaled = 0 < resize < min(rgb.size)
    is_rotated = rotation is not None and not is_turned
    if suffix and not (is_scaled or scaled_to_8_bits or is_turned):
        return suffix, data, is_rotated
    if is_scaled:
        rgb = rgb.resize(resized_size(rgb.size, resize, name), Image.Resampling.BICUBIC)
    exif, buffer = Image.Exif(), io.BytesIO()
    if is_rotated:
        exif[ExifTags.Base.Orientation] = rotation  # so that it can still be turned later
    more = {"exif": exif} if is_rotated else {}
    rgb.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}.get(suffix, "PNG"), quality=quality, **more)
    return suffix or "png", buffer.getvalue(), is_rotated


# ---- from samples to shards ----


def make_shards(source: CaptionedSource | DocumentSource, config) -> tuple[dict, SkipCounters]:
    """Writes the data set; returns its manifest and the counters of seen and skipped images; `UserError` if another
    data set is there, nothing could be read, or the disk is full."""
    counters, bar = SkipCounters(), progress(total=source.num_images, unit=" samples", desc="writing shards")
    with new_set(config) as new, bar:
        heldout, make = Holdout(new, config, source.num_images), partial(make_sample, config=config)
        made = in_order(make, entries_of(source, config), config.num_workers, ahead=8 * config.num_workers)
        keyed = (one if isinstance(one, Skipped) else {"__key__": f"{n:08d}", **one} for n, one in enumerate(made))
        samples = counted(keyed, counters, bar, name=lambda key: f"number {int(key)}")
        shards = write_shards(new, heldout.divert(samples), config.shard_size)
        return write_manifest(new, shards, counters, config, heldout=heldout.entries), counters


def main(argv: list[str]) -> None:
    config = read_settings(argv, MakeShardsConfig, "source=~/pets output=data/pets/train")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit, which is allowed
    manifest, counters = make_shards(open_source(config), config)
    print(f"{config.output}: {manifest['samples']} samples in {len(manifest['shards'])} shards")
    if heldout := manifest["heldout"]:
        held = sum(entry["samples"] for entry in heldout)
        print(f"{heldout_prefix(Path(config.output))}: {held} samples held out in {len(heldout)} shards")
    counters.print()


if __name__ == "__main__":
    run_cli(main)
