"""Settings that name data → files."""

import pytest

from common.errors import UserError
from training.data.paths import JSON, PARQUET, SHARDS, TEXT, existing_folder, expand_paths


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


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        (expand_paths, ["{0}/a-{{0..2}}.tar", "{0}/b*.tar"], r"x: 3 of 4 files do not exist: .*a-1.*a-2.*b\*\.tar$"),
        (expand_paths, "/nowhere/c-{{0..99}}.tar", r"100 of 100 .*c-19\.tar and 80 more$"),
        (expand_paths, "{0}", r"x: folder .* holds no file of \.parquet"),
        (expand_paths, None, "x is not set"),
        (expand_paths, "$A $B", "x needs environment variables that are not set: A, B"),
        (expand_paths, "a-{{0..2.tar", "braces"),
        (existing_folder, "/nowhere", "x: folder /nowhere does not exist"),
        (existing_folder, "", "x is not set; give a folder"),
    ],
)
def test_missing_and_malformed_settings_are_named(tmp_path, call, value, message):
    touch(tmp_path, "a-0.tar")
    value = [v.format(tmp_path) for v in value] if isinstance(value, list) else value and value.format(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        call("x", value, *([PARQUET] if call is expand_paths else []))
    assert "a-0.tar" not in str(error.value)
