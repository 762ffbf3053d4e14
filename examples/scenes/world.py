"""Scenes: what they are, which are held out, how they are made from a seed and drawn.

A scene is a ground and one to five things on it, each an icon in a colour and one of two sizes, at a place on the code
grid (cells of 8 x 8 pixels), back to front. Things may touch; one may stand before another, if most of that one stays
visible. Everything here is exact and the same on every machine.
"""

import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from examples.scenes.icons import ICONS_FILE, rasterize, tight_box

CELL = 8  # pixels: the image tokenizer has one code for each cell
SIDES = {64: (3, 5), 96: (3, 5), 128: (4, 7)}  # pixels of an image → cells of a small and of a large thing
SIZES = ("small", "large")
_SIDES = {(size, side // CELL): lengths[i] for side, lengths in SIDES.items() for i, size in enumerate(SIZES)}
MAX_THINGS = 5
HIDDEN = 1 / 4  # most of a thing's square that others may cover
VISIBLE_OVERLAP = 8  # pixels that two shapes share at least, where one is said to be in front of the other

COLOURS = {
    "red": (214, 32, 40),
    "orange": (245, 130, 20),
    "yellow": (232, 196, 0),
    "green": (20, 140, 60),
    "blue": (30, 84, 216),
    "purple": (126, 44, 170),
    "pink": (244, 108, 178),
    "black": (24, 24, 24),
}
GROUNDS = {"white": (255, 255, 255), "grey": (186, 188, 192), "sky": (184, 222, 248), "sand": (240, 222, 180)}
_LIBRARY = json.loads(ICONS_FILE.read_text(encoding="utf-8"))
ICONS = tuple(icon["name"] for icon in _LIBRARY["icons"])
LICENCES = {key: value for key, value in _LIBRARY.items() if key != "icons"}
_ICON, _COLOUR = ({name: index for index, name in enumerate(names)} for names in (ICONS, COLOURS))

HORIZONTAL, VERTICAL = ("left", "", "right"), ("top", "", "bottom")
PLACES = tuple(" ".join(filter(None, (row, column))) or "centre" for row in VERTICAL for column in HORIZONTAL)
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
}


@dataclass(frozen=True)
class Thing:
    """An icon; `x` and `y` are the column and row of its square's top left cell."""

    icon: str
    colour: str
    size: str
    x: int
    y: int

    @property
    def kind(self) -> tuple[str, str]:
        return self.icon, self.colour


@dataclass(frozen=True)
class Scene:
    """A ground and the things on it, back to front; `cells` is the side of the image in cells."""

    ground: str
    things: tuple[Thing, ...]
    cells: int = 12

    def as_json(self) -> dict:
        things = [dict(vars(thing)) for thing in self.things]
        return {"ground": self.ground, "things": things, "cells": self.cells}

    @classmethod
    def from_json(cls, record: dict) -> "Scene":
        return cls(record["ground"], tuple(Thing(**thing) for thing in record["things"]), record["cells"])

    def side(self, thing: Thing) -> int:
        """Cells along the square of a thing."""
        return side_of(thing.size, self.cells)

    def centre(self, thing: Thing) -> tuple[int, int]:
        """Column and row of its middle, in half cells."""
        side = self.side(thing)
        return 2 * thing.x + side, 2 * thing.y + side

    def place(self, thing: Thing) -> str:
        """Which of the nine `PLACES`, thirds of the image, its middle lies in."""
        column, row = (3 * middle // (2 * self.cells) for middle in self.centre(thing))
        return PLACES[3 * row + column]

    def overlap(self, one: Thing, other: Thing) -> int:
        """Cells that the squares of two things share."""
        a, b = ((thing.x, thing.y, self.side(thing)) for thing in (one, other))
        return _shared(a, b)

    def relation(self, one: Thing, other: Thing) -> str:
        """`left of`, `right of`, `above` or `below`, where that is plain to see; else empty."""
        (x, y), (u, v) = self.centre(one), self.centre(other)
        across, down = u - x, v - y
        if max(abs(across), abs(down)) < 4 or 2 * max(abs(across), abs(down)) < 3 * min(abs(across), abs(down)):
            return ""
        if abs(across) > abs(down):
            return "left of" if across > 0 else "right of"
        return "above" if down > 0 else "below"

    def related(self, one: Thing, relation: str, other: Thing) -> bool:
        """Whether a relation holds, also where it is too close to be asked about."""
        if relation in ("in front of", "behind"):
            order = self.things.index(one) - self.things.index(other)
            return (order > 0) == (relation == "in front of") and bool(shared_pixels(self, one, other))
        (x, y), (u, v) = self.centre(one), self.centre(other)
        along, beside = (u - x, v - y) if relation in ("left of", "right of") else (v - y, u - x)
        along *= 1 if relation in ("left of", "above") else -1
        return along >= 2 and along >= abs(beside)

    def in_front(self, one: Thing, other: Thing) -> bool:
        """Whether `one` visibly covers a part of `other`."""
        return self.related(one, "in front of", other) and shared_pixels(self, one, other) >= VISIBLE_OVERLAP

    def is_between(self, one: Thing, first: Thing, last: Thing) -> bool:
        found = self.relation(first, one)
        return bool(found) and found == self.relation(one, last) == self.relation(first, last)


def side_of(size: str, cells: int) -> int:
    """Cells along the square of a thing of a size."""
    return _SIDES[size, cells]


# ---- what is held out ----


def colour_held_out(icon: str, colour: str) -> bool:
    return (5 * _ICON[icon] + 3 * _COLOUR[colour]) % 11 == 0


def pair_held_out(one: str, other: str) -> bool:
    low, high = sorted((_ICON[one], _ICON[other]))
    return low < high and (7 * low + 11 * high) % 10 == 0


def count_held_out(icons: Iterable[str]) -> bool:
    """Three or more of one kind together with another kind."""
    counts = Counter(icons)
    return len(counts) > 1 and max(counts.values()) >= 3


def held_out(things: Iterable[Thing]) -> set[str]:
    """Which rules keep these things out of all training data: some of `colours`, `pairs` and `counts`."""
    things = tuple(things)
    icons = [thing.icon for thing in things]
    found = {
        "colours": any(colour_held_out(*thing.kind) for thing in things),
        "pairs": any(pair_held_out(a, b) for index, a in enumerate(icons) for b in icons[:index]),
        "counts": count_held_out(icons),
    }
    return {rule for rule, broken in found.items() if broken}


def is_reserved(scene: Scene) -> bool:
    """Whether a scene is one of the eighth of all that training never shows, for the split `seen`."""
    facts = repr((scene.ground, sorted(tuple(vars(thing).values()) for thing in scene.things), scene.cells))
    return zlib.crc32(facts.encode()) % 8 == 0


# ---- scenes from a seed ----

# Training data, held-out scenes of seen combinations, and those of held-out ones.
SPLITS = ("train", "seen", "colours", "pairs", "counts")


def generator(*parts) -> random.Random:
    """Random numbers that depend on names and numbers only."""
    return random.Random("/".join(map(str, parts)))


def sample_scene(
    rng: random.Random,
    cells: int = 12,
    split: str = "train",
    counts: tuple[int, ...] = (1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5),
) -> Scene:
    """A scene of a split: a held-out one breaks the split's own rule, with as many things as possible, and no other.

    Args:
        counts: numbers of things, one of which is drawn.
    """
    wanted = set() if split in ("train", "seen") else {split}
    if split == "pairs":
        counts = tuple(count for count in counts if count > 1) or (2,)
    if split == "counts":
        counts = tuple(count for count in counts if count > 3) or (4,)
    while True:
        icons = sample_icons(rng, rng.choice(counts), split)
        colours = _sample_colours(rng, icons, split == "colours")
        order = list(zip(icons, colours, strict=True))
        rng.shuffle(order)
        things = arrange(rng, order, cells) if all(colours) else None
        if things is not None and held_out(things) == wanted:
            scene = Scene(rng.choice(tuple(GROUNDS)), things, cells)
            if wanted or is_reserved(scene) == (split == "seen"):
                return scene


def sample_icons(rng: random.Random, count: int, split: str) -> list[str]:
    """The kinds of `count` things: mostly all different, at times several of one kind."""
    if split == "counts":
        one, other = _compatible(rng, 2)
        return [one] * (count - 1) + [other]
    if split == "pairs":
        while not pair_held_out(*(first := rng.sample(ICONS, 2))):
            pass
        return first + [rng.choice(first) for _ in range(min(count, 3) - 2)] + rng.sample(ICONS, max(0, count - 3))
    manner = rng.random()
    if count > 1 and manner < 0.25:
        return [rng.choice(ICONS)] * count
    if count > 2 and manner < 0.4:
        icons = _compatible(rng, count - 1)
        return [icons[0], *icons]
    return _compatible(rng, count)


def _compatible(rng: random.Random, count: int) -> list[str]:
    """`count` different icons of which no pair is held out."""
    icons: list[str] = []
    while len(icons) < count:
        icon = rng.choice(ICONS)
        if icon not in icons and not any(pair_held_out(icon, other) for other in icons):
            icons.append(icon)
    return icons


def _sample_colours(rng: random.Random, icons: list[str], unseen: bool) -> list[str | None]:
    """A colour for each thing, of the held-out ones or of the others; None where there is no held-out one."""
    choices = {icon: [c for c in COLOURS if colour_held_out(icon, c) == unseen] or [None] for icon in icons}
    colours = [rng.choice(choices[icon]) for icon in icons]
    return [colours[0]] * len(icons) if len(set(icons)) == 1 and rng.random() < 0.6 else colours


def arrange(rng: random.Random, kinds: list[tuple[str, str]], cells: int, tries: int = 20) -> tuple[Thing, ...] | None:
    """Places and sizes for things of these icons and colours, back to front; None where none were found."""
    manner = rng.random()  # often apart; otherwise overlaps may come about, or are looked for
    for attempt in range(tries):
        things: list[Thing] = []
        for icon, colour in kinds:
            size = SIZES[rng.random() < (0.4 if attempt < tries // 2 else 0.1)]
            near = rng.choice(things) if things and manner < 0.3 else None
            new = add_thing(rng, things, icon, colour, size, cells, manner < 0.6, near)
            if new is None:
                break
            things.append(new)
        else:
            return tuple(things)
    return None


def add_thing(
    rng: random.Random,
    things: Sequence[Thing],
    icon: str,
    colour: str,
    size: str,
    cells: int,
    overlapping: bool = True,
    near: Thing | None = None,
) -> Thing | None:
    """One more thing, at a place where it can stand in front of the others; None if none is found soon.

    Args:
        overlapping: it may hide a part of others.
        near: one that its square touches.
    """
    side = side_of(size, cells)
    ranges = [(0, cells - side)] * 2
    if near is not None:
        reach = side_of(near.size, cells)
        ranges = [(max(0, at - side + 1), min(cells - side, at + reach - 1)) for at in (near.x, near.y)]
    for _ in range(12):
        new = Thing(icon, colour, size, *(rng.randint(*limits) for limits in ranges))
        if can_stand_before(things, new, cells, overlapping):
            return new
    return None


def can_stand_before(things: Sequence[Thing], new: Thing, cells: int, overlapping: bool = True) -> bool:
    """Whether `new` is inside the image, and in front of `things` hides no more than is allowed."""
    squares = [(thing.x, thing.y, side_of(thing.size, cells)) for thing in things]
    x, y, side = square = (new.x, new.y, side_of(new.size, cells))
    if min(x, y) < 0 or max(x, y) + side > cells:
        return False
    for index, thing in enumerate(things):
        shared = _shared(squares[index], square)
        if not shared:
            continue
        if not overlapping or thing.colour == new.colour:
            return False
        shared += sum(_shared(squares[index], other) for other in squares[index + 1 :])
        if shared > HIDDEN * squares[index][2] ** 2:
            return False
    return True


def _shared(one: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    """Cells that two squares (left, top, side) share."""
    (x, y, a), (u, v, b) = one, other
    width = (x + a if x + a < u + b else u + b) - (x if x > u else u)
    height = (y + a if y + a < v + b else v + b) - (y if y > v else v)
    return width * height if width > 0 and height > 0 else 0


def is_possible(scene: Scene) -> bool:
    """Whether a scene keeps the rules of the world: all things inside, and none hidden too much."""
    return 1 <= len(scene.things) <= MAX_THINGS and all(
        can_stand_before(scene.things[:index], thing, scene.cells) for index, thing in enumerate(scene.things)
    )


# ---- drawing ----


def add_icon(name: str, body: str) -> None:
    """Makes a shape drawable that is not among `ICONS`, so no scene is sampled with it.

    Args:
        body: its SVG elements on a canvas of 24 x 24, in one colour.
    """
    if name in _ICON:
        return
    _ICON[name] = len(_LIBRARY["icons"])
    _LIBRARY["icons"].append({"name": name, "box": tight_box(body), "body": body})


@cache
def sprite(icon: str, size: str, cells: int) -> np.ndarray:
    """How much of each pixel of its square an icon covers: (side, side) uint8."""
    entry = _LIBRARY["icons"][_ICON[icon]]
    return rasterize(entry["body"], entry["box"], CELL * side_of(size, cells))


@cache
def _weights(icon: str, size: str, cells: int, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a sprite in a colour: 255 - alpha, and colour * alpha + 127, both ready for integer compositing."""
    alpha = sprite(icon, size, cells).astype(np.int32)[..., None]
    return 255 - alpha, np.array(COLOURS[colour], np.int32) * alpha + 127


def render(scene: Scene) -> np.ndarray:
    """The image: (8 cells, 8 cells, 3) uint8."""
    side = CELL * scene.cells
    image = np.empty((side, side, 3), np.uint8)
    image[:] = GROUNDS[scene.ground]
    for thing in scene.things:
        length = CELL * scene.side(thing)
        rows, columns = (slice(CELL * start, CELL * start + length) for start in (thing.y, thing.x))
        rest, own = _weights(thing.icon, thing.size, scene.cells, thing.colour)
        image[rows, columns] = (image[rows, columns] * rest + own) // 255
    return image


def png_of(image: np.ndarray) -> bytes:
    """An (H, W, 3) uint8 image as PNG; four times as fast as Pillow, and smaller for such plain images."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of each: no filter
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def shared_pixels(scene: Scene, one: Thing, other: Thing) -> int:
    """Pixels that the shapes of two things both cover."""
    if not scene.overlap(one, other):
        return 0
    covered = np.zeros((CELL * scene.cells,) * 2, np.int32)
    for thing in (one, other):
        length = CELL * scene.side(thing)
        window = covered[CELL * thing.y :, CELL * thing.x :][:length, :length]
        window += sprite(thing.icon, thing.size, scene.cells) > 127
    return int((covered == 2).sum())


# ---- what is said about a scene ----


def holds(claims: dict, scene: Scene) -> bool:
    """Whether a scene is what a text says, which is in `claims`:

    ``{"ground": name, "things": [{"icon", "colour", "size", "place"}, …], "relations": [[0, "left of", 1], …]}``

    Every thing of the scene is one of the claim's, whose missing or null fields may be anything. A relation `between`
    has two more numbers.
    """
    if claims.get("ground") not in (None, scene.ground) or len(claims["things"]) != len(scene.things):
        return False
    return _assign(claims, scene, [])


def _assign(claims: dict, scene: Scene, chosen: list[Thing]) -> bool:
    """Whether the rest of the things can be assigned so that all relations hold."""
    if len(chosen) == len(scene.things):
        return all(_relation_holds(scene, chosen, *relation) for relation in claims.get("relations", ()))
    wanted = claims["things"][len(chosen)]
    return any(
        _assign(claims, scene, [*chosen, thing])
        for thing in scene.things
        if thing not in chosen and all(_has(scene, thing, name, value) for name, value in wanted.items())
    )


def _has(scene: Scene, thing: Thing, name: str, value: str | None) -> bool:
    return value is None or value == (scene.place(thing) if name == "place" else getattr(thing, name))


def _relation_holds(scene: Scene, things: list[Thing], one: int, relation: str, *others: int) -> bool:
    found = [things[index] for index in others]
    if relation == "between":
        return scene.is_between(things[one], *found)
    return scene.related(things[one], relation, *found)
