"""The border: which files count, how they are read, and what may be written over."""

import errno
import json
import os
from pathlib import Path

import pytest

from common import files
from common.errors import UserError
from common.files import (
    Owned,
    field,
    owned_folder,
    parse_json,
    read_json,
    read_text,
    visible_files,
    write_json,
    writing,
)


def test_visible_files_are_everybody_s_own_and_each_folder_counts_once(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("data/b.txt", "data/a/c.txt", "elsewhere/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("._b.txt", ".ipynb_checkpoints/b.txt", "__MACOSX/b.txt", "x.tar.partial", ".x.partial/b.txt"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("")
    (tmp_path / "data/A_loop").symlink_to(".")
    (tmp_path / "data/a/up").symlink_to("..")
    (tmp_path / "data/z").symlink_to(elsewhere)
    (tmp_path / "data/zz").symlink_to(elsewhere)
    os.mkfifo(tmp_path / "data/pipe.txt")
    found = [path.relative_to(tmp_path / "data").as_posix() for path in visible_files(tmp_path / "data")]
    assert found == ["a/c.txt", "b.txt", "z/d.txt"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_texts_of_unicode_encodings_are_read_without_marks(tmp_path, encoding):
    marked = ("\ufeff" if encoding == "utf-16-le" else "") + "ein Öl\r\n"
    (tmp_path / "x.txt").write_bytes(marked.encode(encoding))
    assert read_text(tmp_path / "x.txt") == "ein Öl\r\n"


def test_marks_of_joined_files_go(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n")
    assert read_text(tmp_path / "x.txt") == "a\nb\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"a\ncaf\xe9"), "captions=x is no UTF-8 text .*in line 2.*save it as UTF-8"),
        (lambda path: path.mkdir(), "captions=x is a folder"),
        (lambda path: os.mkfifo(path), "captions=x is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "captions=x is no regular file"),
        (lambda path: None, "captions=x does not exist"),
        (lambda path: path.write_bytes(b"a" * 11), "captions=x has 11 bytes; at most 10"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "x", "captions=x", limit=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[" * 10**5, "nested too deeply"),
        ("[" * 300 + "]" * 300, "nested too deeply"),
        ("9" * 5000, "no valid JSON"),
        ("[1]", "x.json holds a list of 1, expected an object"),
    ],
)
def test_what_is_no_json_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "x.json")


def test_fields_have_types():
    record = parse_json('{"a": 1, "b": true, "c": "x"}', "x.json", dict)
    assert field(record, "a", float, "x.json") == 1
    for name, kind in (("b", int), ("c", list), ("d", str)):
        with pytest.raises(UserError, match=f"x.json: field '{name}' is"):
            field(record, name, kind, "x.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    goal = tmp_path / "x.txt"
    goal.write_text("before")
    with pytest.raises(UserError, match=r"cannot write .*x\.txt \(No space left on device\)"), writing(goal) as place:
        place.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert goal.read_text() == "before" and list(tmp_path.iterdir()) == [goal]
    with writing(goal) as place:
        place.write_text("after")
    assert goal.read_text() == "after" and list(tmp_path.iterdir()) == [goal]
    (tmp_path / "link").symlink_to(goal)
    with pytest.raises(UserError, match="is a link"), writing(tmp_path / "link") as place:
        place.write_text("no")
    with pytest.raises(UserError, match="cannot write"), writing(tmp_path / "none/x") as place:
        place.write_text("no")


def test_names_that_are_no_utf8_are_written_and_read_again(tmp_path):
    write_json(tmp_path / "x.json", {"a": "caf\udce9"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"a": "caf\udce9"}


def test_only_what_was_written_and_not_changed_is_ours(tmp_path):
    owned = Owned(tmp_path)
    owned.claim(["a.png", "lines.jsonl"], "output_dir=x")
    (tmp_path / "a.png").write_text("ours")
    (tmp_path / "lines.jsonl").write_text("1\n")
    owned.record("a.png")
    owned.record("lines.jsonl", grows=True)
    (tmp_path / "lines.jsonl").write_text("1\n2\n")
    (tmp_path / "b.png").write_text("somebody's")
    again = Owned(tmp_path)
    again.claim(["a.png", "lines.jsonl", "new.png"], "output_dir=x")
    with pytest.raises(UserError, match=r"output_dir=x: .*b\.png is there and was not written by this command"):
        again.claim(["b.png"], "output_dir=x")
    (tmp_path / "a.png").write_text("changed")
    assert Owned(tmp_path).names() == ["lines.jsonl"]
    (tmp_path / Owned.RECORD).open("a").write('\n{"file": "b.p')  # cut off
    owned = Owned(tmp_path)
    owned.record("b.png")
    assert Owned(tmp_path).names() == ["lines.jsonl", "b.png"]
    (tmp_path / Owned.RECORD).open("a").write("\n" + "[" * 10**5 + '\n{"file": "a\\u0000", "state": null}\n[1]')
    assert Owned(tmp_path).names() == ["lines.jsonl", "b.png"]


def test_a_record_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / Owned.RECORD)
    with pytest.raises(UserError, match="no regular file"):
        Owned(tmp_path)


def test_names_that_look_like_home_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("./~b.txt").write_text("x")
    (found,) = visible_files(".")
    assert read_text(found) == "x"
    with writing(found) as place:
        place.write_text("y")
    assert Path("./~b.txt").read_text() == "y"


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a\0b"])
def test_paths_that_cannot_be(path):
    with pytest.raises(UserError, match="home folder|cannot be a path"):
        files.expand(path)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.resolve_path("~/x") == tmp_path / "x"
    assert files.resolve_path("configs").name == "configs"
    assert json.dumps(files.shown(Path(os.fsdecode(b"caf\xe9.png"))))
    assert files.shown("half a pair: \ud83d") == r"half a pair: \ud83d"


def test_what_a_killed_command_left_does_not_come_along(tmp_path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "stale.json").touch()
    with owned_folder(str(tmp_path / "new"), "output_dir") as folder:
        (folder / "fresh.json").touch()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".written.jsonl", "fresh.json"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(UserError, match="cannot write .*new .*No space left on device.*; make room"),
        owned_folder(str(tmp_path / "new"), "output_dir") as folder,
    ):
        (folder / "config.json").write_text("{}")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_json_are_read_one_by_one(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(files, "MAX_LINE", 40)
    lines = ['{"a": "two\u2028lines"}', "", "[1]", '{"a": "' + "x" * 50 + '"}', '{"a": 2}', '{"a": "cut']
    (tmp_path / "x.jsonl").write_bytes("\n".join(lines).encode(encoding))
    found = list(files.json_lines(tmp_path / "x.jsonl"))
    assert [value for *_, value in found if isinstance(value, dict)] == [{"a": "two\u2028lines"}, {"a": 2}]
    errors = [str(value) for *_, value in found if isinstance(value, UserError)]
    assert "x.jsonl: line 3 holds a list of 1, expected an object" in errors[0] and len(errors) == 4
