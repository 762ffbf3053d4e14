"""A folder of 60 images as people have them, with what cameras, systems and editors leave there."""

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 30), "green": (40, 170, 60), "blue": (40, 70, 210), "grey": (120, 120, 120)}
NUM_IMAGES = 60
# What is left out when it is made into shards, by kind.
SKIPPED = Counter(unreadable_image=2, no_caption=2, empty_text=1, malformed_item=1)
NUM_SAMPLES = NUM_IMAGES - SKIPPED.total()


def picture(number: int, size: tuple[int, int] = (80, 70)) -> tuple[Image.Image, str]:
    """A square on a ground of another colour, at a place of its own, and its caption."""
    rng = random.Random(number)
    ground, colour = rng.sample(list(COLOURS), 2)
    image = Image.new("RGB", size, COLOURS[ground])
    left, top = rng.randrange(8, 40), rng.randrange(8, 30)
    image.paste(COLOURS[colour], (left, top, left + 30, top + 30))
    return image, f"a {colour} square on {ground}, number {number}"


def write_messy_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(NUM_IMAGES):
        write_image(folder, number)
    leave_leftovers(folder)
    return folder


def write_image(folder: Path, number: int) -> None:
    """The image of this number in its own format, and its caption in its own encoding."""
    image, caption = picture(number)
    place = folder / ("summer" if number % 3 == 0 else "") / f"IMG {number:02d} [a].jpg"
    place.parent.mkdir(exist_ok=True)
    text = caption.encode()
    match number:
        case 0 | 1 | 2:
            place = place.with_suffix(".JPG")
            image.save(place)
        case 3 | 4 | 5:
            image.save(place := place.with_suffix(".png"))
        case 6 | 7 | 8:
            image.save(place := place.with_suffix(".webp"))
        case 9:
            frames = [picture(100)[0]]
            image.save(place := place.with_suffix(".gif"), save_all=True, append_images=frames)
        case 10:
            image.save(place := place.with_suffix(".bmp"))
        case 11:
            image.save(place := place.with_suffix(".tiff"))
        case 12 | 13:  # 16 bits of grey
            grey = np.asarray(image.convert("L"), dtype=np.uint16) * 257
            Image.fromarray(grey).save(place := place.with_suffix(".png"))
        case 14 | 15:  # transparent where nothing is
            image.putalpha(Image.new("L", image.size, 128))
            image.save(place := place.with_suffix(".PNG"))
        case 16 | 17:  # a camera held upright
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(place, exif=exif)
        case 18:
            image.convert("CMYK").save(place)
        case 19:
            image.convert("P").save(place := place.with_suffix(".png"))
        case 20:  # what a browser saved under another name
            image.save(place, "GIF")
        case 21:
            image.save(place)
            place.write_bytes(place.read_bytes()[:-300])
        case 22:
            place.write_text("<html>404: not found</html>")
        case 23:
            place = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))
            image.save(place)
        case _:
            image.save(place)
    match number:
        case 24:
            text = b"\xef\xbb\xbf" + text
        case 25:
            text = caption.replace(", ", ",\r\n").encode() + b"\r\n"
        case 26:
            text = caption.encode("utf-16")
        case 27:
            text = f"{caption}, in a caf\u00e9".encode("latin-1")
        case 28:
            text = b" \n"
        case 29 | 30:
            return
    place.with_suffix(".TXT" if number == 2 else ".txt").write_bytes(text)


def leave_leftovers(folder: Path) -> None:
    """Files and folders that count as nobody's data."""
    image, caption = picture(200)
    for hidden in ("__MACOSX", ".ipynb_checkpoints", "summer/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        image.save(folder / hidden / "IMG 40 [a].jpg")
        (folder / hidden / "IMG 40 [a].txt").write_text(caption)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    for number in range(40, 60):
        (folder / f"._IMG {number} [a].jpg").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        (folder / f"._IMG {number} [a].txt").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "summer" / "loop").symlink_to(folder, target_is_directory=True)
