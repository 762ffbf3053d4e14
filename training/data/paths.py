"""Settings that name data → files, by brace lists, globs, folders and lists of them; and their columns."""

import glob
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import braceexpand

from common.errors import UserError
from common.files import REPOSITORY, resolve_path

SHARDS = (".tar", ".tgz", ".tar.gz")
PARQUET = (".parquet",)
JSON = (".json", ".jsonl")
TEXT = (".jsonl", ".txt")
FOLDER_SORTS = (SHARDS, PARQUET, (".jsonl",), (".json",), (".txt",))  # manifests and notes lie beside the data
NAMED = 20  # missing files that a message names


def expand_paths(setting: str, value, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Existing files of a path, a brace list (``train-{000000..000003}.tar``), a glob, a folder, or several of them.

    Args:
        setting: the key to name in messages.
        value: text, or a list of texts. Addresses that WebDataset opens (``pipe:…``, ``https://…``) stay as they are.
        suffixes: if the path is a folder, its files with the first of these suffixes that occurs, at any depth.

    Raises:
        UserError: the setting is empty or needs an environment variable, files do not exist (all are counted, and named
            up to 20), or a folder holds no file of the suffixes.
    """
    _refuse_unset(setting, value)
    if not value:
        example = f"{setting}=data/train-{{000000..000009}}.tar"
        raise UserError(f"{setting} is not set; give the path of the data, for example {example}")
    paths = [file for pattern in _patterns(setting, value) for file in _files(setting, pattern, suffixes)]
    missing = [path for path in paths if not is_address(path) and not Path(path).is_file()]
    if missing:
        named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        raise UserError(f"{setting}: {len(missing)} of {len(paths)} files do not exist: {named}")
    return paths


def existing_folder(setting: str, value) -> str:
    """The folder that a setting names.

    Raises:
        UserError: it is not set, needs an environment variable, or does not exist.
    """
    _refuse_unset(setting, value)
    if not value:
        raise UserError(f"{setting} is not set; give a folder")
    folder = resolve_path(value)
    if not folder.is_dir():
        raise UserError(f"{setting}: folder {value} does not exist")
    return str(folder)


def _refuse_unset(setting: str, value) -> None:
    if isinstance(value, str) and value.startswith("$"):  # as `common.config` leaves it
        names = ", ".join(name.removeprefix("$") for name in value.split())
        raise UserError(
            f"{setting} needs environment variables that are not set: {names}; set them or give {setting}=…"
        )


def choose_column(path: str | Path, columns: Collection[str], candidates: Collection[str], setting: str) -> str:
    """The first candidate that a file has as a column.

    Raises:
        UserError: it has none of them; the message names the setting that does.
    """
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        wanted = " or ".join(map(repr, candidates)) or "of the wanted type"
        raise UserError(f"{path} has no column {wanted}; its columns are {', '.join(columns)}; name one by {setting}")
    return found


def is_address(path: str) -> bool:
    """Whether WebDataset opens it by a program (``pipe:``) or from the net."""
    return path.startswith("pipe:") or bool(re.match(r"[a-z0-9]+://", path))


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.lower().endswith(suffixes)


def _patterns(setting: str, value) -> Iterator[str]:
    for item in [value] if isinstance(value, str) else value:
        try:
            yield from braceexpand.braceexpand(item)
        except braceexpand.UnbalancedBracesError:
            raise UserError(f"{setting} is {item!r}, whose braces do not match") from None


def _files(setting: str, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    if is_address(pattern):
        return [pattern]
    if any(c in pattern for c in "*?"):
        here, in_repository = glob.glob(pattern, recursive=True), str(REPOSITORY / pattern)
        return sorted(here) or sorted(glob.glob(in_repository, recursive=True)) or [pattern]
    path = resolve_path(pattern)
    if not path.is_dir() or not suffixes:
        return [str(path)]
    files = sorted(str(file) for file in path.rglob("*") if has_suffix(file.name, suffixes))
    for sort in FOLDER_SORTS:
        if found := [file for file in files if has_suffix(file, sort)]:
            return found
    raise UserError(f"{setting}: folder {path} holds no file of {', '.join(suffixes)}")
