"""Files of inference runs: `{0000…}.png`, `results.jsonl` and captioned overviews, added to those of earlier runs."""

import json
import os
import re
import tempfile
from itertools import chain, count
from pathlib import Path
from typing import Any

from PIL import Image

from common.contact_sheet import contact_sheet
from common.errors import UserError, shown
from common.files import Owned, append_lines, disk_errors, expand, field, json_lines, make_folder, write_bytes, writing

MAX_CELLS = 64  # of the overview, so that it can be looked at after thousands of prompts too
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
    """Writes the results of one run, from its first image on.

    What is there stays: numbering goes on after the images of earlier runs, numbers that are taken are skipped, lines
    are appended, and the overview gets a name of its own.

    Args:
        folder: created if missing.
        overwrite: remove what earlier runs wrote, and only that, once the first image is there.

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
        self.cells: list[tuple[Image.Image, str]] = []
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
        if self.count == 0:
            name = self._replace_earlier(name) if self.overwrite else name
            self.first = self.number
        self.count += 1
        return name

    def add(self, **record: Any) -> None:
        """Appends one line to `results.jsonl`, completely or not at all."""
        record = {key: shown(value) if isinstance(value, str) else value for key, value in record.items()}
        with disk_errors(self.lines):
            append_lines(self.lines, json.dumps(record, ensure_ascii=False) + "\n")

    def show(self, image: Image.Image, caption: str) -> None:
        """Adds an image to the overview, which holds the first 64."""
        self.num_shown += 1
        if len(self.cells) < MAX_CELLS:
            image = image.copy()
            image.thumbnail((CELL_SIDE, CELL_SIDE))
            self.cells.append((image, caption))

    def write_grid(self) -> Path:
        """Writes the overview, `grid.png` or with the number of this run's first image; returns its path."""
        images, captions = zip(*self.cells, strict=True)
        title = f"first {len(images)} of {self.num_shown}" if self.num_shown > len(images) else None
        ends = [] if self.earlier else [""]
        ends = chain(ends, [f"-{self.first:04d}"], (f"-{self.first:04d}-{more}" for more in count(2)))
        name = next(name for end in ends if not os.path.lexists(self.folder / (name := f"grid{end}.png")))
        self._write(contact_sheet(images, captions, title=title), name)
        return self.folder / name

    def _free_number(self, own: str = "") -> str:
        """The next name that is not taken; `own`: one that may be."""
        while os.path.lexists(self.folder / (name := f"{self.number:04d}.png")) and name != own:
            self.number += 1
        return name

    def _replace_earlier(self, written: str) -> str:
        """Removes what earlier runs wrote, now that an image could be written; returns that image's new name."""
        with disk_errors(self.lines):
            for name in self.owned.names():
                if name != written and (NUMBERED.fullmatch(name) or OVERVIEW.fullmatch(name)):
                    (self.folder / name).unlink()
            self.earlier = [name for name in self.earlier if os.path.lexists(self.folder / name)]
            if self.lines.exists():
                kept = set(self.earlier)
                lines = [line for _, line, record in json_lines(self.lines) if kept.intersection(_image_of(record)[:1])]
                write_bytes(self.lines, b"".join(lines))
            self.number = 0
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
        image = _image_of(record)
        if not image and not line.startswith(b'{"file": "'):  # which a crash has cut off
            raise UserError(foreign)
        found.update([image] if image else [])
    return found


def copies_in(folder: Path) -> set[str]:
    """The files in a folder that runs wrote for people to look at: overviews, and images that were asked about."""
    try:
        asked = {name for name, mode in read_results(folder / LINES).items() if mode == "mmu"}
    except UserError:
        asked = set()
    return {name for name in Owned(folder).names() if name in asked or OVERVIEW.fullmatch(name)}


def _image_of(record: dict | UserError) -> tuple[str, str] | tuple[()]:
    """(image, mode) of a record of results; nothing of any other line."""
    try:
        name, mode = (field(record, key, str, LINES) for key in ("file", "mode"))
    except UserError:
        return ()
    return (name, mode) if NUMBERED.fullmatch(name) else ()
