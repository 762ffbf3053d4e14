"""Settings that name data → files."""

import pytest

from common.errors import UserError
from training.data.paths import JSON, PARQUET, SHARDS, TEXT, existing_folder, expand_paths


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_paths_are_brace_lists_globs_and_lists_of_them(tmp_path, monkeypatch):
    files = touch(tmp_path, *(f"{name}-{i:03d}.tar" for name in ("a", "b") for i in range(3)))
    a, b = files[:3], files[3:]
    assert expand_paths("x", str(tmp_path / "{a,b}-{000..002}.tar")) == files
    assert expand_paths("x", str(tmp_path / "b-*.tar")) == b
    assert expand_paths("x", [str(tmp_path / "a-00?.tar"), b[0]]) == [*a, b[0]]
    monkeypatch.chdir(tmp_path)
    assert expand_paths("x", "a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]


def test_relative_paths_are_found_in_the_repository_from_elsewhere(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert expand_paths("x", "configs/showo_demo.yaml") == [str(repository / "configs/showo_demo.yaml")]
    assert str(repository / "configs/showo_demo.yaml") in expand_paths("x", "configs/showo_demo*.yaml")


def test_a_folder_stands_for_its_files_of_the_kind(tmp_path):
    shards = touch(tmp_path, "a/x-000.tar", "b/x-001.tar", "b/notes.md")[:2]
    assert expand_paths("x", str(tmp_path), SHARDS) == shards
    zipped = touch(tmp_path / "z", "a.tgz", "b.tar.gz", "c.tar", "x-manifest.json")
    assert expand_paths("x", str(tmp_path / "z"), JSON + SHARDS) == zipped[:3], "shards before the manifest"
    texts = touch(tmp_path / "lm", "b/0.parquet", "README.txt")
    assert expand_paths("x", str(tmp_path / "lm"), PARQUET + TEXT) == texts[:1]
    with pytest.raises(UserError, match=r"x: folder .* holds no file of \.parquet"):
        expand_paths("x", str(tmp_path / "z"), PARQUET)


def test_addresses_are_left_to_webdataset():
    addresses = ["pipe:cat a-{0..1}.tar", "https://example.org/a.tar"]
    assert expand_paths("x", addresses) == ["pipe:cat a-0.tar", "pipe:cat a-1.tar", "https://example.org/a.tar"]


def test_missing_files_are_all_named(tmp_path):
    touch(tmp_path, "a-0.tar")
    with pytest.raises(UserError) as error:
        expand_paths("some.setting", [str(tmp_path / "a-{0..2}.tar"), str(tmp_path / "b*.tar")])
    message = str(error.value)
    assert message.startswith("some.setting: 3 of 4 files do not exist: ")
    assert all(name in message for name in ("a-1.tar", "a-2.tar", "b*.tar")) and "a-0.tar" not in message
    with pytest.raises(UserError, match=r"100 of 100 .*c-19\.tar and 80 more$"):
        expand_paths("x", "/nowhere/c-{0..99}.tar")


def test_unset_and_malformed_settings_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"some\.setting is not set"):
        expand_paths("some.setting", None)
    with pytest.raises(UserError, match="braces"):
        expand_paths("x", "a-{0..2.tar", JSON)
    with pytest.raises(UserError, match=r"x: folder /nowhere does not exist"):
        existing_folder("x", "/nowhere")
    assert existing_folder("x", str(tmp_path)) == str(tmp_path)
