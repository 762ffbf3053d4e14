"""The emoji world as a benchmark: which images there are, and which of them training saw.

`{data_root}/{emoji_world}/` as `make data-emoji` writes it: `manifest.json` and `images/`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from evaluation.official_files import check_filled, check_images, field, read_json, unique_keys
from examples.emoji_world.text import GROUPS, STYLES

SPLITS = ("seen", "held-out")
WHAT = "the manifest of an emoji world, which `make data-emoji` writes"


@dataclass(frozen=True)
class Picture:
    key: str
    name: str
    style: str
    group: str
    split: str  # seen in training, or held out: its name was seen in other styles only
    path: Path

    @property
    def kinds(self) -> tuple[str, str]:
        """What its figures are counted under."""
        return self.split, f"{self.split}, {self.style}"


KINDS = tuple(kind for split in SPLITS for kind in (split, *(f"{split}, {style}" for style in STYLES)))


def world_settings(folder: Path) -> dict[str, str]:
    """Identifies the world by a digest of its manifest, which has the checksums of all files made with the images."""
    return {"emoji_manifest": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:12]}


def read_world(folder: Path) -> list[Picture]:
    """All images in the manifest's order.

    Raises:
        UserError: a file or field is missing or wrong.
    """
    file = folder / "manifest.json"
    manifest = read_json(file, dict, WHAT)
    groups = {}
    for number, record in enumerate(field(str(file), manifest, "names", list)):
        place = f"{file}, name {number}"
        groups[field(place, record, "name", str)] = field(place, record, "group", str, tuple(GROUPS.values()))
    pictures = []
    for number, record in enumerate(field(str(file), manifest, "pictures", list)):
        place = f"{file}, picture {number}"
        key, name = (field(place, record, part, str) for part in ("key", "name"))
        if name not in groups:
            raise UserError(f"{place}: field 'name' is {name!r}; expected one of the {len(groups)} names of the file")
        style = field(place, record, "style", str, STYLES)
        split = SPLITS[field(place, record, "held_out", bool)]
        pictures.append(Picture(key, name, style, groups[name], split, folder / "images" / f"{key}.png"))
    check_filled(pictures, f"{file}: field 'pictures'", WHAT)
    unique_keys([picture.key for picture in pictures], file, "key")
    check_images(
        [picture.path for picture in pictures],
        lambda path: f"field 'key' of manifest.json ({path.stem})",
        f"the images of the emoji world in {folder / 'images'}",
    )
    return pictures
