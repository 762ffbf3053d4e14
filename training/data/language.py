"""Plain texts: parquet columns, jsonl and txt files (spec §15). A sample is a text."""

import io
import random
from collections.abc import Iterator
from functools import lru_cache

from common.errors import UserError
from common.files import BYTE_ORDER_MARK, MAX_LINE, kind_of, open_utf8, parse_json
from training.data.paths import choose_column
from training.data.sources import EMPTY_TEXT, MALFORMED_ITEM, MISSING_FILE, TRUNCATED_SHARD, Skipped, checked_text

MAX_CHARACTERS = 8000
CHUNK = 4 * 2**20  # bytes of a unit; its documents are in memory together
TOO_LONG = f"a document of over {MAX_LINE:,} bytes; end each with a line end, or with a blank line"
Parts = Iterator[tuple[int, bytes | None]]  # (place, document, or None in place of one that is too long)


def text_sample(raw: str | dict | None, rng: random.Random) -> str:
    """Newlines removed; texts over 8000 characters cut to a random window; `Skipped` if it is empty or no text."""
    name = raw.get("__key__", "") if isinstance(raw, dict) else ""
    raw = raw.get("text") if isinstance(raw, dict) else raw
    text = checked_text("" if raw is None else raw, name).replace("\n", "")
    if not text.strip():
        raise Skipped(EMPTY_TEXT, name)
    if len(text) > MAX_CHARACTERS:
        start = rng.randrange(len(text) - MAX_CHARACTERS + 1)
        text = text[start : start + MAX_CHARACTERS]
    return text


class Documents:
    """``.jsonl`` and ``.txt`` files in parts of some megabytes; a raw sample is ``{"__key__", "text"}``.

    A jsonl file holds a document a line, under the name `column`. A txt file holds documents parted by blank lines,
    whose lines are joined by blanks; one without a blank line in its first megabytes holds a document a line.

    Raises:
        UserError: a jsonl file's first line is no record or lacks `column`, a first line has no end, or all files are
            empty.
    """

    def __init__(self, paths: list[str], column: str):
        self.paths, self.column = paths, column
        sizes = [_size(path) for path in paths]
        self.units = [(file, start) for file, size in enumerate(sizes) for start in range(0, size, CHUNK)]
        if not self.units:
            raise UserError(f"{paths[0]} and {len(paths) - 1} more are empty")
        for path, size in zip(paths, sizes, strict=True):
            if size:
                _check_first(path, column)
        self.size, self._samples = sum(sizes), None

    @property
    def samples(self) -> int:
        """How many documents, guessed from how many the first part holds."""
        if self._samples is None:
            file, _ = self.units[0]
            of_part = min(CHUNK, _size(self.paths[file]))
            documents = sum(1 for _ in self.read(0, random.Random(0)))
            self._samples = max(1, round(documents * self.size / of_part))
        return self._samples

    def __len__(self) -> int:
        return len(self.units)

    def read(self, index: int, rng: random.Random) -> Iterator[dict | Skipped]:
        """The documents that begin in one part, in random order."""
        file, start = self.units[index]
        path = self.paths[file]
        try:
            documents = list(self._documents(path, start))
        except FileNotFoundError:
            documents = [Skipped(MISSING_FILE, path)]
        except OSError as error:
            documents = [Skipped(TRUNCATED_SHARD, f"{path}: {error}")]
        rng.shuffle(documents)
        yield from documents

    def _documents(self, path: str, start: int) -> Iterator[dict | Skipped]:
        split = _lines if _is_jsonl(path) or not _has_blank_lines(path) else _blocks
        for place, document in split(path, start, start + CHUNK):
            key = f"{path}: byte {place}"
            if document is None:
                yield Skipped(MALFORMED_ITEM, f"{key}: {TOO_LONG}")
                continue
            try:
                if _is_jsonl(path):
                    yield {"__key__": key, "text": parse_json(document, key, dict)[self.column]}
                else:
                    yield {"__key__": key, "text": document.decode().replace(BYTE_ORDER_MARK, "")}
            except UserError as error:
                yield Skipped(MALFORMED_ITEM, str(error))
            except UnicodeDecodeError as error:
                yield Skipped(MALFORMED_ITEM, f"{key} is no UTF-8 ({error.reason}); save the file as UTF-8")
            except KeyError:
                yield Skipped(MALFORMED_ITEM, f"{key} has no {self.column!r}")


def _size(path: str) -> int:
    with open_utf8(path) as file:
        return file.seek(0, io.SEEK_END)


def _is_jsonl(path: str) -> bool:
    return path.lower().endswith(".jsonl")


@lru_cache(maxsize=1024)  # asked for every part of a file
def _has_blank_lines(path: str) -> bool:
    with open_utf8(path) as file:
        lines = file.read(CHUNK).strip().splitlines()
    return any(not line.strip() for line in lines)


def _lines(path: str, start: int, stop: int) -> Parts:
    """The lines that begin in [start, stop), without empty ones."""
    with open_utf8(path) as file:
        _to_line(file, start, stop)
        while (place := file.tell()) < stop and (line := file.readline(MAX_LINE + 1)):
            if len(line) > MAX_LINE:
                yield place, None
                return  # the next line begins after `stop`
            if line.strip():
                yield place, line.strip(b"\r\n")


def _blocks(path: str, start: int, stop: int) -> Parts:
    """The blocks whose blank line before them begins in [start, stop), their lines joined by blanks."""
    with open_utf8(path) as file:
        _to_line(file, start, stop)
        begun, lines, place = start == 0, [], 0
        while True:
            here, line = file.tell(), file.readline(MAX_LINE + 1)
            if line.strip():
                place = place if lines else here
                lines += [line.strip()] if begun else []
                if lines and here + len(line) - place > MAX_LINE:
                    yield place, None
                    return
                if not begun and here >= stop:
                    return
                continue
            if lines:
                yield place, b" ".join(lines)
            begun, lines = True, []
            if not line or here >= stop:
                return


def _to_line(file, start: int, stop: int) -> None:
    """Moves to the first line that begins in [start, stop), or to `stop`."""
    if start:
        file.seek(start - 1)
        file.readline(stop - start + 1)


def _check_first(path: str, column: str) -> None:
    _, first = next(_lines(path, 0, CHUNK), (0, b"{}"))
    if first is None:
        raise UserError(f"{path} begins with {TOO_LONG}")
    if not _is_jsonl(path):
        return
    try:
        record = parse_json(first, path)
    except UserError:
        return  # one broken line of many
    if not isinstance(record, dict):
        raise UserError(
            f'{path} must hold a record such as {{"{column}": "text"}} a line; its first is {kind_of(record)}; put '
            "plain texts into a .txt file"
        )
    choose_column(path, record, [column], "dataset.params.lm_column")
