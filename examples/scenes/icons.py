"""Makes `icons.json`: which icons the scene world consists of, their names and their shapes.

    python3 examples/scenes/icons.py packages_dir=packages

fetches one npm package (Material Design Icons, Apache-2.0) and copies the bodies of the icons below, each with the
square of its 24 x 24 canvas that the shape fills. `icons.json` is in the repository, so nothing else needs npm.
"""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import common  # noqa: F401  Ctrl-C is one word from here on

import numpy as np
from PIL import Image

from common.config import read_settings
from common.errors import UserError, run_cli
from common.files import make_folder, write_text
from common.settings import setting

PACKAGE, VERSION, LICENCE = "@iconify-json/mdi", "1.2.3", "Apache-2.0"
SHA256 = "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac"
ICONS_FILE = Path(__file__).with_name("icons.json")
CANVAS, SCALE = 24, 20  # side of an icon, and pixels of each of its units when its extent is measured
FILL = 11 / 12  # share of the square that the longer side of every shape takes, so that neighbours stay apart

# English name: the package's name, where it is another one. Solid shapes that a stranger can name at 24 x 24 pixels,
# and of which no two are alike there.
NAMES = {
    name.replace("_", " "): source or name
    for name, _, source in (
        word.partition("=")
        for word in """
        anchor apple=food-apple armchair=sofa-single axe backpack=bag-personal balloon bat bed bell bicycle bird
        bolt=lightning-bolt bomb bone book bottle=bottle-wine bulb=lightbulb burger=hamburger bus butterfly cactus
        cake=cake-variant camera candle candy car carrot castle cat cherry=fruit-cherries clock cloud clover
        cocktail=glass-cocktail cookie cow crown cup=coffee diamond=diamond-stone dice=dice-5
        dinosaur=google-downasaur dog=dog-side dolphin drumstick=food-drumstick duck elephant envelope=email eye
        feather fish flag flame=fire flashlight flower gear=cog ghost gift guitar=guitar-acoustic hammer
        hand=hand-back-right hat=hat-fedora heart helicopter horse house=home ice_cream=ice-cream jellyfish kangaroo
        key kite lamp leaf lock magnet melon=fruit-watermelon microphone moon=moon-waning-crescent mouse=rodent
        mushroom owl paw pear=fruit-pear pencil penguin phone piano pig=pig-variant pine=pine-tree
        pineapple=fruit-pineapple pizza plane=airplane pumpkin puzzle rabbit ring robot rocket sailboat=sail-boat
        saxophone shark sheep ship=ferry shirt=tshirt-crew shoe=shoe-sneaker skateboard skull snail snake snowflake
        snowman sock=stocking spade=shovel spider star sun=white-balance-sunny sword teddy=teddy-bear
        television=television-classic tie tractor train tree trophy truck turtle=tortoise umbrella
        watering_can=watering-can wrench
        """.split()
    )
}


@dataclass
class IconsConfig:
    packages_dir: str = setting("packages", "folder of the downloaded package")


def fetch_package(folder: Path) -> Path:
    """The package's archive, downloaded if `folder` lacks it; UserError without npm or network."""
    path = make_folder(folder) / f"{PACKAGE.replace('@', '').replace('/', '-')}-{VERSION}.tgz"
    if not path.exists():
        by_hand = f"put {path.name} into {folder} by hand"
        if shutil.which("npm") is None:
            raise UserError(f"npm is needed to download {PACKAGE}@{VERSION}; install Node.js, or {by_hand}")
        command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--loglevel=error"]
        done = subprocess.run(
            [*command, "--pack-destination", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"npm could not download {PACKAGE} ({reason}); connect to the network once, or {by_hand}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{path} is not the published {PACKAGE}@{VERSION}: its SHA-256 differs; remove it")
    return path


def rasterize(body: str, box: list[float], side: int) -> np.ndarray:
    """The alpha channel of an SVG body: (side, side) uint8.

    Args:
        box: left, top and side of the square that is shown, in units of the canvas.
    """
    import resvg_py

    view = f'viewBox="{box[0]} {box[1]} {box[2]} {box[2]}" width="{side}" height="{side}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{body.replace("currentColor", "#000")}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))[..., 3].copy()


def tight_box(body: str) -> list[float]:
    """The square around a shape that its longer side fills to `FILL`, the shape in its middle."""
    rows, columns = np.nonzero(rasterize(body, [0, 0, CANVAS], CANVAS * SCALE) > 64)
    (top, bottom), (left, right) = ((along.min() / SCALE, (along.max() + 1) / SCALE) for along in (rows, columns))
    side = max(bottom - top, right - left) / FILL
    return [round((low + high - side) / 2, 2) for low, high in ((left, right), (top, bottom))] + [round(side, 2)]


def main(argv: list[str]) -> None:
    config = read_settings(argv, IconsConfig, "packages_dir=packages")
    with tarfile.open(fetch_package(Path(config.packages_dir))) as tar:
        bodies = json.load(tar.extractfile("package/icons.json"))["icons"]
    icons = []
    for name in sorted(NAMES):
        body = bodies[NAMES[name]]["body"]
        icons.append({"name": name, "source": NAMES[name], "box": tight_box(body), "body": body})
    facts = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "licence": LICENCE}
    facts |= {"title": "Material Design Icons", "authors": "Pictogrammers and contributors"}
    lines = ",\n".join(f"  {json.dumps(icon)}" for icon in icons)
    write_text(ICONS_FILE, f'{json.dumps(facts)[:-1]}, "icons": [\n{lines}\n]}}\n')
    print(f"{ICONS_FILE}: {len(icons)} icons")


if __name__ == "__main__":
    run_cli(main)
