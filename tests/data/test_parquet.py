"""Parquet files as raw samples, row group by row group."""

import random

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from tests.training.tiny import write_texts
from training.data.parquet import IMAGE_COLUMNS, TEXT_COLUMNS, ParquetUnits
from training.data.skipping import Skipped
from training.data.sources import Epochs

SETTINGS = {"image": "dataset.params.image_column", "text": "dataset.params.lm_column"}


def texts_of(*paths, column="content", **settings) -> ParquetUnits:
    return ParquetUnits(list(map(str, paths)), {"text": (column,)}, SETTINGS, **settings)


def read_all(units, seed=0) -> list:
    return [raw for index in range(len(units)) for raw in units.read(index, random.Random(seed))]


def test_units_are_row_groups_of_all_files(tmp_path):
    a = write_texts(tmp_path / "a.parquet", [f"text {i}" for i in range(12)], row_group_size=5)
    b = write_texts(tmp_path / "b.parquet", [f"text {i}" for i in range(12, 23)], row_group_size=5)
    units = texts_of(a, b)
    assert len(units) == 6 and units.samples == 23
    assert sorted(raw["text"] for raw in units.read(1, random.Random(0))) == [f"text {i}" for i in range(5, 10)]
    assert {raw["text"] for raw in read_all(units)} == {f"text {i}" for i in range(23)}
    assert read_all(units, 0) == read_all(units, 0) != read_all(units, 1)


def test_an_epoch_covers_every_row_once_over_uneven_streams(tmp_path):
    paths = [write_texts(tmp_path / f"{n}.parquet", [f"{n} {i}" for i in range(9)], row_group_size=4) for n in range(2)]
    source = Epochs(texts_of(*paths))
    rows = [raw["text"] for stream in range(3) for index in range(2) for raw in source.chunk(1, stream, 3, index)]
    assert sorted(rows) == sorted(f"{n} {i}" for n in range(2) for i in range(9))


def test_more_streams_than_row_groups_divide_the_rows(tmp_path):
    source = Epochs(texts_of(write_texts(tmp_path / "a.parquet", [f"{i}" for i in range(50)], row_group_size=100)))
    shares = [[raw["text"] for raw in source.chunk(1, stream, 4, 0)] for stream in range(4)]
    assert sorted(sum(shares, [])) == sorted(map(str, range(50)))
    assert {len(share) for share in shares} == {12, 13}


def test_only_the_wanted_columns_are_read_and_named(tmp_path):
    table = pyarrow.table({"url": ["u"], "caption": ["words"], "image": [b"bytes"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    units = ParquetUnits([str(tmp_path / "a.parquet")], {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}, SETTINGS)
    (raw,) = units.read(0, random.Random(0))
    assert raw["image"] == b"bytes" and raw["text"] == "words"
    assert raw.keys() == {"__key__", "__url__", "image", "text"} and "row group 0, row 0" in raw["__key__"]


def test_files_may_call_their_columns_differently(tmp_path):
    for name, text in (("a", "caption"), ("b", "text")):
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], text: [name]}), tmp_path / f"{name}.parquet")
    files = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    units = ParquetUnits(files, {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}, SETTINGS)
    assert [raw["text"] for raw in read_all(units)] == ["a", "b"]


def test_a_file_without_the_column_is_named_with_its_columns(tmp_path):
    path = write_texts(tmp_path / "a.parquet", ["x"], column="body")
    with pytest.raises(UserError) as error:
        texts_of(path)
    assert "a.parquet has no column 'content'; its columns are body; name one by dataset.params.lm_column" in str(
        error.value
    )
    assert len(texts_of(path, column="body")) == 1


def test_a_file_without_an_end_counts_once_and_the_others_are_read(tmp_path):
    whole = write_texts(tmp_path / "a.parquet", ["x", "y"])
    cut = write_texts(tmp_path / "b.parquet", ["z"] * 50)
    cut.write_bytes(cut.read_bytes()[:-30])
    units = texts_of(whole, cut)
    assert len(units) == 2 and units.samples == 2
    read = read_all(units)
    assert len(read) == 3 and read[2].kind == "truncated_shard" and "b.parquet" in read[2].detail
    assert read[2].count == 2, "as many as the other file holds"
    with pytest.raises(UserError, match=r"b\.parquet and 0 more hold not a single row: .*b\.parquet"):
        texts_of(cut)


def test_a_text_that_is_no_utf_8_is_skipped_and_its_neighbours_are_read(tmp_path):
    offsets, letters = pyarrow.array([0, 1, 3, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xff\xfeb")
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, letters])
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "a.parquet")
    bad, *good = sorted(read_all(texts_of(tmp_path / "a.parquet")), key=lambda raw: isinstance(raw, dict))
    assert bad.kind == "malformed_item" and "a.parquet: row group 0, row 1: 'utf-8' codec" in bad.detail
    assert sorted(raw["text"] for raw in good) == ["a", "b"]


def test_a_damaged_or_lost_row_group_counts_once(tmp_path):
    path = write_texts(tmp_path / "a.parquet", [f"text {i}" * 50 for i in range(400)], row_group_size=100)
    units = texts_of(path)
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(bytes(data))
    read = read_all(units)
    assert [raw.kind for raw in read if isinstance(raw, Skipped)] == ["truncated_shard"]
    assert len(read) == 301 and sum(raw.count for raw in read if isinstance(raw, Skipped)) == 100, "its hundred rows"
    path.unlink()
    assert [(raw.kind, raw.count) for raw in read_all(units)] == [("missing_file", 100)] * 4
