"""Files of an inference run: `{0000…}.png`, `results.jsonl` and one captioned `grid.png`."""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from common.contact_sheet import contact_sheet
from common.errors import UserError

MAX_CELLS = 64  # of the grid, so that it can be looked at after thousands of prompts too
CELL_SIDE = 384


def check_output_dir(folder: str | Path) -> Path:
    """Checks that results could be written to a folder, without creating it; returns its path.

    Raises:
        UserError: it is a file, or cannot be written to.
    """
    folder = Path(folder).expanduser()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "cannot be written to" if nearest.is_dir() else f"is not a folder ({nearest} is a file)"
        raise UserError(f"output_dir={folder} {reason}; give another output_dir")
    return folder


class ResultFolder:
    """Writes the results of one run. Its first image replaces the previous run in this folder, whose files are removed.

    Args:
        folder: created if missing. Files that no earlier run has written are left alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.lines = self.folder / "results.jsonl"
        self.count = 0  # images saved
        self.cells: list[tuple[Image.Image, str]] = []
        self.num_shown = 0

    def save(self, image: Image.Image) -> str:
        """Writes the next numbered image; returns its file name."""
        if self.count == 0:
            self._replace_last_run()
        name = f"{self.count:04d}.png"
        image.save(self.folder / name)
        self.count += 1
        return name

    def add(self, **record: Any) -> None:
        """Appends one line to `results.jsonl`."""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def show(self, image: Image.Image, caption: str) -> None:
        """Adds an image to the grid, which holds the first 64."""
        self.num_shown += 1
        if len(self.cells) < MAX_CELLS:
            image = image.copy()
            image.thumbnail((CELL_SIDE, CELL_SIDE))
            self.cells.append((image, caption))

    def write_grid(self) -> Path:
        """Writes `grid.png`; returns its path."""
        images, captions = zip(*self.cells, strict=True)
        title = f"first {len(images)} of {self.num_shown}" if self.num_shown > len(images) else None
        contact_sheet(images, captions, title=title).save(self.folder / "grid.png")
        return self.folder / "grid.png"

    def _replace_last_run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in _files_of(self.lines) | {"grid.png"}:
            (self.folder / name).unlink(missing_ok=True)
        self.lines.write_text("")


def _files_of(lines: Path) -> set[str]:
    """Image files that an earlier run's `results.jsonl` names; names that point outside its folder are ignored."""
    names = set()
    for line in lines.read_text(encoding="utf-8", errors="replace").split("\n") if lines.is_file() else ():
        try:
            name = json.loads(line).get("file")
        except (json.JSONDecodeError, AttributeError):
            continue
        if isinstance(name, str) and Path(name).name == name and name.endswith(".png"):
            names.add(name)
    return names
