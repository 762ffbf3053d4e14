"""Records of large JSON files, read from where they stand."""

import json
import pickle

import pytest

from common.errors import UserError
from training.data.json_records import JsonRecords, JsonTable

RECORDS = [
    {"id": 1, "image": "a.jpg"},
    {"id": 2, "text": 'Grüße, \u4e16\u754c [}" 😀'},
    [1, {"x": None}],
    "text",
    3.5,
    {},
]


def write(tmp_path, text: str, name: str = "a.json") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def records(file) -> list:
    return [json.loads(file[index]) for index in range(len(file))]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("start", ["", "\ufeff", " \r\n"])
def test_every_record_of_a_list_is_found(tmp_path, indent, ascii_only, start):
    path = write(tmp_path, start + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only) + "\n")
    assert records(JsonRecords(path)) == RECORDS


def test_every_line_is_a_record_even_a_broken_one(tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path = write(tmp_path, "\n".join([lines[0], "", '{"id": 2', *lines[1:]]), "a.jsonl")
    file = JsonRecords(path, keep=lambda record: record != "text")
    assert len(file) == len(RECORDS)
    assert json.loads(file[0]) == RECORDS[0] and file[1] == b'{"id": 2' and json.loads(file[2]) == RECORDS[1]


def test_only_kept_records_count(tmp_path):
    file = JsonRecords(write(tmp_path, json.dumps(RECORDS)), keep=lambda r: isinstance(r, dict) and "id" in r)
    assert records(file) == RECORDS[:2]
    assert len(JsonRecords(write(tmp_path, "[]"))) == 0


def test_a_list_of_many_records_is_small_in_memory_and_in_a_workers_hands(tmp_path):
    path = write(tmp_path, json.dumps([{"id": n, "text": "x" * 200} for n in range(5000)]))
    file = JsonRecords(path)
    assert file.places.nbytes == 5000 * 16
    assert len(pickle.dumps(file)) < 100_000
    assert json.loads(pickle.loads(pickle.dumps(file))[4321])["id"] == 4321


@pytest.mark.parametrize("text", ["", "{}", '[{"id": 1}', '[{"id": 1} {"id": 2}]', '[{"id": 1,}]', '["a', "[1"])
def test_what_is_no_list_is_named(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        JsonRecords(write(tmp_path, text))


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_table_is_read_by_keys(tmp_path, ascii_only):
    content = {"a/b": ["one", "two"], "ü😀": "Grüße", 'quote"d': [], "": 0}
    table = JsonTable(write(tmp_path, json.dumps(content, ensure_ascii=ascii_only, indent=1)))
    assert {key: table.get(key) for key in content} == content
    assert table.get("missing") is None
    many = {f"key {n}": n for n in range(3000)}
    table = JsonTable(write(tmp_path, json.dumps(many)))
    assert all(table.get(key) == value for key, value in many.items())


def test_an_empty_table_holds_nothing_and_a_broken_one_is_named(tmp_path):
    assert JsonTable(write(tmp_path, "{}")).get("x") is None
    for text in ("[]", '{"a" 1}', '{"a": 1', "{1: 2}"):
        with pytest.raises(UserError, match="cannot be read as JSON"):
            JsonTable(write(tmp_path, text))
