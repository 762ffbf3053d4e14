"""Plain texts of every form."""

import json
import random

import pytest

from common.errors import UserError
from training.data import language
from training.data.language import Documents, text_sample
from training.data.sources import Epochs, Skipped


def documents(*paths, column="content") -> Documents:
    return Documents(list(map(str, paths)), column)


def read_all(units) -> tuple[list[str], list[Skipped]]:
    raws = [raw for index in range(len(units)) for raw in units.read(index, random.Random(0))]
    return sorted(r["text"] for r in raws if not isinstance(r, Skipped)), [r for r in raws if isinstance(r, Skipped)]


def write(path, text: str | bytes):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    language._has_blank_lines.cache_clear()
    return path


def test_newlines_are_removed_and_long_texts_cropped():
    assert text_sample("one\ntwo\n three", random.Random(0)) == "onetwo three"
    assert text_sample("x" * 8000, random.Random(0)) == "x" * 8000
    long = "".join(f"{i:06d}" for i in range(3000))
    windows = {text_sample(long, random.Random(seed)) for seed in range(20)}
    assert len(windows) > 10 and all(len(window) == 8000 and window in long for window in windows)
    assert len(text_sample("a\n" * 7000, random.Random(0))) == 7000, "cropped after newlines are removed"
    assert {text_sample("x" * 8000 + "y", random.Random(seed))[-1] for seed in range(20)} == {"x", "y"}


def test_a_byte_order_mark_is_no_part_of_a_text():
    assert text_sample("\ufeffone\ufeff", random.Random(0)) == "one"


@pytest.mark.parametrize(
    ("text", "kind"),
    [(text, "empty_text") for text in ("", "\n\n", "  ", None)]
    + [(text, "malformed_item") for text in (7, ["a"], "half of \ud83d")],
)
def test_empty_texts_and_what_is_none_are_skipped(text, kind):
    with pytest.raises(Skipped) as problem:
        text_sample({"__key__": "a.parquet: row 3", "text": text}, random.Random(0))
    assert problem.value.kind == kind and "a.parquet: row 3" in problem.value.detail


LINES = [f"text {i}\nof two lines" for i in range(3)]
JSONL = "\n".join(json.dumps({"content": text}) for text in LINES)
WRAPPED = "One\r\nis  \r\ntext.\r\n\r\n \r\n\r\nTwo.\nAfter.\n\n\nThree."


@pytest.mark.parametrize(
    ("name", "content", "texts", "skipped"),
    [
        ("a.txt", "\ufeffone\n\n\ufefftwo".encode(), ["one", "two"], 0),  # files joined by `cat`
        ("a.txt", "ä\n\nö".encode("utf-16"), ["ä", "ö"], 0),
        ("a.jsonl", JSONL.encode("utf-16"), LINES, 0),
        ("a.jsonl", "\ufeff" + JSONL, LINES, 0),
        ("a.jsonl", JSONL + "\n" + "[" * 50_000, LINES, 1),
        ("a.txt", b"one\n\n\xe9", ["one"], 1),
        ("a.jsonl", f'{JSONL}\n\n{{"content": "cut\n[]\n{{"other": 1}}', LINES, 3),
        ("a.jsonl", '{"broken\n' + JSONL, LINES, 1),
        ("a.txt", WRAPPED, ["One is text.", "Three.", "Two. After."], 0),
        ("a.txt", "\nOne.\nTwo.\r\nThree.\n", ["One.", "Three.", "Two."], 0),
        ("a.txt", b"\xef\xbb\xbfgood\nb\xe4d\nfine\n", ["fine", "good"], 1),
    ],
)
def test_documents_of_every_form(tmp_path, name, content, texts, skipped):
    path = write(tmp_path / name, content)
    read, bad = read_all(documents(path))
    assert read == texts
    assert [raw.kind for raw in bad] == ["malformed_item"] * skipped and all(str(path) in raw.detail for raw in bad)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("parted", ["\n", "\n\n", "\n\n\n"])
def test_parts_of_a_file_hold_each_document_once(tmp_path, monkeypatch, chunk, parted):
    rng = random.Random(0)
    texts = [f"{i} " + "ä" * rng.randrange(20) for i in range(40)]
    path = write(tmp_path / "a.txt", parted.join(texts) + "\n")
    assert language._has_blank_lines(str(path)) == (parted != "\n")
    monkeypatch.setattr(language, "CHUNK", chunk)
    units = documents(path)
    assert len(units) == -(-path.stat().st_size // chunk)
    assert read_all(units) == (sorted(text.strip() for text in texts), [])


def test_orders_differ_by_epoch_and_the_number_of_documents_is_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "CHUNK", 100)
    texts = [f"text {i:02d}" for i in range(60)]
    files = [write(tmp_path / f"{n}.txt", "\n".join(part)) for n, part in enumerate((texts[:40], texts[40:]))]
    source = Epochs(documents(*files))
    parts = len(source.units)
    read = [raw["text"] for index in range(2 * parts) for raw in source.chunk(1, 0, 1, index)]
    assert sorted(read[:60]) == sorted(read[60:]) == texts and read[:60] != read[60:]
    assert 55 <= source.units.samples <= 66


def test_a_file_that_is_gone_or_unreadable_is_counted_once(tmp_path):
    units = documents(write(tmp_path / "a.txt", "x"))
    (tmp_path / "a.txt").unlink()
    assert [raw.kind for raw in units.read(0, random.Random(0))] == ["missing_file"]
    (tmp_path / "a.txt").mkdir()
    assert [raw.kind for raw in units.read(0, random.Random(0))] == ["truncated_shard"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"id": 1, "text": "x"}', "a.jsonl has no column 'content'; its columns are id, text; name"),
        ("a.jsonl", '"one text"\n"another"', 'a.jsonl must hold a record such as {"content": "text"} a line; its'),
        ("a.txt", "", "a.txt and 0 more are empty"),
    ],
)
def test_files_without_documents_are_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        documents(write(tmp_path / name, content))
    assert read_all(documents(write(tmp_path / "b.txt", ""), write(tmp_path / "c.txt", "x"))) == (["x"], [])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("parted", ["\n", "\n\n"])
def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch, name, parted):
    monkeypatch.setattr(language, "CHUNK", 64)
    monkeypatch.setattr(language, "MAX_LINE", 100)
    texts = [f"text {number:02d}" for number in range(20)]
    parts = [json.dumps({"content": text}) for text in texts] if name == "a.jsonl" else list(texts)
    file = tmp_path / name
    read, bad = read_all(documents(write(file, parted.join([*parts[:9], "x" * 1000, *parts[9:]]))))
    assert read == texts and [raw.kind for raw in bad] == ["malformed_item"] and "over " in bad[0].detail
    with pytest.raises(UserError, match=f"{name} begins with a document of over .* end each with a line end"):
        documents(write(file, "x" * 1000))
    if name == "a.txt" and parted == "\n\n":
        read, bad = read_all(documents(write(file, "one\n\n" + "two\n" * 400 + "\nthree\n\nfour")))
        assert read == ["four", "one", "three"] and len(bad) == 1
