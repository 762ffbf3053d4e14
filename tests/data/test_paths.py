"""Settings that name data → files."""

import os

import pytest
from braceexpand import braceexpand

from common.errors import UserError
from training.data.paths import JSON, PARQUET, SHARDS, TEXT, _count, existing_folder, expand_paths, is_address
from training.data.shards import read_shard


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_paths_are_brace_lists_globs_and_lists_of_them(tmp_path, monkeypatch, repository):
    files = touch(tmp_path, *(f"{name}-{i:03d}.tar" for name in ("a", "b") for i in range(3)))
    a, b = files[:3], files[3:]
    assert expand_paths("x", str(tmp_path / "{a,b}-{000..002}.tar")) == files
    assert expand_paths("x", str(tmp_path / "b-*.tar")) == b
    assert expand_paths("x", [str(tmp_path / "a-00?.tar"), b[0]]) == [*a, b[0]]
    monkeypatch.chdir(tmp_path)
    assert expand_paths("x", "a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    in_repository = str(repository / "configs/showo_demo.yaml")
    assert expand_paths("x", "configs/showo_demo.yaml") == [in_repository]
    assert in_repository in expand_paths("x", "configs/showo_demo*.yaml")
    addresses = ["pipe:cat a-{0..1}.tar", "https://example.org/a.tar"]
    assert expand_paths("x", addresses) == ["pipe:cat a-0.tar", "pipe:cat a-1.tar", "https://example.org/a.tar"]


def test_a_folder_means_its_files_of_the_kind(tmp_path):
    shards = touch(tmp_path, "a/x-000.tar", "b/x-001.tar", "b/notes.md")[:2]
    assert expand_paths("x", str(tmp_path), SHARDS) == shards
    zipped = touch(tmp_path / "z", "a.tgz", "b.tar.gz", "c.tar", "x-manifest.json")
    assert expand_paths("x", str(tmp_path / "z"), JSON + SHARDS) == zipped[:3], "shards before the manifest"
    texts = touch(tmp_path / "lm", "b/0.parquet", "README.txt")
    assert expand_paths("x", str(tmp_path / "lm"), PARQUET + TEXT) == texts[:1]
    assert existing_folder("x", str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".jsonl", ".txt", ".json"])
def test_what_is_hidden_or_half_written_is_no_data(tmp_path, suffix):
    good = touch(tmp_path, f"a/x{suffix}", f"x{suffix.upper()}")
    folders = (".x.partial/", "x.partial/", ".cache/", "__MACOSX/", ".")
    hidden = [f"{folder}x{suffix}" for folder in folders] + [f"._x{suffix}"]
    touch(tmp_path, *hidden, f".x{suffix}.123.partial")
    for name in ("loop", "other"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    (tmp_path / f"itself{suffix}").symlink_to(f"itself{suffix}")
    assert expand_paths("x", str(tmp_path), (suffix,)) == good
    assert expand_paths("x", f"{tmp_path}/**/x{suffix}") == good[:1]
    assert expand_paths("x", f"{tmp_path}/**/a/**/[x]*") == good[:1]
    assert expand_paths("x", f"{tmp_path}/*/x{suffix}") == good[:1]
    with pytest.raises(UserError, match=rf"x: folder .*partial holds no file of \{suffix}"):
        (tmp_path / f"x.partial/x{suffix}").rename(tmp_path / f"x.partial/.x{suffix}")
        expand_paths("x", str(tmp_path / "x.partial"), (suffix,))


@pytest.mark.parametrize("folder", ["a [1]", "{b}", "c*d", "e?", "[!f]", "g\udce9"])
def test_names_are_taken_as_they_are(tmp_path, folder):
    os.mkdir(os.fsencode(tmp_path) + b"/" + os.fsencode(folder))
    (file,) = touch(tmp_path, f"{folder}/x-0.tar")
    for value in (file, str(tmp_path / folder), f"{tmp_path}/{folder}/*.tar"):
        if "{" not in folder or "*" not in value:
            assert expand_paths("x", value, SHARDS) == [file]


def test_sets_of_letters_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = touch(tmp_path, "x-0.tar", "x-1.tar", "x-2.tar")
    assert expand_paths("x", "~/x-[01]*.tar") == files[:2] and expand_paths("x", "~/x-?.tar") == files
    assert expand_paths("x", "{~/x-0,~/x-1}.tar") == files[:2] and expand_paths("x", "~", SHARDS) == files


@pytest.mark.parametrize("value", [".", "*.tar", ["./"], "pipe*", "{0}"])
def test_no_name_of_a_file_is_run_as_a_command(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch run;.tar").write_bytes(b"")
    value = value.format(tmp_path) if isinstance(value, str) else value
    (path,) = expand_paths("x", value, SHARDS)
    assert not is_address(path)
    assert [lost.kind for lost in read_shard(path)] == ["truncated_shard"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        (expand_paths, ["{0}/a-{{0..2}}.tar", "{0}/b*.tar"], r"x: 3 of 4 files do not exist: .*a-1.*a-2.*b\*\.tar$"),
        (expand_paths, "/nowhere/c-{{0..99}}.tar", r"100 of 100 .*c-19\.tar and 80 more$"),
        (expand_paths, "{0}", r"x: folder .* holds no file of \.parquet"),
        (expand_paths, None, "x is not set"),
        (expand_paths, "$A $B", "x needs environment variables that are not set: A, B"),
        (expand_paths, "a-{{0..2.tar", "braces"),
        (expand_paths, "a-{{0..99999999}}.tar", "x is .*, which stands for over 100,000 names"),
        (expand_paths, "{{0..9999999999999999999999999999999999999}}", "stands for over 100,000 names"),
        (expand_paths, "{{0..9}}{{0..9}}{{0..99999}}", "stands for over 100,000 names"),
        *((expand_paths, "{{a,b}}" * times, "stands for over 100,000 names") for times in (18, 40)),
        (expand_paths, "{{a..z}}" * 9, "stands for over 100,000 names"),
        (expand_paths, "{{" * 1000 + "}}" * 1000, "braces do not match"),
        (expand_paths, "/dev/zero", "x: /dev/zero is no regular file; give files"),
        (expand_paths, ["", "b"], "x holds an empty path"),
        (expand_paths, "~nobody-of-this-name/x.tar", "there is no such home folder"),
        (existing_folder, "/nowhere", "x=/nowhere does not exist"),
        (existing_folder, "", "x is not given; add x=PATH"),
    ],
)
def test_missing_and_malformed_settings_are_named(tmp_path, call, value, message):
    touch(tmp_path, "a-0.tar")
    value = [v.format(tmp_path) for v in value] if isinstance(value, list) else value and value.format(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        call("x", value, *([PARQUET] if call is expand_paths else []))
    assert "a-0.tar" not in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "a,b",
        "{a}",
        "{a,b}x{1..3}",
        "a{b,c{0..4},d}",
        "{01..10..2}{a..e}",
        "{a,{b,c}{d,e}}",
        r"\{a,b\}{c,d}",
        "{1..3,5}",
    ],
)
def test_names_are_counted_before_they_are_made(pattern):
    assert _count(pattern) == len(list(braceexpand(pattern)))
