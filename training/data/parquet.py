"""Parquet files as raw samples, read row group by row group (spec §15)."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from common.errors import UserError, shown
from training.data.paths import choose_column
from training.data.sources import MALFORMED_ITEM, MISSING_FILE, TRUNCATED_SHARD, Skipped, mixed

IMAGE_COLUMNS = ("codes", "image", "jpg", "png", "jpeg", "webp", "picture", "img", "image_bytes", "image_path")
TEXT_COLUMNS = ("text", "caption", "txt", "captions", "prompt", "description")
ROWS = 128  # decoded at once; a row group may be larger than memory


@dataclass
class Footer:
    """A parquet file's columns, and rows per row group; `error` if it cannot be read."""

    schema: pyarrow.Schema | None = None
    rows: tuple[int, ...] = (0,)
    error: str = ""


def open_parquet(path: str | Path) -> pyarrow.parquet.ParquetFile:
    """A parquet file; pyarrow itself refuses names that are no UTF-8."""
    return pyarrow.parquet.ParquetFile(path if shown(path) == str(path) else open(path, "rb"))


def read_footer(path: str | Path) -> Footer:
    try:
        with open_parquet(path) as file:
            groups = (file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))
            return Footer(file.schema_arrow, tuple(groups))
    except (OSError, pyarrow.ArrowException) as error:
        return Footer(error=f"{path}: {error}")


class ParquetUnits:
    """Row groups of parquet files; a raw sample is a dictionary: ``__key__``, and the columns under given names.

    Args:
        paths: the files. One whose end cannot be read is a unit that is skipped.
        columns: name in the raw sample → the names its column may have; the first that a file has is read.
        settings: name in the raw sample → the key that names its column, for messages.
        buffer_size: rows of a group are mixed in a buffer of this size.

    Raises:
        UserError: no file can be read or has a row, or a file lacks a column.
    """

    def __init__(
        self, paths: list[str], columns: dict[str, tuple[str, ...]], settings: dict[str, str], buffer_size: int = 1000
    ):
        self.paths, self.wanted, self.settings, self.buffer_size = paths, columns, settings, buffer_size
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(read_footer, paths))
        if not any(sum(footer.rows) for footer in footers):
            why = next((f": {footer.error}" for footer in footers if footer.error), "")
            raise UserError(f"{paths[0]} and {len(paths) - 1} more hold not a single row{why}")
        self.columns = []  # of each file: column → its name in the raw sample
        for path, footer in zip(paths, footers, strict=True):
            self.columns.append({} if footer.error else self._chosen(path, footer.schema.names))
        # Numbers in arrays: loader workers share them, while lists would be copied as they are counted.
        self.file_of = np.repeat(np.arange(len(paths)), [len(footer.rows) for footer in footers])
        self.group_of = np.concatenate([np.arange(len(footer.rows)) for footer in footers])
        self.samples = sum(sum(footer.rows) for footer in footers)
        whole = [sum(footer.rows) for footer in footers if not footer.error]
        mean = max(1, round(sum(whole) / len(whole)))  # estimate for files without a readable footer
        rows = [[mean] if footer.error else footer.rows for footer in footers]
        self.rows_of = np.concatenate(rows)

    def _chosen(self, path: str, found: list[str]) -> dict[str, str]:
        """Those columns of a file that are read → their names in the raw sample."""
        return {choose_column(path, found, names, self.settings[name]): name for name, names in self.wanted.items()}

    def __len__(self) -> int:
        return len(self.file_of)

    def read(self, index: int, rng: random.Random) -> Iterator[dict | Skipped]:
        """Rows of one group, mixed; one `Skipped` where it cannot be read on."""
        place = int(self.file_of[index]), int(self.group_of[index])
        return mixed(self._rows(*place, int(self.rows_of[index])), self.buffer_size, rng)

    def _rows(self, file: int, group: int, rows: int) -> Iterator[dict | Skipped]:
        path, names, number = self.paths[file], self.columns[file], 0
        try:
            with open_parquet(path) as content:
                batches = content.iter_batches(ROWS, [group], columns=list(names), use_threads=False)
                for batch in batches:
                    for row in rows_of(batch):
                        key = f"{path}: row group {group}, row {number}"
                        number += 1
                        if isinstance(row, ValueError):
                            yield Skipped(MALFORMED_ITEM, f"{key}: {row}")
                            continue
                        sample = {name: row[column] for column, name in names.items()}
                        yield {"__key__": key, "__url__": path, **sample}
        except FileNotFoundError:
            yield Skipped(MISSING_FILE, path, rows - number)
        except (OSError, pyarrow.ArrowException) as error:
            yield Skipped(TRUNCATED_SHARD, f"{path}: row group {group}: {error}", max(1, rows - number))


def rows_of(batch: pyarrow.RecordBatch | pyarrow.Table) -> list[dict | ValueError]:
    """The rows as Python values, or the error of a row: parquet requires UTF-8, but not all writers comply."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # of UTF-8, or of dates that Python does not have
        if len(batch) == 1:
            return [ValueError(str(error))]
        return [row for number in range(len(batch)) for row in rows_of(batch.slice(number, 1))]
