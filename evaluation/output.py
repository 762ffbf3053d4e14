"""The files that an evaluation writes: each completely or not at all, and never over somebody else's."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import Owned, make_folder, write_json, write_text, writing

RESULTS, TABLE, METRICS = "results.json", "results.md", "metrics.jsonl"  # of a whole evaluation
COMPARED = ("compare.json", "compare.md")
PREDICTIONS, COUNTS, SHEET = "predictions.jsonl", "counts.json", "best_worst.png"  # of a task


class Output(Owned):
    """A folder of results.

    A file is noted as ours before it is written, so that it is ours also if the command is killed on the way.
    """

    def check(self, names: Iterable[str]) -> None:
        """`UserError` if one of the files is there and no evaluation wrote it."""
        self.claim(names, "output_dir")

    def note(self, name: str) -> Path:
        """The path of a file that is about to be written or added to; its folder is made."""
        path = self.folder / name
        make_folder(path.parent)
        if name not in self.written:
            self.record(name, grows=True)
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to, which then becomes the file `name`; `UserError` if that is somebody else's."""
        self.check([name])
        with writing(self.note(name)) as temporary:
            yield temporary

    def write_text(self, name: str, text: str) -> None:
        self.check([name])
        write_text(self.note(name), text)

    def write_json(self, name: str, value: Any) -> None:
        self.check([name])
        write_json(self.note(name), value)

    def write_json_lines(self, name: str, records: Iterable[Mapping]) -> None:
        self.write_text(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def save(self, name: str, image: Image.Image) -> str:
        """Writes an image as PNG; returns the name."""
        with self.writing(name) as temporary:
            image.save(temporary, format="PNG")
        return name
