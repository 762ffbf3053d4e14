"""Parquet files as raw samples, row group by row group."""

import random

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from tests.training.tiny import write_texts
from training.data.parquet import IMAGE_COLUMNS, TEXT_COLUMNS, ParquetUnits
from training.data.sources import Epochs, Skipped

SETTINGS = {"image": "dataset.params.image_column", "text": "dataset.params.lm_column"}


def texts_of(*paths, column="content") -> ParquetUnits:
    return ParquetUnits(list(map(str, paths)), {"text": (column,)}, SETTINGS)


def read_all(units, seed=0) -> tuple[list[dict], list[Skipped]]:
    raws = [raw for index in range(len(units)) for raw in units.read(index, random.Random(seed))]
    return [raw for raw in raws if isinstance(raw, dict)], [raw for raw in raws if isinstance(raw, Skipped)]


def test_units_are_row_groups_of_all_files(tmp_path):
    a = write_texts(tmp_path / "a.parquet", [f"text {i}" for i in range(12)], row_group_size=5)
    b = write_texts(tmp_path / "b.parquet", [f"text {i}" for i in range(12, 23)], row_group_size=5)
    units = texts_of(a, b)
    assert len(units) == 6 and units.samples == 23
    assert sorted(raw["text"] for raw in units.read(1, random.Random(0))) == [f"text {i}" for i in range(5, 10)]
    assert {raw["text"] for raw in read_all(units)[0]} == {f"text {i}" for i in range(23)}
    assert read_all(units, 0) == read_all(units, 0) != read_all(units, 1)


@pytest.mark.parametrize(("streams", "chunks", "group"), [(3, 2, 4), (4, 1, 100)])
def test_an_epoch_covers_every_row_once_over_the_streams(tmp_path, streams, chunks, group):
    """Uneven row groups, and fewer groups than streams, whose rows are divided."""
    texts, files = [f"{i:02d}" for i in range(18)], 2 if group == 4 else 1
    paths = [write_texts(tmp_path / f"{n}.parquet", texts[n::files], row_group_size=group) for n in range(files)]
    source = Epochs(texts_of(*paths))
    rows = [r["text"] for stream in range(streams) for i in range(chunks) for r in source.chunk(1, stream, streams, i)]
    assert sorted(rows) == texts


def test_only_the_wanted_columns_are_read_whatever_each_file_calls_them(tmp_path):
    for name, text in (("a", "caption"), ("b", "text")):
        table = pyarrow.table({"url": ["u"], "image": [b"bytes"], text: [name]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    files = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    raws, _ = read_all(ParquetUnits(files, {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}, SETTINGS))
    assert [raw["text"] for raw in raws] == ["a", "b"] and raws[0]["image"] == b"bytes"
    assert raws[0].keys() == {"__key__", "__url__", "image", "text"} and "row group 0, row 0" in raws[0]["__key__"]


def test_a_file_without_a_footer_counts_as_many_as_the_others_hold(tmp_path):
    whole = write_texts(tmp_path / "a.parquet", ["x", "y"])
    cut = write_texts(tmp_path / "b.parquet", ["z"] * 50)
    cut.write_bytes(cut.read_bytes()[:-30])
    units = texts_of(whole, cut)
    raws, (lost,) = read_all(units)
    assert len(units) == 2 and units.samples == len(raws) == 2
    assert (lost.kind, lost.count) == ("truncated_shard", 2) and "b.parquet" in lost.detail
    with pytest.raises(UserError, match=r"b\.parquet and 0 more hold not a single row: .*b\.parquet"):
        texts_of(cut)


def test_a_text_that_is_no_utf_8_is_skipped_and_its_neighbours_are_read(tmp_path):
    offsets, letters = pyarrow.array([0, 1, 3, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xff\xfeb")
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, letters])
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "a.parquet")
    good, (bad,) = read_all(texts_of(tmp_path / "a.parquet"))
    assert bad.kind == "malformed_item" and "a.parquet: row group 0, row 1: 'utf-8' codec" in bad.detail
    assert sorted(raw["text"] for raw in good) == ["a", "b"]


def test_a_damaged_or_missing_row_group_counts_its_rows(tmp_path):
    path = write_texts(tmp_path / "a.parquet", [f"text {i}" * 50 for i in range(400)], row_group_size=100)
    units = texts_of(path)
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(bytes(data))
    raws, lost = read_all(units)
    assert len(raws) == 300 and [(raw.kind, raw.count) for raw in lost] == [("truncated_shard", 100)]
    path.unlink()
    assert [(raw.kind, raw.count) for raw in read_all(units)[1]] == [("missing_file", 100)] * 4
