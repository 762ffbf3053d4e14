"""Tables of separated values, in which a row that does not parse costs only itself.

Python's csv module drops what is beyond the last column, and an unbalanced quotation mark swallows the rows after it.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from common.errors import UserError
from common.files import read_text
from training.data.paths import IMAGES, has_suffix
from training.data.sources import MALFORMED_ITEM, Skipped

DELIMITERS = ("\t", "|", ";", ",")
LINE_END = re.compile(r"\r\n|\r|\n")
MAX_TABLE = 2**32  # bytes
UNBALANCED = "a quotation mark opens a cell that it does not close"


@dataclass
class Row:
    """A row, or a line that is none.

    Args:
        line: number of its first line, from 1.
        cells, raw: its cells, without and with quotation marks around them.
        problem: why it is no row; empty if it is one.
        quoted, needed: how many cells stand in quotation marks, and how many of them could not do without.
        stray: whether a cell that does not stand in quotation marks holds one.
    """

    line: int
    cells: list[str]
    raw: list[str]
    problem: str = ""
    quoted: int = 0
    needed: int = 0
    stray: bool = False


class Delimited:
    """A table whose first line names the columns, separated by that of tab, ``|``, ``;``, ``,`` which it holds most of.

    Between commas and semicolons, a cell that begins with a quotation mark ends with the next one that is not doubled,
    as in RFC 4180. Between tabs and bars that holds for the tables that were written so; in others the marks are
    letters: in tables that then have fewer bad rows, or have marks without a need for them.

    Attributes:
        header: the names of the columns.
    """

    def __init__(self, text: str):
        self.text = text
        first = next((line for line in LINE_END.split(text[: 2**20]) if line.strip()), "")
        self.delimiter = max(DELIMITERS, key=first.count)
        mark = re.escape(self.delimiter)
        self._in_marks = re.compile(rf' *"([^"]*(?:""[^"]*)*)" *(?={mark}|[\r\n]|\Z)')
        self._plain = re.compile(rf"[^{mark}\r\n]*")
        self.has_quotes = '"' in text and (self.delimiter in ",;" or self._was_quoted())
        self.header = [cell.strip() for row in islice(self._rows(self.has_quotes), 1) for cell in row.cells]

    def rows(self, text_is_last: bool) -> Iterator[Row]:
        """The rows after the header, without blank ones.

        Args:
            text_is_last: the last column is prose: surplus separators in it, outside of quotation marks, are its own.
        """
        rows = self._rows(self.has_quotes, text_is_last)
        next(rows, None)
        yield from rows

    def _was_quoted(self) -> bool:
        as_marks, as_letters = list(self._rows(True)), list(self._rows(False))
        bad, bad_letters = (sum(bool(row.problem) for row in rows) for rows in (as_marks, as_letters))
        if bad != bad_letters:
            return bad < bad_letters
        is_needed, is_usual = any(row.needed for row in as_marks), all(row.quoted for row in as_marks[1:])
        return not any(row.stray for row in as_marks) and (is_needed or is_usual)

    def _rows(self, has_quotes: bool, text_is_last: bool = False) -> Iterator[Row]:
        """The header and the rows after it."""
        text, start, line, width, full = self.text, 0, 1, 0, 0
        while start < len(text):
            stop, after = self._line_end(start)
            content, number = text[start:stop], line
            if has_quotes and '"' in content:
                row, last = self._quoted(start, number)
                if not row.problem and self._swallows(text[start:last], width):
                    row.problem = UNBALANCED
                if not row.problem and last > stop:  # it goes on in further lines
                    line += len(LINE_END.findall(text, start, last))
                    after = self._line_end(last)[1]
            else:
                raw = content.split(self.delimiter)
                row = Row(number, [cell.lstrip(" ") for cell in raw], raw)
            if any(cell.strip() for cell in row.cells):
                full = full or len(row.cells)
                width = width or max(number for number, cell in enumerate(row.cells, 1) if cell.strip())
                if len(row.cells) == full and not any(cell.strip() for cell in row.cells[width:]):
                    del row.cells[width:], row.raw[width:]  # what each line ends with
                self._fit(row, width, text_is_last)
                if row.problem:
                    row.problem = f"line {number}: {row.problem}: {content[:60]!r}"
                yield row
            start, line = after, line + 1

    def _line_end(self, start: int) -> tuple[int, int]:
        """Where the line ends, and where the next one begins."""
        end = LINE_END.search(self.text, start)
        return end.span() if end else (len(self.text), len(self.text))

    def _quoted(self, start: int, line: int) -> tuple[Row, int]:
        """The row that begins at `start`, and where it ends."""
        row = Row(line, [], [])
        while True:
            if found := self._in_marks.match(self.text, start):
                row.quoted += 1
                row.needed += any(sign in found[1] for sign in (self.delimiter, '"', "\n", "\r"))
                row.cells.append(found[1].replace('""', '"'))
            else:
                found = self._plain.match(self.text, start)
                row.cells.append(found[0].lstrip(" "))
                row.stray |= '"' in found[0]
                row.problem = UNBALANCED if row.cells[-1].startswith('"') else row.problem
            row.raw.append(found[0])
            start = found.end()
            if self.text[start : start + 1] != self.delimiter:
                return row, start
            start += 1

    def _swallows(self, text: str, width: int) -> bool:
        """Whether a row goes on over lines that look like rows of their own, since they name an image."""
        lines = (line.split(self.delimiter) for line in LINE_END.split(text)[1:])
        return any(
            len(cells) >= width and any(has_suffix(cell.strip(' "'), IMAGES) for cell in cells) for cells in lines
        )

    def _fit(self, row: Row, width: int, text_is_last: bool) -> None:
        """Gives a row as many cells as the header has, or a problem."""
        prose = row.raw[width - 1 :]
        in_marks = prose and prose[0].lstrip(" ").startswith('"')
        if len(row.cells) > width and text_is_last and not in_marks and any(cell.strip() for cell in prose[1:]):
            row.cells[width - 1 :] = [self.delimiter.join(prose).lstrip(" ")]
        if len(row.cells) != width:
            row.problem = row.problem or f"it has {len(row.cells)} cells, the header {width}"


class DelimitedRecords:
    """The rows of a table as JSON objects by column, in the way of `JsonRecords`.

    Args:
        path: the file.
        prose: columns of prose, see `Delimited.rows`.

    Raises:
        UserError: the file cannot be read, or has no header.
    """

    def __init__(self, path: str, prose: Collection[str] = ()):
        self.path = path
        table = Delimited(read_text(path, limit=MAX_TABLE))
        if not table.header:
            raise UserError(f"{path} is empty")
        self.header, self.rows = table.header, list(table.rows(text_is_last=table.header[-1] in prose))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        """One row; `Skipped` if it does not parse."""
        row = self.rows[index]
        if row.problem:
            raise Skipped(MALFORMED_ITEM, f"{self.path}: {row.problem}")
        return json.dumps(dict(zip(self.header, row.cells, strict=True))).encode()
