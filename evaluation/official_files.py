"""Readers of official files. Errors name the file, the record, the field, and the expected value."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from common.errors import UserError

KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a group of fields",
    bool: "true or false",
}


def existing(path: Path, what: str) -> Path:
    """The path, if it is there.

    Args:
        what: which file it is and where it comes from, for the error.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {what} (docs/evaluation.md says where it comes from)")
    return path


def read_json(path: Path, kind: type, what: str) -> Any:
    """A whole JSON file whose outermost value is a list or a dict."""
    existing(path, what)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); expected {what}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds {_shown(value)}; expected {KINDS[kind]}: {what}")
    return value


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, dict]]:
    """(place, record) of a file with one JSON object a line; blank lines are skipped."""
    existing(path, what)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold U+2028 and U+0085
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); expected {what}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is no JSON ({error}); expected one JSON object a line: {what}") from None
        yield place, record


def field(place: str, record: Any, name: str, kind: type | tuple[type, ...], allowed: tuple | None = None) -> Any:
    """The value of one field.

    Args:
        place: the file and the record's position in it.
        kind: the type, or several.
        allowed: the values there may be; default: any of the kind.

    Raises:
        UserError: the record is none, or the field is missing, of another type, or none of the allowed values.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(map(repr, allowed)) if allowed else " or ".join(KINDS[each] for each in kinds)
    if not isinstance(record, Mapping):
        raise UserError(f"{place} holds {_shown(record)}; expected a record with the field {name!r}")
    if name not in record:
        has = ", ".join(map(str, list(record)[:12])) or "none"
        raise UserError(f"{place}: field {name!r} is missing (it has {has}); expected {expected}")
    value = record[name]
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    if wrong or (allowed and value not in allowed):
        raise UserError(f"{place}: field {name!r} is {_shown(value)}; expected {expected}")
    return value


def records_of(file: Path, tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of the list in field `name` of a JSON file; the place is `{file}, image 0` in `images`."""
    for number, record in enumerate(field(str(file), tree, name, list)):
        yield f"{file}, {name.removesuffix('s')} {number}", record


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
    missing = [path for path in named_by if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(named_by)} images are missing, the first is {missing[0]}, named by "
            f"{named_by[missing[0]]}; expected {what}"
        )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_json_lines(path: Path, records: list[dict]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
