"""Records of large JSON files, read from where they are."""

import json
import pickle

import pytest

from common.errors import UserError
from training.data.json_records import JsonRecords, JsonTable

RECORDS = [{"id": 1}, {"id": 2, "text": 'Grüße, \u4e16\u754c [}" 😀'}, [1, {"x": None}], "text", 3.5, {}]


def write(tmp_path, text: str, name: str = "a.json") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("start", ["", "\ufeff", " \r\n"])
def test_every_record_and_every_value_is_found(tmp_path, indent, ascii_only, start):
    path = write(tmp_path, start + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only) + "\n")
    file = JsonRecords(path)
    assert [json.loads(file[index]) for index in range(len(file))] == RECORDS
    kept = JsonRecords(path, keep=lambda record: isinstance(record, dict) and "id" in record)
    assert len(kept) == 2 and json.loads(kept[1]) == RECORDS[1]
    content = {"a/b": ["one", "two"], "ü😀": "Grüße", 'quote"d': [], "": 0} | {f"key {n}": n for n in range(300)}
    table = JsonTable(write(tmp_path, start + json.dumps(content, indent=indent, ensure_ascii=ascii_only)))
    assert {key: table.get(key) for key in content} == content and table.get("missing") is None


def test_every_line_is_a_record_even_a_broken_one(tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path = write(tmp_path, "\n".join([lines[0], "", '{"id": 2', *lines[1:]]), "a.jsonl")
    file = JsonRecords(path, keep=lambda record: record != "text")
    assert len(file) == len(RECORDS)
    assert json.loads(file[0]) == RECORDS[0] and file[1] == b'{"id": 2' and json.loads(file[2]) == RECORDS[1]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_wide_texts_and_marks_within(tmp_path, name):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    text = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    wide = JsonRecords(str(tmp_path / name))
    assert [json.loads(wide[index]) for index in range(len(wide))] == RECORDS
    if name == "a.jsonl":
        joined = JsonRecords(write(tmp_path, "\ufeff" + "\n\ufeff".join(lines), name))
        assert [json.loads(joined[index]) for index in range(len(joined))] == RECORDS


def test_a_list_within_an_object(tmp_path):
    text = json.dumps({"info": {"data": 1}, "data": RECORDS, "more": [1]})
    file = JsonRecords(write(tmp_path, text), keep=lambda record: isinstance(record, dict))
    assert len(file) == file.left_out == 3 and json.loads(file[1]) == RECORDS[1]


def test_many_records_are_small_in_memory_and_when_sent_to_a_worker(tmp_path):
    file = JsonRecords(write(tmp_path, json.dumps([{"id": n, "text": "x" * 200} for n in range(5000)])))
    assert file.places.nbytes == 5000 * 16
    sent = pickle.dumps(file)
    assert len(sent) < 100_000 and json.loads(pickle.loads(sent)[4321])["id"] == 4321


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (
            JsonRecords,
            [
                "[" * 50_000,
                "[" + "9" * 5000 + "]",
                '{"data": 1}',
                "\0" * 99,
                "",
                "{}",
                '[{"id": 1}',
                '[{"id": 1} {"id": 2}]',
                '[{"id": 1,}]',
                '["a',
                "[1",
            ],
        ),
        (JsonTable, ['{"a":' + "[" * 50_000, "[]", '{"a" 1}', '{"a": 1', "{1: 2}"]),
    ],
)
def test_files_of_another_form_are_named(tmp_path, kind, texts):
    for text in texts:
        with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
            kind(write(tmp_path, text))
    assert len(JsonRecords(write(tmp_path, "[]"))) == 0 and JsonTable(write(tmp_path, "{}")).get("x") is None
