"""Readers of official files, over `common/files.py`. Errors name the file, the record, the field and its kind."""

import os
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

from common.errors import UserError
from common.files import field, json_records, kind_of, read_json


def read_official(path: Path, what: str) -> dict:
    """The JSON object in a file.

    Args:
        what: which file it is, for the error.
    """
    return read_json(path, _named(path, what))


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, dict]]:
    """(place, record) of a file with one JSON object a line; blank lines are skipped."""
    for number, record in json_records(path, _named(path, what)):
        yield f"{path}, line {number}", record


def records_of(file: Path, tree: dict, name: str) -> Iterator[tuple[str, dict]]:
    """(place, record) of the list in field `name` of a JSON file; the place is `{file}, image 0` in `images`."""
    for number, record in enumerate(field(tree, name, list, str(file))):
        yield f"{file}, {name.removesuffix('s')} {number}", record


def choice(record: dict, name: str, allowed: Iterable[str], where: str) -> str:
    """A field whose values are known."""
    value = field(record, name, str, where)
    if value not in allowed:
        raise UserError(f"{where}: field {name!r} is {kind_of(value)}, expected {' or '.join(map(repr, allowed))}")
    return value


def check_filled(records: Sized, place: str | Path, what: str) -> None:
    """Refuses a place that holds no records."""
    if not len(records):
        raise UserError(f"{place} is empty; expected {what}")


def unique_keys(keys: list[str], file: Path, name: str) -> None:
    """Refuses duplicate keys, whose answers could not be told apart."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise UserError(f"{file}: field {name!r} has the value {key} twice; expected each once")
        seen.add(key)


def check_images(named: Iterable[tuple[Path, str]], what: str) -> None:
    """Checks that all images exist before anything is asked.

    Args:
        named: each image's path, and the file and field that names it.
    """
    named_by: dict[Path, str] = {}
    for path, by in named:
        named_by.setdefault(path, by)
    missing = [path for path in named_by if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(named_by)} images are missing, the first is {missing[0]}, named by "
            f"{named_by[missing[0]]}; expected {what}"
        )


def _named(path: Path, what: str) -> str:
    return f"{path} ({what}, see docs/evaluation.md)"
