"""Images with captions in the parquet files of a Hugging Face data set."""

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import types

from common.errors import UserError
from tools.captioned import CAPTION_COLUMNS, IMAGE_COLUMNS, Captioned, captions_of, spelled
from training.data.parquet import open_parquet, read_footer, rows_of
from training.data.paths import choose_column
from training.data.sources import MALFORMED_ITEM, Skipped


class CaptionedParquet:
    """A row is an image: a column of encoded bytes or of ``{"bytes", "path"}``, and one of a text or a list of texts.

    Args:
        files: of one schema; paths in them are relative to the file's folder.
        image_column: empty means the only column of images, or the first of `IMAGE_COLUMNS` among several.
        caption_column: empty means the first of `CAPTION_COLUMNS`.
        extra: read the other columns as well.

    Raises:
        UserError: a file cannot be read, or has not these columns.
    """

    def __init__(self, files: list[Path], image_column: str = "", caption_column: str = "", extra: bool = False):
        self.groups: list[tuple[Path, int, int]] = []  # file, row group, number of its first row
        self.num_images, self.columns = 0, {}
        for file in files:
            footer = read_footer(file)
            if footer.error:
                with file.open("rb") as content:
                    pointer = content.read(24).startswith(b"version https://git-lfs")
                remedy = "it is a pointer of Git LFS: run `git lfs pull`" if pointer else "fetch the file again"
                raise UserError(f"{footer.error}; {remedy}")
            self.columns[file] = self._choose(file, footer.schema, image_column, caption_column, extra)
            for group, count in enumerate(footer.rows):
                self.groups.append((file, group, self.num_images))
                self.num_images += count

    @staticmethod
    def _choose(file: Path, schema: pyarrow.Schema, image: str, caption: str, extra: bool) -> list[str]:
        """The columns to read, those of the images and captions first."""
        image_columns = [field.name for field in schema if _holds_images(field.type)]
        paths = [name for name in IMAGE_COLUMNS if name in schema.names and name not in image_columns]
        known = [name for name in IMAGE_COLUMNS if name in image_columns]
        candidates = image_columns if len(image_columns) == 1 else known + paths
        image = choose_column(file, schema.names, [image] if image else candidates, "image_column=…")
        captions = spelled([caption] if caption else CAPTION_COLUMNS, schema.names)
        caption = choose_column(file, schema.names, captions, "caption_column=…")
        if not _holds_text(schema.field(caption).type):
            wrong = f"column {caption!r} holds {schema.field(caption).type}, not text; name another by caption_column=…"
            raise UserError(f"{file}: {wrong}")
        others = [f.name for f in schema if f.name not in (image, caption) and not _holds_images(f.type)]
        return [image, caption, *(others if extra else ())]

    def blocks(self, order: random.Random | None) -> Iterator[list[Captioned | Skipped]]:
        """Row groups, in an order drawn from `order`; `UserError` if a file is damaged."""
        groups = order.sample(self.groups, len(self.groups)) if order else self.groups
        for file, group, first in groups:
            try:
                with open_parquet(file) as content:
                    rows = content.read_row_group(group, columns=self.columns[file])
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{file}, row group {group}, is damaged ({error}); fetch the file again") from None
            yield [self._entry(file, first + number, row) for number, row in enumerate(rows_of(rows))]

    def _entry(self, file: Path, number: int, row: dict | ValueError) -> Captioned | Skipped:
        image, caption, *others = self.columns[file]
        name = f"{file}, record {number}"
        if isinstance(row, ValueError):
            return Skipped(MALFORMED_ITEM, f"{name}: {row}")
        try:
            extra = {other: row[other] for other in others}
            image_data = _image_data(row[image], file.parent, name)
            return Captioned(image_data, name, captions_of(row[caption], name), extra)
        except Skipped as skipped:
            return skipped


def _holds_images(kind: pyarrow.DataType) -> bool:
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_text(kind: pyarrow.DataType) -> bool:
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)


def _image_data(value, folder: Path, name: str) -> bytes | Path:
    """Bytes, or the file that ``path`` names; raises `Skipped` if neither is there."""
    if isinstance(value, dict):
        value = value["bytes"] or value.get("path")
    if isinstance(value, str):
        return folder / value
    if not isinstance(value, bytes) or not value:
        raise Skipped(MALFORMED_ITEM, f"{name}: no image")
    return value
