"""Plain texts of every form."""

import json
import random

import pytest

from common.errors import UserError
from training.data import language
from training.data.language import Documents, text_sample
from training.data.skipping import Skipped, SkipSample
from training.data.sources import Epochs


def documents(*paths, column="content") -> Documents:
    return Documents(list(map(str, paths)), column)


def read_all(units, seed=0) -> list:
    raws = (raw for index in range(len(units)) for raw in units.read(index, random.Random(seed)))
    return [raw if isinstance(raw, Skipped) else raw["text"] for raw in raws]


def write(path, text: str):
    path.write_bytes(text.encode())
    return path


# ---- items ----


def test_newlines_are_removed_and_long_texts_cut_to_a_window():
    assert text_sample("one\ntwo\n three", random.Random(0)) == "onetwo three"
    assert text_sample("x" * 8000, random.Random(0)) == "x" * 8000
    long = "".join(f"{i:06d}" for i in range(3000))
    windows = {text_sample(long, random.Random(seed)) for seed in range(20)}
    assert len(windows) > 10
    assert all(len(window) == 8000 and window in long for window in windows)
    assert len(text_sample("a\n" * 7000, random.Random(0))) == 7000, "cut after the newlines have gone"
    assert {text_sample("x" * 8000 + "y", random.Random(seed))[-1] for seed in range(20)} == {"x", "y"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "empty_text"), ("\n\n", "empty_text"), ("  ", "empty_text"), (None, "empty_text")]
    + [(7, "malformed_item"), (["a"], "malformed_item"), ("half of \ud83d", "malformed_item")],
)
def test_empty_texts_and_what_is_none_are_skipped(text, kind):
    with pytest.raises(SkipSample) as problem:
        text_sample({"__key__": "a.parquet: row 3", "text": text}, random.Random(0))
    assert problem.value.kind == kind and "a.parquet: row 3" in problem.value.detail


# ---- files ----


def test_a_jsonl_file_holds_a_document_a_line(tmp_path):
    lines = [json.dumps({"content": f"text {i}\nof two lines"}) for i in range(5)]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, "", '{"content": "cut', "[]", '{"other": 1}']))
    read = read_all(documents(path))
    assert sorted(text for text in read if isinstance(text, str)) == [f"text {i}\nof two lines" for i in range(5)]
    assert [raw.kind for raw in read if isinstance(raw, Skipped)] == ["malformed_item"] * 3
    assert all(str(path) in raw.detail for raw in read if isinstance(raw, Skipped))


def test_a_jsonl_file_without_the_column_is_named_with_what_it_has(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"id": 1, "text": "x"}))
    with pytest.raises(
        UserError, match="a.jsonl has no column 'content'; its columns are id, text; name one by dataset.p"
    ):
        documents(path)
    assert read_all(documents(path, column="text")) == ["x"]


def test_a_jsonl_file_of_bare_texts_is_refused_as_that(tmp_path):
    path = write(tmp_path / "a.jsonl", '"one text"\n"another"')
    with pytest.raises(
        UserError, match=r"""a.jsonl must hold a record such as {"content": "text"} a line; its first is"""
    ):
        documents(path)


def test_a_txt_file_is_parted_at_blank_lines_if_it_has_any(tmp_path):
    blocks = "One\r\nwrapped  \r\ntext.\r\n\r\n \r\n\r\nTwo.\nBehind.\n\n\nThree."
    assert sorted(read_all(documents(write(tmp_path / "a.txt", blocks)))) == [
        "One wrapped text.",
        "Three.",
        "Two. Behind.",
    ]
    lines = "\nOne.\nTwo.\r\nThree.\n"
    assert sorted(read_all(documents(write(tmp_path / "b.txt", lines)))) == ["One.", "Three.", "Two."]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("parted", ["\n", "\n\n", "\n\n\n"])
def test_parts_of_a_file_hold_each_document_once(tmp_path, monkeypatch, chunk, parted):
    rng = random.Random(0)
    texts = [f"{i} " + "ä" * rng.randrange(20) for i in range(40)]
    language._has_blank_lines.cache_clear()
    path = write(tmp_path / "a.txt", parted.join(texts) + "\n")
    assert language._has_blank_lines(str(path)) == (parted != "\n")
    monkeypatch.setattr(language, "CHUNK", chunk)
    units = documents(path)
    assert len(units) == -(-path.stat().st_size // chunk)
    assert sorted(read_all(units)) == sorted(text.strip() for text in texts)


def test_orders_differ_by_epoch_and_every_document_comes_once_in_each(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "CHUNK", 100)
    texts = [f"text {i}" for i in range(60)]
    source = Epochs(
        documents(write(tmp_path / "a.txt", "\n".join(texts[:40])), write(tmp_path / "b.txt", "\n".join(texts[40:])))
    )
    parts = len(source.units)
    epochs = [
        [raw["text"] for index in range(e * parts, (e + 1) * parts) for raw in source.chunk(1, 0, 1, index)]
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts)
    assert epochs[0] != epochs[1]


def test_the_number_of_documents_is_guessed_from_the_first_part(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "\n".join(f"text {i:03d}" for i in range(100)))
    assert documents(path).samples == 100
    monkeypatch.setattr(language, "CHUNK", 90)
    assert 90 <= documents(path).samples <= 110


def test_texts_that_are_no_utf_8_and_lost_files_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\nb\xe4d\nfine\n")
    units = documents(path)
    read = read_all(units)
    assert sorted(text for text in read if isinstance(text, str)) == ["fine", "good"]
    assert [raw.kind for raw in read if isinstance(raw, Skipped)] == ["malformed_item"]
    path.unlink()
    language._has_blank_lines.cache_clear()
    assert [raw.kind for raw in units.read(0, random.Random(0))] == ["missing_file"]


def test_empty_files_are_an_error_only_if_all_are(tmp_path):
    empty, full = write(tmp_path / "a.txt", ""), write(tmp_path / "b.txt", "x")
    assert read_all(documents(empty, full)) == ["x"]
    with pytest.raises(UserError, match="a.txt and 0 more are empty"):
        documents(empty)
