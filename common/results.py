"""Files of inference runs: `{0000…}.png`, `results.jsonl` and captioned overviews, added to those of earlier runs."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from PIL import Image

from common.contact_sheet import Cell, contact_sheet
from common.errors import UserError, shown
from common.files import Owned, append_lines, disk_errors, expand, field, json_lines, make_folder, write_bytes, writing

MAX_CELLS = 64  # of the overview, so that it can be looked at after thousands of prompts too
MAX_COLUMNS = 8  # of rows that belong together; longer ones go on below
CELL_SIDE = 384
LINES = "results.jsonl"
NUMBERED, OVERVIEW = re.compile(r"(\d{4,9})\.png"), re.compile(r"grid(-\d+)*\.png")


def check_output_dir(folder: str | Path, setting: str = "output_dir") -> Path:
    """The path of a folder, which the key `setting` names and which is not created; `UserError` if it is a file, or
    nothing could be written to it."""
    folder = expand(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{setting}={folder} is not a folder ({nearest} is a file); give another {setting}")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = f"cannot be written to ({error.strerror or error})"
        raise UserError(f"{setting}={folder} {reason}; give another {setting}") from None
    return folder


class ResultFolder:
    """Writes the results of one run, from its first image or line on.

    What is there stays: numbering goes on after the images of earlier runs, numbers that are taken are skipped, lines
    are appended, and the overview gets a name of its own.

    Args:
        folder: created if missing.
        overwrite: remove what earlier runs wrote, and only that, once the first result is there.

    Attributes:
        note: what becomes of the images that are there, for the user to know; empty if there are none.

    Raises:
        UserError: see `check_output_dir`; or the folder's `results.jsonl` is somebody else's.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False) -> None:
        self.folder, self.overwrite = check_output_dir(folder), overwrite
        self.lines = self.folder / LINES
        self.owned = Owned(self.folder)
        self.earlier = [name for name in read_results(self.lines) if os.path.lexists(self.folder / name)]
        self.first = self.number = 1 + max((int(NUMBERED.fullmatch(name)[1]) for name in self.earlier), default=-1)
        self.note = self._note()
        self.count = 0  # images saved
        self.has_begun = False
        self.rows: list[list[tuple[Cell, str]]] = []  # of the overview
        self.num_shown = 0

    def _note(self) -> str:
        changed = [name for name in self.earlier if self.overwrite and not self.owned.is_ours(name)]
        if not self.earlier:
            return ""
        fate = "which are replaced" if self.overwrite else "which stay; overwrite=true replaces them"
        note = f"{self.folder} holds {_images(len(self.earlier) - len(changed))} of earlier runs, {fate}"
        if changed:
            names = ", ".join(changed[:3]) + ", …" * (len(changed) > 3)
            note += f"; {_images(len(changed))} changed since stay{'s' * (len(changed) == 1)}: {names}"
        return note

    def save(self, image: Image.Image) -> str:
        """Writes the next numbered image; returns its file name."""
        make_folder(self.folder)
        name = self._free_number()
        self._write(image, name)
        name = self._begin(name)
        self.count += 1
        return name

    def add(self, **record: Any) -> None:
        """Appends one line to `results.jsonl`, completely or not at all. Its first key is `file`, the name of an image,
        or `files`, a list of them."""
        make_folder(self.folder)
        self._begin("")
        record = {key: shown(value) if isinstance(value, str) else value for key, value in record.items()}
        with disk_errors(self.lines):
            append_lines(self.lines, json.dumps(record, ensure_ascii=False) + "\n")

    def show(self, image: Image.Image, caption: str) -> None:
        """Adds an image to the overview, which holds the first 64."""
        self.show_row([(image, caption)])

    def show_row(self, cells: Sequence[tuple[Cell, str]]) -> None:
        """Adds images and texts that belong together, each with a caption, as a row of the overview."""
        self.num_shown += 1
        if sum(map(len, self.rows)) < MAX_CELLS:
            self.rows.append([(_shrunk(cell), caption) for cell, caption in cells])

    def write_grid(self) -> Path:
        """Writes the overview, `grid.png` or with the number of this run's first image; returns its path."""
        longest = max(map(len, self.rows))
        columns = min(longest, MAX_COLUMNS) if longest > 1 else None
        padded = [[*row, *[(None, "")] * (-len(row) % (columns or 1))] for row in self.rows]
        images, captions = zip(*chain(*padded), strict=True)
        title = f"first {len(self.rows)} of {self.num_shown}" if self.num_shown > len(self.rows) else None
        ends = [] if self.earlier else [""]
        ends = chain(ends, [f"-{self.first:04d}"], (f"-{self.first:04d}-{more}" for more in count(2)))
        name = next(name for end in ends if not os.path.lexists(self.folder / (name := f"grid{end}.png")))
        self._write(contact_sheet(images, captions, columns, title=title), name)
        return self.folder / name

    def _free_number(self, own: str = "") -> str:
        """The next name that is not taken; `own`: one that may be."""
        while os.path.lexists(self.folder / (name := f"{self.number:04d}.png")) and name != own:
            self.number += 1
        return name

    def _begin(self, written: str) -> str:
        """Called with the image, or none, that has been written; returns its name, a new one if it replaces others."""
        if not self.has_begun:
            self.has_begun = True
            written = self._replace_earlier(written) if self.overwrite else written
            self.first = self.number
        return written

    def _replace_earlier(self, written: str) -> str:
        """Removes what earlier runs wrote, now that an image could be written, if any; returns its new name."""
        with disk_errors(self.lines):
            for name in self.owned.names():
                if name != written and (NUMBERED.fullmatch(name) or OVERVIEW.fullmatch(name)):
                    (self.folder / name).unlink()
            self.earlier = [name for name in self.earlier if os.path.lexists(self.folder / name)]
            if self.lines.exists():
                kept = set(self.earlier)
                lines = [line for _, line, record in json_lines(self.lines) if kept.intersection(_images_of(record))]
                write_bytes(self.lines, b"".join(lines))
            self.number = 0
            if not written:
                return written
            name = self._free_number(written)
            (self.folder / written).rename(self.folder / name)
        self.owned.record(name)
        return name

    def _write(self, image: Image.Image, name: str) -> None:
        with writing(self.folder / name) as temporary:
            image.save(temporary, "PNG")
        self.owned.record(name)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def read_results(lines: Path) -> dict[str, str]:
    """{image: mode} of a `results.jsonl`; `UserError` if it is a link or no regular file, or holds lines that no run
    has written."""
    found: dict[str, str] = {}
    if not os.path.lexists(lines):
        return found
    foreign = f"{lines} was not written by this command; move it away or give another output_dir"
    if lines.is_symlink() or not lines.is_file():
        raise UserError(foreign)
    for _, line, record in json_lines(lines):
        images = _images_of(record)
        if not images and not line.startswith((b'{"file": "', b'{"files": [')):  # cut off by a crash, or texts alone
            raise UserError(foreign)
        found |= images
    return found


def copies_in(folder: Path) -> set[str]:
    """The files in a folder that runs wrote for people to look at: overviews, and images that were asked about."""
    try:
        asked = {name for name, mode in read_results(folder / LINES).items() if mode == "mmu"}
    except UserError:
        asked = set()
    return {name for name in Owned(folder).names() if name in asked or OVERVIEW.fullmatch(name)}


def _shrunk(cell: Cell) -> Cell:
    if isinstance(cell, Image.Image):
        cell = cell.copy()
        cell.thumbnail((CELL_SIDE, CELL_SIDE))
    return cell


def _images_of(record: dict | UserError) -> dict[str, str]:
    """{image: mode} of a record of results; nothing of any other line."""
    try:
        mode = field(record, "mode", str, LINES)
        names = field(record, "files", list, LINES) if "files" in record else [field(record, "file", str, LINES)]
    except UserError:
        return {}
    return {name: mode for name in names if isinstance(name, str) and NUMBERED.fullmatch(name)}
