"""Random access to the records of a large JSON file.

A list of 665,000 conversations takes gigabytes as Python objects, and every loader worker would end up with a copy.
Here the workers share the file and an array of byte offsets.
"""

import hashlib
import json
import mmap
import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import check_file, is_wide, open_utf8, parse_json
from training.data.sources import MISSING_FILE, Skipped

_BLANKS = re.compile(r"[ \t\r\n]*")
_scan = json.JSONDecoder().raw_decode


class JsonRecords:
    """The records of a ``.json`` list, or of a ``.jsonl`` file (one a line; broken ones are records, too).

    The list may be a member of an object, as in ``{"data": […]}``: the first that is a list of objects.

    Args:
        path: the file, of UTF-8, or of UTF-16 with its byte order mark.
        keep: which records count; called once for each that can be parsed. `left_out` is the number of the others.

    Raises:
        UserError: the file cannot be read or is no list of records.
    """

    def __init__(self, path: str, keep: Callable[[Any], bool] = lambda record: True):
        self.path, self.left_out = path, 0
        read = _lines if path.lower().endswith(".jsonl") else _list
        places = array("q")
        for start, stop, record in _guarded(read, path):
            if record is BROKEN or keep(record):
                places.extend((start, stop))
            else:
                self.left_out += 1
        self.places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record."""
        return _read(self.path, *self.places[index])


class RecordUnits:
    """Records of several files, undecoded, as units of one sample each.

    Args:
        files: each with its `path`, its length, and the bytes of a record by number, as `JsonRecords`.
    """

    def __init__(self, files: Sequence[JsonRecords]):
        self.files = files
        self.ends = list(accumulate(len(file) for file in files))
        self.samples = self.ends[-1]

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int, rng: random.Random) -> Iterator[dict | Skipped]:
        number = bisect_right(self.ends, index)
        file = self.files[number]
        place = index - self.ends[number] + len(file)
        try:
            yield {"__key__": f"{file.path}: record {place}", "__url__": file.path, "json": file[place]}
        except Skipped as skipped:
            yield skipped
        except OSError as error:
            yield Skipped(MISSING_FILE, f"{file.path}: {error}")


class JsonTable:
    """The values of a ``.json`` file of the form ``{key: value, …}``, found by their keys; `UserError` if the file
    cannot be read or is not of that form."""

    def __init__(self, path: str):
        self.path = path
        rows = array("Q")
        for start, stop, key in _guarded(_pairs, path):
            rows.extend((_digest(key), start, stop))
        table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
        self.table = table[np.argsort(table[:, 0], kind="stable")]

    def get(self, key: str) -> Any | None:
        """The value of a key; None where it is not in the file."""
        digest = np.uint64(_digest(key))
        row = int(np.searchsorted(self.table[:, 0], digest))
        if row == len(self.table) or self.table[row, 0] != digest:
            return None
        return parse_json(_read(self.path, *self.table[row, 1:]), f"{self.path}: {key}")


BROKEN = object()  # a line of a .jsonl file that cannot be parsed
MARK = "\xef\xbb\xbf"  # UTF-8's byte order mark, byte by byte


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _read(path: str, start, stop) -> bytes:
    with open_utf8(path) as file:
        file.seek(int(start))
        return file.read(int(stop) - int(start))


def _guarded(read: Callable[[str], Iterator], path: str) -> Iterator:
    check_file(path)
    try:
        yield from read(_text(path))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def _text(path: str) -> str:
    """The file's bytes as characters of the same number, so that places in the text are places in the file.

    JSON's own signs are ASCII, and no byte of a longer UTF-8 character is.
    """
    if not Path(path).stat().st_size:
        return ""
    if is_wide(path):
        return open_utf8(path).read().decode("latin-1")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return str(content, "latin-1")


def _list(text: str) -> Iterator[tuple[int, int, Any]]:
    place = _open(text, _first_list(text), "[")
    while text[place : place + 1] != "]":
        record, stop = _scan(text, place)
        yield place, stop, record
        place = _next(text, stop, "]")


def _first_list(text: str) -> int:
    """Place of the list: the file's first sign, or where an object's first member that is a list of objects begins; if
    there is none, its first list."""
    place = _start(text)
    if text[place : place + 1] != "{":
        return place
    place, first = _open(text, place, "{"), None
    while text[place : place + 1] != "}":
        place, _ = _key(text, place)
        if text[place : place + 1] == "[":
            if text.startswith("{", _blanks(text, place + 1)):
                return place
            first = place if first is None else first
        place = _next(text, _scan(text, place)[1], "}")
    return place if first is None else first


def _pairs(text: str) -> Iterator[tuple[int, int, str]]:
    place = _open(text, _start(text), "{")
    while text[place : place + 1] != "}":
        start, key = _key(text, place)
        _, stop = _scan(text, start)
        yield start, stop, key
        place = _next(text, stop, "}")


def _key(text: str, place: int) -> tuple[int, str]:
    """(place of the value, key) of the member of an object that begins at `place`."""
    start = _blanks(text, _scan(text, place)[1])
    key = json.loads(text[place:start].encode("latin-1"))
    if text[start : start + 1] != ":" or not isinstance(key, str):
        raise ValueError(f"no key and value at byte {place}")
    return _blanks(text, start + 1), key


def _lines(text: str) -> Iterator[tuple[int, int, Any]]:
    for line in re.finditer(rf"(?:{MARK})*([^\n]+)", text):  # a mark begins each part of a file that `cat` joined
        if line[1].strip():
            try:
                yield *line.span(1), json.loads(line[1])
            except (ValueError, RecursionError):
                yield *line.span(1), BROKEN


def _start(text: str) -> int:
    """Place of the first sign, after a byte order mark."""
    return _blanks(text, len(MARK) if text.startswith(MARK) else 0)


def _open(text: str, place: int, bracket: str) -> int:
    """Place after the opening bracket at `place`."""
    if text[place : place + 1] != bracket:
        raise ValueError(f"no valid JSON of this form, it must begin with {bracket}; name a file of lines .jsonl")
    return _blanks(text, place + 1)


def _next(text: str, place: int, bracket: str) -> int:
    """Place of the next record, or of the closing bracket."""
    place = _blanks(text, place)
    if text[place : place + 1] == ",":
        return _blanks(text, place + 1)
    if text[place : place + 1] != bracket:
        raise ValueError(f"no comma or {bracket} at byte {place}")
    return place


def _blanks(text: str, place: int) -> int:
    return _BLANKS.match(text, place).end()
