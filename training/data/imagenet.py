"""A folder of class folders, such as ImageNet: the text of an image is the name of its class (spec §15)."""

import logging
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError, shown
from common.files import is_hidden, read_json, read_text, real_path, visible_folders
from training.data.paths import IMAGES, has_suffix

logger = logging.getLogger(__name__)

READ = (".jpeg", ".jpg", ".png", ".webp")  # more of them would change the order of runs that resume
SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")
LEVELS = 5  # ILSVRC/Data/CLS-LOC/train: the synset file of the published archive lies four folders above


class ImageFolder:
    """Images ``{folder}/{class}/{file}``, or ``{folder}/train/{class}/{file}``.

    A class is called as `names` says, else by the first name in the data set's own file of synsets, looked for in the
    folder and those above it, else as its folder.

    Args:
        folder: of the data set.
        names: file with a line ``{class folder} {name}`` for each class, or a JSON dictionary.
        suffixes: of the images that are samples; one line tells of others.

    Raises:
        UserError: there are no images, or `names` cannot be read.
    """

    def __init__(self, folder: str, names: str | None = None, suffixes: tuple[str, ...] = READ):
        root = Path(folder)
        self.root = root / "train" if (root / "train").is_dir() else root
        classes = [entry.name for entry in visible_folders(self.root)]
        images = [f"{name}/{file}" for name in classes for file in _image_files(self.root / name)]
        files = [file for file in images if has_suffix(file, suffixes)]
        if not files:
            raise UserError(f"{self.root} holds no {', '.join(suffixes[:4])} in folders named after their classes")
        if len(files) < len(images):
            other = next(file for file in images if not has_suffix(file, suffixes))
            logger.warning(
                "%s: %d images such as %s are left out; convert them to %s to have them read",
                self.root,
                len(images) - len(files),
                shown(other),
                suffixes[1],
            )
        self.files = np.array([os.fsencode(file) for file in files])  # one array: loader workers share it
        self.names = _synsets(self.root) | (_read_names(names) if names else {})
        nameless = [name for name in classes if name not in self.names and re.fullmatch(r"n\d{8}", name)]
        if nameless:
            logger.warning(
                "%s: %d classes such as %s have no name and are called by their folder; put %s beside the folder, or "
                "give the training dataset.params.class_names_path",
                self.root,
                len(nameless),
                nameless[0],
                SYNSET_FILES[0],
            )

    @property
    def samples(self) -> int:
        return len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, rng: random.Random) -> Iterator[dict]:
        file = os.fsdecode(bytes(self.files[index]))
        name = file.partition("/")[0]
        yield {"__key__": file, "image": str(self.root / file), "text": self.names.get(name, name)}


def _image_files(folder: Path) -> list[str]:
    # Without looking at each file: there may be millions, far away.
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if has_suffix(name, IMAGES) and not is_hidden(name))


def _synsets(root: Path) -> dict[str, str]:
    for folder in [(real := real_path(root)), *real.parents][:LEVELS]:
        for file in SYNSET_FILES:
            if (folder / file).is_file():
                names = _read_names(str(folder / file))  # such as ``n01440764 tench, Tinca tinca``
                return {synset: name.split(",")[0].strip() for synset, name in names.items()}
    return {}


def _read_names(path: str) -> dict[str, str]:
    """Class folder → name, from a file with one per line or a JSON dictionary."""
    try:
        if path.lower().endswith(".json"):
            pairs = read_json(path).items()
        else:
            lines = re.split(r"\r\n|\r|\n", read_text(path))
            pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
        return {str(folder): name.strip() for folder, name in pairs}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} does not give a name for each class folder, one a line: {error}") from None
