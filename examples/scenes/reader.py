"""Reads scenes from images: which things are where, in which colour and size, and on which ground.

    python3 examples/scenes/reader.py sizes=64,96,128 scenes=1000

prints how often it is right, on true images and on degraded ones. It knows the world (icons, colours, grounds, code
grid) and nothing else about an image.

Over a ground G, an icon with coverage A in colour C shows G + A (C - G). So of D, an image minus its ground, a thing
explains ``gain = 2 <A, D·(C - G)> - |C - G|² |A|²`` of the squared sum. The gains of all icons in all colours at all
places are a few matrix products. The best is taken, its pixels are left out of account, since what is behind it cannot
be seen there, and so on until nothing explains enough. Then each thing is taken away in turn and looked for again, now
by how well the whole scene as it is drawn fits the image.
"""

import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import common  # noqa: F401  Ctrl-C is one word from here on

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFilter

from common.config import read_settings
from common.errors import run_cli
from common.settings import setting
from examples.scenes.world import (
    CELL,
    COLOURS,
    GROUNDS,
    ICONS,
    MAX_THINGS,
    SIDES,
    SIZES,
    Scene,
    Thing,
    generator,
    render,
    sample_scene,
    side_of,
    sprite,
)

ENOUGH = 0.5  # share of its pixels' energy that a thing must explain; below it there is nothing
FAINTEST = 0.55  # a blurred thing's colour is this part of the way from the ground to its own, or more
BLURS = (0.0, 0.6, 1.0, 1.5)  # radii
SEEN = 0.3  # share of a shape that must be in view
ROUNDS = 2
SETTLED = 0.1  # share of a thing's energy that may be left in its square without looking again
PROPOSALS = 3
CROWDED = 0.8  # most of the smaller square that two things can share
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
GROUND_COLOURS = torch.tensor(list(GROUNDS.values()), dtype=torch.float32)


class Reader:
    """Reads images of one size.

    Args:
        size: pixels per side: 64, 96 or 128.
        batch: images that are read together.
        icons: that can be seen.
    """

    def __init__(self, size: int, batch: int = 16, icons: Sequence[str] = ICONS):
        self.cells, self.batch = size // CELL, batch
        self.levels = [_Level(name, self.cells, icons) for name in SIZES]

    @torch.inference_mode()
    def read(self, images: np.ndarray) -> list[Scene]:
        """The scenes that images show.

        Args:
            images: (N, size, size, 3) uint8.

        Raises:
            ValueError: they are of another size or type.
        """
        size = CELL * self.cells
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"expected images of (N, {size}, {size}, 3) uint8, got {images.shape} {images.dtype}")
        scenes = []
        for start in range(0, len(images), self.batch):
            scenes += self._read_batch(torch.from_numpy(np.ascontiguousarray(images[start : start + self.batch])))
        return scenes

    def _read_batch(self, images: torch.Tensor) -> list[Scene]:
        pixels = images.float()
        grounds = find_grounds(pixels)  # (B,)
        ground = GROUND_COLOURS[grounds]  # (B, 3)
        directions = PALETTE - ground[:, None]  # (B, 8, 3)
        maps = torch.empty(len(images), 4, *images.shape[1:3])
        maps[:, :3] = (pixels - ground[:, None, None]).movedim(3, 1)
        maps[:, 3] = 1  # which pixels count
        states = [level.start(maps, directions) for level in self.levels]
        found: list[list[Thing]] = [[] for _ in images]
        active = list(range(len(images)))
        for _ in range(MAX_THINGS + 2):
            active = [
                image for image in active if (thing := self._best(states, image)) and not found[image].append(thing)
            ]
            if not active:
                break
            for image in active:
                self._cover(maps[image], found[image][-1])
            for level, state in zip(self.levels, states, strict=True):
                level.update(state, maps, directions, [(image, found[image][-1]) for image in active])
        names = tuple(GROUNDS)
        scenes = [
            Scene(names[grounds[image]], tuple(reversed(things)), self.cells) for image, things in enumerate(found)
        ]
        return [
            self._refine(_Target(pixels[image], scene), directions[image], scene) for image, scene in enumerate(scenes)
        ]

    def _refine(self, target: "_Target", directions: torch.Tensor, scene: Scene) -> Scene:
        """Takes each thing away in turn and looks for what fits the image best in its place; so for one thing more.

        Here scenes are compared as they are drawn, with what is in front of what.
        """
        scene = self._in_order(scene, target)
        error = target.misfit(scene)
        for _ in range(ROUNDS):
            before = scene
            for index in reversed(range(len(scene.things) + 1)):
                if error == 0:
                    return scene
                old = scene.things[index] if index < len(scene.things) else None
                if self._is_settled(target, directions, scene, old):
                    continue
                rest = replace(scene, things=scene.things[:index] + scene.things[index + 1 :])
                alone = target.misfit(rest)
                choices = dict(self._proposals(target.pixels, directions, rest, old)) | ({scene: old} if old else {})
                errors = {new: target.misfit(new) for new in choices}
                new = min(errors, key=errors.get, default=rest)
                if new != rest and alone - errors[new] < ENOUGH * target.visible_energy(new, choices[new]):
                    new = rest
                scene, error = new, errors.get(new, alone)
            if scene == before:
                break
            scene = self._in_order(scene, target)
            error = target.misfit(scene)
        return scene

    def _is_settled(self, target: "_Target", directions: torch.Tensor, scene: Scene, thing: Thing | None) -> bool:
        """Whether too little is left unexplained to look again: around a thing, or anywhere for one more."""
        left = np.square(target.values - target.draw(scene)).sum(2)
        colours = directions.square().sum(1)  # (8,): squared distances to the ground
        if thing:
            level = self.levels[SIZES.index(thing.size)]
            y, x = CELL * thing.y, CELL * thing.x
            energy = level.energy[level.icons.index(thing.icon)] * colours[tuple(COLOURS).index(thing.colour)]
            return bool(left[y : y + level.side, x : x + level.side].sum() < SETTLED * energy)
        cells = left.reshape(self.cells, CELL, self.cells, CELL).sum((1, 3))
        small = self.levels[0]
        most = sliding_window_view(cells, (small.cells_along,) * 2).sum((2, 3)).max()
        return bool(most < ENOUGH * small.energy.min() * colours.min())

    def _proposals(
        self, pixels: torch.Tensor, directions: torch.Tensor, rest: Scene, old: Thing | None
    ) -> Iterator[tuple[Scene, Thing]]:
        """The most promising things to add to a scene, behind all others and in front of them.

        Args:
            old: if given, only at places that touch this one's.
        """
        base = torch.from_numpy(render(rest)).float()
        maps = torch.ones(1, 4, *pixels.shape[:2])
        maps[0, :3] = (pixels - base).movedim(2, 0)
        for thing in rest.things:
            self._cover(maps[0], thing)
        for level in self.levels:
            places = level.touching(old, self.cells) if old else torch.arange(level.span**2)
            behind = level.new_state(1)
            level.score(behind, maps, directions[None], torch.zeros_like(places), places)
            for state, in_front in ((behind, False), (level.before(pixels, base, places), True)):
                level.exclude(state, [(0, thing) for thing in rest.things], self.cells)
                for place in state.gains[0].topk(PROPOSALS).indices:
                    if state.gains[0, place] > 0:
                        thing = level.thing(state, 0, int(place))
                        depth = len(rest.things) if in_front else 0
                        yield replace(rest, things=(*rest.things[:depth], thing, *rest.things[depth:])), thing

    def _best(self, states: list["_State"], image: int) -> Thing | None:
        """The thing that explains most of what is left of an image."""
        gain, level = max((float(state.gains[image].max()), index) for index, state in enumerate(states))
        if gain <= 0:
            return None
        return self.levels[level].thing(states[level], image, int(states[level].gains[image].argmax()))

    def _cover(self, maps: torch.Tensor, thing: Thing) -> None:
        """Leaves the pixels of a thing out of account."""
        side = CELL * side_of(thing.size, self.cells)
        rows, columns = (slice(CELL * start, CELL * start + side) for start in (thing.y, thing.x))
        hidden = torch.from_numpy(sprite(thing.icon, thing.size, self.cells) > 24)
        maps[:, rows, columns] = maps[:, rows, columns].masked_fill(hidden, 0)

    def _in_order(self, scene: Scene, target: "_Target") -> Scene:
        """The scene with overlapping things in the order that fits the image best.

        Each pair is judged by itself, where nothing else is; then the things are laid down, those first that cover none
        of the rest.
        """
        shapes = {thing: self._shape(thing) for thing in scene.things}
        covers: dict[Thing, set[Thing]] = {thing: set() for thing in scene.things}
        for one, other in combinations(scene.things, 2):
            if scene.overlap(one, other):
                alone = shapes[one] & shapes[other]
                for third in scene.things:
                    if third not in (one, other):
                        alone = alone & ~shapes[third]
                orders = ((one, other), (other, one)) if alone.any() else ()
                errors = [target.misfit(replace(scene, things=order), alone) for order in orders]
                if orders and errors[0] != errors[1]:
                    back, front = orders[errors[1] < errors[0]]
                    covers[front].add(back)
        things: list[Thing] = []
        while len(things) < len(scene.things):
            rest = [thing for thing in scene.things if thing not in things]
            things.append(min(rest, key=lambda thing: len(covers[thing] - set(things))))
        return replace(scene, things=tuple(things))

    def _shape(self, thing: Thing) -> np.ndarray:
        """The pixels of the image that a thing covers a part of: (H, W) bool."""
        mask = np.zeros((CELL * self.cells,) * 2, bool)
        covered = sprite(thing.icon, thing.size, self.cells) > 0
        mask[CELL * thing.y :, CELL * thing.x :][: len(covered), : len(covered)] = covered
        return mask


class _Target:
    """An image that drawings are compared with, as sharp as the image is.

    Args:
        pixels: (H, W, 3) float32.
        scene: about what it shows, from which the blur is found.
    """

    def __init__(self, pixels: torch.Tensor, scene: Scene):
        self.pixels, self.values, self.radius = pixels, pixels.numpy(), 0.0
        errors = {}
        for self.radius in BLURS:
            errors[self.radius] = self.misfit(scene)
        self.radius = min(errors, key=errors.get)

    def draw(self, scene: Scene) -> np.ndarray:
        image = render(scene)
        return blurred(image, self.radius) if self.radius else image

    def misfit(self, scene: Scene, where: np.ndarray | slice = slice(None)) -> float:
        """Squared distance of the image to the drawing of a scene, of the pixels that are asked for."""
        return float(np.square(self.values - self.draw(scene))[where].sum())

    def visible_energy(self, scene: Scene, thing: Thing) -> float:
        """What a thing explains of a true image of a scene."""
        without = replace(scene, things=tuple(other for other in scene.things if other != thing))
        return float(np.square(self.draw(scene).astype(np.float32) - self.draw(without)).sum())


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def find_grounds(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) → (B,): the ground that most pixels are nearest to, of all colours of the world."""
    colours = torch.cat((GROUND_COLOURS, PALETTE))
    nearest = torch.cdist(pixels.flatten(1, 2), colours.expand(len(pixels), -1, -1)).argmin(-1)  # (B, HW)
    counts = torch.stack([(nearest == index).sum(1) for index in range(len(GROUNDS))], 1)
    return counts.argmax(1)


@dataclass
class _State:
    """Per place, the gain of the best thing there (0 if it explains too little), and its colour and icon."""

    gains: torch.Tensor  # (B, places)
    kinds: torch.Tensor  # (B, places)


class _Level:
    """All icons in one size, as templates."""

    def __init__(self, size: str, cells: int, icons: Sequence[str]):
        self.size, self.icons, self.cells_along = size, tuple(icons), side_of(size, cells)
        self.side, self.span = CELL * self.cells_along, cells - self.cells_along + 1
        shapes = np.stack([sprite(icon, size, cells) for icon in self.icons]).reshape(len(self.icons), -1)
        self.shapes = torch.from_numpy(shapes.astype(np.float32) / 255).T.contiguous()  # (side², icons)
        self.squares = self.shapes.square()
        self.energy = self.squares.sum(0)  # (icons,)

    def new_state(self, images: int) -> _State:
        return _State(*(torch.zeros(images, self.span**2, dtype=kind) for kind in (torch.float32, torch.long)))

    def start(self, maps: torch.Tensor, directions: torch.Tensor) -> _State:
        state, count = self.new_state(len(maps)), self.span**2
        images = torch.arange(len(maps)).repeat_interleave(count)
        self.score(state, maps, directions, images, torch.arange(count).repeat(len(maps)))
        return state

    def update(
        self, state: _State, maps: torch.Tensor, directions: torch.Tensor, added: list[tuple[int, Thing]]
    ) -> None:
        """Scores the places again that new things touch; those that they fill are taken."""
        cells = maps.shape[-1] // CELL
        places = [self.touching(thing, cells) for _, thing in added]
        images = [torch.full_like(found, image) for (image, _), found in zip(added, places, strict=True)]
        self.score(state, maps, directions, torch.cat(images), torch.cat(places))
        self.exclude(state, added, cells)

    def touching(self, thing: Thing, cells: int) -> torch.Tensor:
        """The places where a thing of this size would share cells with another one."""
        side, along = side_of(thing.size, cells), torch.arange(self.span)
        rows, columns = (
            along[(along > start - self.cells_along) & (along < start + side)] for start in (thing.y, thing.x)
        )
        return (rows[:, None] * self.span + columns).flatten()

    def exclude(self, state: _State, added: list[tuple[int, Thing]], cells: int) -> None:
        """Takes the places out that things fill."""
        along = torch.arange(self.span)
        for image, thing in added:
            side = side_of(thing.size, cells)
            height, width = (
                ((along + self.cells_along).clamp(max=start + side) - along.clamp(min=start)).clamp(min=0)
                for start in (thing.y, thing.x)
            )
            taken = height[:, None] * width > CROWDED * min(side, self.cells_along) ** 2
            state.gains[image][taken.flatten()] = 0

    def thing(self, state: _State, image: int, place: int) -> Thing:
        """The best thing at a place."""
        colour, icon = divmod(int(state.kinds[image, place]), len(self.icons))
        y, x = divmod(place, self.span)
        return Thing(self.icons[icon], tuple(COLOURS)[colour], self.size, x, y)

    def score(
        self, state: _State, maps: torch.Tensor, directions: torch.Tensor, images: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Scores places of images; `maps` are what they show less the ground, and which pixels count."""
        windows = maps.unfold(2, self.side, CELL).unfold(3, self.side, CELL)  # (B, 4, span, span, side, side)
        patches = windows[images, :, places // self.span, places % self.span].flatten(2)  # (n, 4, side²)
        seen = patches[:, 3] @ self.squares  # (n, icons): energy of each shape in view
        toward = directions[images]  # (n, 8, 3)
        full = toward.square().sum(2)[..., None] * seen[:, None]  # (n, 8, icons)
        rated, colours = _rate(toward @ (patches[:, :3] @ self.shapes), full)
        rated[seen < SEEN * self.energy] = 0
        self._keep(state, images, places, rated, colours)

    def before(self, pixels: torch.Tensor, base: torch.Tensor, places: torch.Tensor) -> _State:
        """Scores places of one image for a thing in front of `base`, the drawing of all others."""
        rest = pixels - base
        linear = torch.cat((rest, (rest * base).sum(2, keepdim=True)), 2)
        square = torch.cat((base, base.square().sum(2, keepdim=True)), 2)
        along, over = (
            values.unfold(0, self.side, CELL).unfold(1, self.side, CELL).flatten(3).flatten(0, 1)[places] @ shapes
            for values, shapes in ((linear, self.shapes), (square, self.squares))
        )  # (n, 4, icons) each
        full = PALETTE.square().sum(1)[:, None] * self.energy - 2 * PALETTE @ over[:, :3] + over[:, 3:]
        state = self.new_state(1)
        self._keep(state, torch.zeros_like(places), places, *_rate(PALETTE @ along[:, :3] - along[:, 3:], full))
        return state

    def _keep(
        self, state: _State, images: torch.Tensor, places: torch.Tensor, rated: torch.Tensor, colours: torch.Tensor
    ) -> None:
        gains, icons = rated.max(1)
        state.gains[images, places] = gains
        state.kinds[images, places] = colours.gather(1, icons[:, None])[:, 0] * len(self.icons) + icons


def _rate(inner: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gain of each icon in its best colour, and that colour: (n, icons) each.

    A blurred thing is fainter than its colour, so a part of the colour's distance to the ground may do. The gain is
    weighted by that part, as wrong shapes are half empty, and 0 if it is too small.

    Args:
        inner, full: (n, 8, icons): inner products with the coloured shapes, and their energies.
    """
    strength = inner / full.clamp(min=1)
    part = strength.clamp(FAINTEST, 1)
    gain, colours = (part * (2 * inner - part * full)).max(1)
    strength = strength.gather(1, colours[:, None])[:, 0].clamp(max=1)
    return (gain * strength**2).masked_fill((strength < FAINTEST) | (gain < 0), 0), colours


# ---- how often it is right ----


def compare(true: Scene, read: Scene) -> Counter:
    """Counts over one scene: `things`, those that are all right, those whose parts are right, and the others.

    A thing that was read belongs to the true one whose middle is nearest, within two cells; each is used once.
    """
    counts = Counter(scenes=1, things=len(true.things), ground=true.ground == read.ground)
    rest = list(read.things)
    for thing in sorted(true.things, key=lambda thing: thing not in rest):  # those that are all right first
        near = min(rest, key=lambda other: _distance(true, thing, other) + (thing != other), default=None)
        if near is None or _distance(true, thing, near) > 4:
            continue
        rest.remove(near)
        counts.update(
            found=1,
            right=near == thing,
            icon=near.icon == thing.icon,
            colour=near.colour == thing.colour,
            size=near.size == thing.size,
            place=(near.x, near.y) == (thing.x, thing.y),
        )
    counts["invented"] = len(rest)
    counts["all"] = counts["ground"] and not rest and counts["right"] == counts["things"]
    return counts


def _distance(scene: Scene, one: Thing, other: Thing) -> int:
    """Between the middles of two things, in half cells, along the longer axis."""
    (x, y), (u, v) = scene.centre(one), scene.centre(other)
    return max(abs(x - u), abs(y - v))


def _halved(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return np.asarray(half.resize(picture.size, Image.Resampling.BICUBIC))


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _noisy(image: np.ndarray, decibels: float) -> np.ndarray:
    """White noise of a PSNR before it is cut off at black and white."""
    rng = np.random.default_rng(int(image.astype(np.int64).sum()))
    noise = rng.standard_normal(image.shape) * 255 / 10 ** (decibels / 20)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


# Stand-ins for what an image tokenizer does to an image.
DEGRADED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "blur, radius 0.7": lambda image: blurred(image, 0.7),
    "blur, radius 1.2": lambda image: blurred(image, 1.2),
    "half the pixels": _halved,
    "JPEG, quality 30": lambda image: _jpeg(image, 30),
    "JPEG, quality 10": lambda image: _jpeg(image, 10),
    "noise, 25 dB": lambda image: _noisy(image, 25),
    "noise, 18 dB": lambda image: _noisy(image, 18),
    "blur 1, noise 25 dB": lambda image: _noisy(blurred(image, 1), 25),
}
COLUMNS = ("right", "icon", "colour", "size", "place")


@dataclass
class ReaderConfig:
    sizes: str = setting("64,96,128", "sides of the images in pixels, comma-separated")
    scenes: int = setting(1000, "scenes of each size", low=1)
    degraded: int = setting(300, "of them that are read degraded in each way", low=0)
    split: str = setting("train", "which scenes", choices=("train", "seen", "colours", "pairs", "counts"))
    tokenizer: str = setting("", "folder of an image tokenizer, whose reconstructions are read, too")
    seed: int = setting(0, "of the scenes")

    @staticmethod
    def problems(config) -> list[str]:
        allowed = [str(size) for size in SIDES]
        return [
            f"sizes={config.sizes}: {size!r} is not allowed; allowed: {', '.join(allowed)}"
            for size in config.sizes.split(",")
            if size not in allowed
        ]


def error_table(config: ReaderConfig) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| size | images | dB | scenes all right, % | things right, % | icon | colour | size | place | invented, % |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for size in map(int, config.sizes.split(",")):
        reader, cells = Reader(size), size // CELL
        scenes = [sample_scene(generator("reader", config.seed, n), cells, config.split) for n in range(config.scenes)]
        images = np.stack([render(scene) for scene in scenes])
        start = time.process_time()
        found = reader.read(images)
        seconds = time.process_time() - start
        for count in range(1, MAX_THINGS + 1):
            chosen = [index for index, scene in enumerate(scenes) if len(scene.things) == count]
            if chosen:
                name = f"true, {count} thing{'s' * (count > 1)}"
                yield _row(size, name, "", [compare(scenes[index], found[index]) for index in chosen])
        yield _row(size, f"true, all ({len(scenes) / seconds:.0f} a second)", "", list(map(compare, scenes, found)))
        true = images[: config.degraded]
        ways = {name: partial(_each, degrade) for name, degrade in DEGRADED.items()}
        if config.tokenizer:
            ways["reconstructed"] = partial(_reconstructed, config.tokenizer)
        for name, degrade in ways.items() if config.degraded else ():
            worse = degrade(true)
            error = np.square(worse.astype(float) - true).mean((1, 2, 3)).clip(min=1e-9)
            quality = f"{(10 * np.log10(255**2 / error)).mean():.1f}"
            yield _row(size, name, quality, list(map(compare, scenes, reader.read(worse))))


def _each(degrade: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    return np.stack([degrade(image) for image in images])


@torch.inference_mode()
def _reconstructed(folder: str, images: np.ndarray, batch: int = 16) -> np.ndarray:
    """Images through the codes of an image tokenizer."""
    from models import MAGVITv2

    model, parts = MAGVITv2.from_pretrained(folder).eval(), []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).movedim(3, 1) / 127.5 - 1
        codes = model.get_code(pixels)
        side = int(codes.shape[1] ** 0.5)
        decoded = model.decode_code(codes, shape=(side, side))
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, 3).numpy())
    return np.concatenate(parts)


def _row(size: int, name: str, quality: str, counts: Sequence[Counter]) -> str:
    total = sum(counts, Counter())
    shares = [100 * total[column] / total["things"] for column in COLUMNS]
    figures = [100 * total["all"] / total["scenes"], *shares, 100 * total["invented"] / total["things"]]
    return f"| {size}² | {name} | {quality} | {' | '.join(f'{figure:.1f}' for figure in figures)} |"


def main(argv: list[str]) -> None:
    config = read_settings(argv, ReaderConfig, "sizes=96 scenes=1000")
    for line in error_table(config):
        print(line, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cli(main)
