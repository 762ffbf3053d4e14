"""Settings that name data → files, by brace lists, globs, folders and lists of them; and their columns."""

import glob
import os
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import braceexpand

from common.errors import UserError
from common.files import REPOSITORY, expand, is_hidden, resolve_path, visible_files
from common.inputs import required_folder

SHARDS = (".tar", ".tgz", ".tar.gz")
PARQUET = (".parquet",)
JSON = (".json", ".jsonl")
TEXT = (".jsonl", ".txt")
TABLES = (".csv", ".tsv")
FOLDER_SORTS = (SHARDS, PARQUET, (".jsonl",), TABLES, (".json",), (".txt",))  # manifests and notes lie beside the data
NAMED = 20  # missing files that a message names
MOST_NAMES = 100_000  # that a brace list may stand for
# A letter that is escaped, a range, and other signs of brace lists.
BRACES = re.compile(r"\\.|\{(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?\}|[{},]")
IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".tga", ".jp2")
# Images that may not be readable: where files are images, these are counted and not passed over.
IMAGES += (".avif", ".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr")


def expand_paths(setting: str, value, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Existing files of a path, a brace list (``train-{000000..000003}.tar``), a glob, a folder, or several of them.

    Args:
        setting: the key to name in messages.
        value: text, or a list of texts. Addresses that WebDataset opens (``pipe:…``, ``https://…``) stay as they are.
        suffixes: if the path is a folder, its files with the first of these suffixes that occurs, at any depth; hidden
            files and folders, and what killed commands left, are no data.

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
        if strange := next(filter(os.path.exists, missing), None):
            raise UserError(f"{setting}: {strange} is no regular file; give files")
        raise UserError(f"{setting}: {len(missing)} of {len(paths)} files do not exist: {named}")
    return paths


def existing_folder(setting: str, value) -> str:
    """`required_folder`, whose setting may need an environment variable that is not set."""
    _refuse_unset(setting, value)
    return str(required_folder(setting, value))


def _refuse_unset(setting: str, value) -> None:
    if isinstance(value, str) and value.startswith("$"):  # as `common.config` leaves it
        names = ", ".join(name.removeprefix("$") for name in value.split())
        raise UserError(
            f"{setting} needs environment variables that are not set: {names}; set them or give {setting}=…"
        )


def choose_column(path: str | Path, columns: Collection[str], candidates: Collection[str], setting: str) -> str:
    """The first candidate that a file has as a column; `UserError` if it has none of them; the message names the
    setting that does."""
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
        if not item:
            raise UserError(f"{setting} holds an empty path; leave it out")
        if not is_address(item) and _exists(item):  # whatever signs its name is made of
            yield item
            continue
        try:
            large = _count(item) > MOST_NAMES
            names = [] if large else list(braceexpand.braceexpand(item))
        except (ValueError, RecursionError):
            raise UserError(f"{setting} is {item!r:.200}, whose braces do not match") from None
        if large:
            raise UserError(f"{setting} is {item!r:.200}, which stands for over {MOST_NAMES:,} names; give a folder")
        yield from names


def _exists(path: str) -> bool:
    return os.path.exists(expand(path)) or os.path.exists(REPOSITORY / expand(path))


def _count(pattern: str) -> int:
    """How many names a brace list stands for, without making them; at least as many if its braces do not match."""
    counts = [[0, 1]]  # of each brace that is open: names of the alternatives before, and of the current one
    for sign in BRACES.finditer(pattern):
        if sign[1]:
            counts[-1][1] *= _length(*sign.groups())
        elif sign[0] == "{":
            counts.append([0, 1])
        elif sign[0] == "," and len(counts) > 1:
            counts[-1] = [sum(counts[-1]), 1]
        elif sign[0] == "}" and len(counts) > 1:
            inner = sum(counts.pop())
            counts[-1][1] *= inner
    return sum(map(sum, counts))


def _length(first: str, last: str, step: str | None) -> int:
    first, last = (ord(end) if end.isalpha() else int(end) for end in (first, last))
    return abs(last - first) // (int(step or 1) or 1) + 1


def _files(setting: str, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    if is_address(pattern):
        return [pattern]
    if any(c in pattern for c in "*?") and not _exists(pattern):
        pattern = str(expand(pattern))
        return _matches(pattern) or _matches(str(REPOSITORY / pattern)) or [pattern]
    path = resolve_path(pattern)
    if not path.is_dir() or not suffixes:
        return [_local(path)]
    files = [_local(file) for file in visible_files(path) if has_suffix(file.name, suffixes)]
    for sort in FOLDER_SORTS:
        if found := [file for file in files if has_suffix(file, sort)]:
            return found
    raise UserError(f"{setting}: folder {path} holds no file of {', '.join(suffixes)}")


def _matches(pattern: str) -> list[str]:
    """The files that a glob stands for. Its brackets are letters of names where such files exist, else sets."""
    for one in (pattern.replace("[", "[[]"), pattern):
        if visible := sorted(map(_local, _glob(one))):
            return visible
    return []


def _glob(pattern: str) -> Iterator[str | Path]:
    """What a pattern matches, without hidden files. `**` visits each folder once; Python's goes round loops."""
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
    if "**" not in parts:
        found = glob.iglob(pattern)
        yield from (name for name in found if not any(map(is_hidden, Path(name).parts[fixed:])))
    elif (folder := Path(*parts[:fixed])).is_dir():
        files = visible_files(folder)
        yield from (file for file in files if _fits(file.parts[len(folder.parts) :], parts[fixed:]))


def _fits(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**" and _fits(names, parts[1:]):
        return True
    matches = bool(names) and (parts[0] == "**" or fnmatchcase(names[0], parts[0]))
    return matches and _fits(names[1:], parts if parts[0] == "**" else parts[1:])


def _local(path: str | Path) -> str:
    """A file that was found, never as an address: a name may begin with ``pipe:``, which would be run."""
    return f"./{path}" if is_address(str(path)) else str(path)
