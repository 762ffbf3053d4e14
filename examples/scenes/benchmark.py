"""The scene world as five benchmarks of `evaluate.py`: `tasks=scenes`. They need no files, only the world and a seed.

    python3 evaluate.py config=CONFIG tasks=scenes seed=1 scenes_samples=100

Drawing, inpainting and extrapolation are judged by what the reader reads in the images. Beside their figures stand the
same figures of the true images (the reader's own errors) and of their reconstructions by the image tokenizer: nothing
that is made of codes can be expected to be better. Every figure is given for scenes of *seen* combinations that
training never shows, and for those whose combinations were *held out* (`world.SPLITS`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.progress import progress
from evaluation.images import as_bytes, psnr, side_by_side
from evaluation.task import GenerationTask, Item, QuestionTask, Task, Verdict, ratio
from evaluation.tasks.reconstruction import SET_FILE, TokenizerTask
from examples.scenes.parts import sample
from examples.scenes.reader import Reader, compare
from examples.scenes.words import Caption, caption, described
from examples.scenes.world import (
    CELL,
    COLOURS,
    ICONS,
    SIDES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    add_thing,
    generator,
    held_out,
    holds,
    render,
    sample_scene,
    side_of,
)
from models.images import load_image
from models.pipeline_inputs import DIRECTIONS, mask_tokens
from models.pipeline_showo import UNKNOWN

SEEN, HELD_OUT = "seen", "held out"
OTHERS = SPLITS[2:]  # those with held-out combinations: colours, pairs, counts
RIGHT = "right"  # the figure of a kind without any addition
RECONSTRUCTED, TRUE = "reconstructions", "true images"
READ_AT_ONCE = 64  # images


class SceneTask(Task):
    """Scenes from a seed; a figure is the share of items of a kind and of seen or held-out scenes that are right.

    Facts of an item: `kind`, `split`. Those of a verdict: shares by name, `RIGHT` and others; with ": x" for a ceiling.
    """

    headline = "mean of kinds, held out"
    reads_root = False
    asked_by = ("scenes",)
    kinds: ClassVar[Mapping[str, tuple[str, ...]]]  # with the splits of each
    parts: ClassVar[tuple[str, ...]] = ()  # further names of a verdict's facts, in the order of the table

    def check(self) -> None:
        super().check()
        size = self.config.dataset.preprocessing.resolution
        if size not in SIDES:
            raise UserError(
                f"dataset.preprocessing.resolution is {size}, but {self.name} has images of "
                f"{', '.join(map(str, SIDES))} pixels only; give a model that was trained on one of these sizes"
            )

    @property
    def settings(self):
        config = self.config
        return super().settings | {"scenes": f"{config.scenes_samples} of each kind and split, seed {self._seed}"}

    @property
    def _seed(self) -> int:
        return self.config.seed or 0

    @property
    def cells(self) -> int:
        return self.config.dataset.preprocessing.resolution // CELL

    def read_items(self) -> list[Item]:
        return [
            item
            for kind, splits in self.kinds.items()
            for split in splits
            for number in range(self.config.scenes_samples)
            for item in self.items_of(kind, split, number)
        ]

    def items_of(self, kind: str, split: str, number: int) -> list[Item]:
        raise NotImplementedError

    def counts(self, items, verdicts) -> dict[str, float]:
        found = Counter()
        for item, verdict in zip(items, verdicts, strict=True):
            for where in places(item.facts["split"]):
                for name, value in verdict.facts.items():
                    figure = _figure(item.facts["kind"], where, name)
                    found.update({figure: 1, f"{figure} (sum)": float(value)})
        return found

    def figures(self, sums) -> dict[str, np.ndarray]:
        ends = ("", *(f": {source}" for source in self.ceilings))
        found = {}
        for kind, splits in self.kinds.items():
            for where in _listed_places(splits):
                for part in (RIGHT, *self.parts) if where in (SEEN, HELD_OUT) else (RIGHT,):
                    for name in (_figure(kind, where, f"{part}{end}") for end in ends):
                        if name in sums:
                            found[name] = 100 * ratio(sums[f"{name} (sum)"], sums[name])
        means = {}
        for where in (SEEN, HELD_OUT):
            for end in ends:
                values = [found[name] for kind in self.kinds if (name := f"{kind}, {where}{end}") in found]
                if values:
                    means[f"mean of kinds, {where}{end}"] = sum(values) / len(values)
        return means | found


def places(split: str) -> tuple[str, ...]:
    """Where the figures of a split are counted."""
    return (SEEN,) if split == SEEN else (HELD_OUT, split)


def _listed_places(splits: Sequence[str]) -> tuple[str, ...]:
    """Held-out splits are listed apart where there are several of them."""
    others = tuple(split for split in splits if split != SEEN)
    return (SEEN, HELD_OUT, *(others if len(others) > 1 else ()))


def _figure(kind: str, where: str, name: str) -> str:
    """`single thing, held out`, `single thing, held out, icon`, `single thing, held out: true images`."""
    part, colon, source = name.partition(": ")
    return f"{kind}, {where}" + (f", {part}" if part != RIGHT else "") + colon + source


# ---- drawing, and what is common to all that is drawn ----


class DrawnTask(SceneTask, GenerationTask):
    """Images that are generated and read, beside true ones and their reconstructions."""

    ceilings = (RECONSTRUCTED, TRUE)

    def file_of(self, item) -> str:
        return f"drawings/{item.key}.png"

    def files_of(self, item) -> list[str]:
        return [self.file_of(item), f"reconstructions/{item.key}.png"]

    def predict(self, model, items, images, generator) -> list[str]:
        for item, image in zip(items, self.reconstructed(model, items), strict=True):
            self.output.save(self.files_of(item)[1], image)
        return [
            self.output.save(self.file_of(item), image)
            for item, image in zip(items, self.generated_by(model, items, generator), strict=True)
        ]

    def reconstructed(self, model, items: Sequence[Item]) -> list[Image.Image]:
        """The true images through the image tokenizer."""
        return model.decode(model.encode([self.true_image(item) for item in items]))

    def generated_by(self, model, items: Sequence[Item], generator: torch.Generator) -> list[Image.Image]:
        return model.text_to_image([item.prompt for item in items], generator=generator, **self.generation)

    def true_image(self, item: Item) -> Image.Image:
        """An image that is right."""
        return image_of(item.facts["scene"])

    def windows(self, item: Item, image: Image.Image) -> list[Image.Image]:
        """The squares of an image that are read."""
        return [image]

    def rate(self, item: Item, scenes: Sequence[Scene]) -> dict[str, bool]:
        """What is right of an image of which this was read in its windows; with `RIGHT`."""
        raise NotImplementedError

    def judge(self, items, answers) -> list[Verdict]:
        verdicts = []
        with progress(total=len(items), desc=f"{self.name}, reading") as bar:
            for start in range(0, len(items), READ_AT_ONCE):
                part = items[start : start + READ_AT_ONCE]
                verdicts += self._judge(part, answers[start : start + READ_AT_ONCE])
                bar.update(len(part))
        return verdicts

    def _judge(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        drawn = self._read(items, self.generated(answers))
        restored = self._read(items, self.generated([self.files_of(item)[1] for item in items]))
        true = self._read(items, [self.true_image(item) for item in items])
        verdicts = []
        for item, scenes, *ceilings in zip(items, drawn, restored, true, strict=True):
            facts = self.rate(item, scenes)
            score = sum(facts.values()) / len(facts)
            for source, read in zip(self.ceilings, ceilings, strict=True):
                facts |= {f"{name}: {source}": value for name, value in self.rate(item, read).items()}
            verdicts.append(Verdict(" | ".join(map(described, scenes)), score, facts))
        return verdicts

    def _read(self, items: Sequence[Item], images: Sequence[Image.Image]) -> list[list[Scene]]:
        windows = [self.windows(item, image) for item, image in zip(items, images, strict=True)]
        found = iter(read(self.cells, [window for of_image in windows for window in of_image]))
        return [[next(found) for _ in of_image] for of_image in windows]

    def sheet_image(self, item, answer) -> Image.Image:
        """The generated image, and the true one to its right."""
        return side_by_side(super().sheet_image(item, answer), self.true_image(item))


def image_of(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


_reader = cache(Reader)


def read(cells: int, images: Sequence[Image.Image]) -> list[Scene]:
    return _reader(CELL * cells).read(np.stack([np.asarray(image) for image in images]))


@dataclass(frozen=True)
class Kind:
    """Which captions are prompts of a kind: those of so many things that say just these parts of each.

    Args:
        related: whether they say a relation of things.
        alike: whether all things are of one icon and colour, but where the split forbids it.
    """

    splits: tuple[str, ...]
    counts: tuple[int, ...]
    parts: frozenset[str]
    related: bool = False
    alike: bool = False

    def fits(self, scene: Scene, claims: dict, split: str) -> bool:
        said = {frozenset(thing) for thing in claims["things"]}
        alike = not self.alike or split == "counts" or len({thing.kind for thing in scene.things}) == 1
        return said == {self.parts} and alike and bool(claims["relations"]) == self.related and bool(claims["ground"])


KINDS = {
    "single thing": Kind((SEEN, "colours"), (1,), frozenset({"icon", "colour", "size", "place"})),
    "two things": Kind((SEEN, "colours", "pairs"), (2,), frozenset({"icon", "colour"}), related=True),
    "count": Kind((SEEN, "colours", "counts"), (1, 2, 3, 4, 5), frozenset({"icon", "colour"}), alike=True),
    "colour": Kind((SEEN, "colours"), (1,), frozenset({"icon", "colour"})),
    "position": Kind((SEEN, "colours", "pairs"), (2,), frozenset({"icon", "colour", "place"})),
    "attributes": Kind((SEEN, "colours", "pairs"), (2,), frozenset({"icon", "colour", "size"})),
}


class SceneDrawing(DrawnTask):
    """Captions of the world as prompts; an image is right if every claim of its prompt holds in the scene as read.

    The parts of a claim are judged alone, too: an icon counts as right if the image has all icons of the prompt, each
    as often as it says, and no other thing.
    """

    name = "scenes_drawing"
    kinds = {name: kind.splits for name, kind in KINDS.items()}
    parts = (
        *("number", "icon", "colour", "size", "place", "relation", "ground"),
        *("1 thing", "2 things", "3 things", "4 things", "5 things"),
    )

    def items_of(self, kind, split, number) -> list[Item]:
        rng = generator(self.name, kind, split, self._seed, self.cells, number)
        wanted = KINDS[kind]
        room = (self.cells // side_of(SIZES[0], self.cells)) ** 2  # things of one colour, which may not overlap
        counts = [count for count in wanted.counts if count <= room]
        count = counts[number % len(counts)]
        while True:
            scene = sample_scene(rng, self.cells, split, (count,))
            for said in (caption(scene, rng) for _ in range(8)):
                if wanted.fits(scene, said.claims, split):
                    return [_item(kind, split, number, scene, said)]

    def rate(self, item, scenes) -> dict[str, bool]:
        return rate_claims(item.facts["claims"], scenes[0]) | self._of_so_many(item, scenes[0])

    def _of_so_many(self, item: Item, scene: Scene) -> dict[str, bool]:
        """The verdict once more, by the number of things that are all alike."""
        claims, things = item.facts["claims"], item.facts["scene"].things
        if item.facts["kind"] != "count" or item.facts["split"] == "counts":
            return {}
        return {f"{len(things)} thing{'s' * (len(things) > 1)}": holds(claims, scene)}


def _item(kind: str, split: str, number: int, scene: Scene, said: Caption, **facts) -> Item:
    facts = {"kind": kind, "split": split, "scene": scene, "claims": said.claims} | facts
    key = f"{kind.replace(' ', '-')}-{split}-{number:04d}"
    return Item(key, said.text, stratum=f"{kind}, {split}", facts=facts, expected=described(scene))


def rate_claims(claims: dict, scene: Scene) -> dict[str, bool]:
    """Whether all claims hold in a scene, and each part of them by itself."""
    things, relations = claims["things"], claims.get("relations")
    found = {RIGHT: holds(claims, scene), "number": holds({"things": [{}] * len(things)}, scene)}
    for part in ("icon", "colour", "size", "place"):
        if any(part in thing for thing in things):
            found[part] = holds({"things": [{part: thing.get(part)} for thing in things]}, scene)
    if relations:
        icons = [{"icon": thing.get("icon")} for thing in things]
        found["relation"] = holds({"things": icons, "relations": relations}, scene)
    if claims.get("ground"):
        found["ground"] = claims["ground"] == scene.ground
    return found


# ---- changes of an image ----


CHANGED, KEPT = "what was asked", "the rest as before"


def rate_change(read: Scene, rest: Scene, claims: dict, is_inside: Callable[[Thing], bool]) -> dict[str, bool]:
    """Judges an image of which a part was generated.

    Args:
        read: the scene as read.
        rest: the scene of what was to stay.
        claims: about the whole image.
        is_inside: whether a thing is in the part that was generated.

    Returns:
        whether the generated part makes the claims true, whether all else is as it was, and whether both.
    """
    new = tuple(thing for thing in read.things if thing not in rest.things and is_inside(thing))
    shown = holds(claims, replace(rest, things=rest.things + new))
    kept = read.ground == rest.ground and set(read.things) - set(new) == set(rest.things)
    return {RIGHT: shown and kept, CHANGED: shown, KEPT: kept}


CHANGED_SPLITS = (SEEN, "colours", "pairs")  # scenes of the split `counts` leave no room


class SceneInpainting(DrawnTask):
    """A region is regenerated by a caption of the whole image as it should become.

    The region is a thing's square with a margin of a cell; no other thing reaches into it. `replace`: another thing
    stood there; `add`: nothing; `remove`: a thing stands there that the caption does not name.
    """

    name = "scenes_inpainting"
    kinds = dict.fromkeys(("replace", "add", "remove"), CHANGED_SPLITS)
    parts = (CHANGED, KEPT)

    def items_of(self, kind, split, number) -> list[Item]:
        rng = generator(self.name, kind, split, self._seed, self.cells, number)
        while True:
            after = sample_scene(rng, self.cells, split, (1, 2) if kind == "remove" else (2, 3))
            said = caption(after, rng)
            target = rng.choice(after.things)
            if kind == "remove":
                target = add_thing(rng, after.things, *_any_kind(rng), self.cells, overlapping=False)
                before = replace(after, things=(*after.things, target))
            elif kind == "add":
                before = replace(after, things=tuple(thing for thing in after.things if thing != target))
            else:
                icon, colour, _ = _any_kind(rng)
                other = replace(target, icon=icon, colour=colour)
                before = replace(after, things=tuple(other if thing == target else thing for thing in after.things))
            if target is None or holds(said.claims, before) or not held_out(before.things) <= held_out(after.things):
                continue
            region = region_around(after, target)
            rest = replace(after, things=tuple(thing for thing in after.things if thing != target))
            if not any(_reaches(rest, thing, region) for thing in rest.things):
                return [_item(kind, split, number, after, said, before=before, rest=rest, region=region)]

    def generated_by(self, model, items, generator) -> list[Image.Image]:
        images = [image_of(item.facts["before"]) for item in items]
        masks = [self.mask_of(item) for item in items]
        unknown = [
            mask_tokens(mask, image, model.resolution, model.window) for mask, image in zip(masks, images, strict=True)
        ]
        codes = model.encode(images).masked_fill(torch.cat(unknown).to(model.device), UNKNOWN)
        prompts = [item.prompt for item in items]
        return model.decode(model.generate_codes(prompts, codes, generator=generator, **self.generation))

    def mask_of(self, item: Item) -> Image.Image:
        left, top, right, bottom = item.facts["region"]
        white = np.zeros((CELL * self.cells,) * 2, np.uint8)
        white[CELL * top : CELL * bottom, CELL * left : CELL * right] = 255
        return Image.fromarray(white)

    def rate(self, item, scenes) -> dict[str, bool]:
        (scene,), facts = scenes, item.facts

        def is_inside(thing: Thing) -> bool:
            left, top, right, bottom = facts["region"]
            x, y = scene.centre(thing)
            return 2 * left <= x <= 2 * right and 2 * top <= y <= 2 * bottom

        return rate_change(scene, facts["rest"], facts["claims"], is_inside)

    def sheet_image(self, item, answer) -> Image.Image:
        """The image before, the generated one, and what it should be."""
        return side_by_side(image_of(item.facts["before"]), load_image(self.folder / answer), self.true_image(item))


def _any_kind(rng) -> tuple[str, str, str]:
    return rng.choice(ICONS), rng.choice(tuple(COLOURS)), rng.choice(SIZES)


def region_around(scene: Scene, thing: Thing) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, in cells, of a thing's square with a margin of one."""
    side = scene.side(thing)
    left, top = (max(0, at - 1) for at in (thing.x, thing.y))
    right, bottom = (min(scene.cells, at + side + 1) for at in (thing.x, thing.y))
    return left, top, right, bottom


def _reaches(scene: Scene, thing: Thing, region: tuple[int, int, int, int]) -> bool:
    """Whether a thing's square shares cells with a region."""
    (left, top, right, bottom), side = region, scene.side(thing)
    return thing.x < right and thing.x + side > left and thing.y < bottom and thing.y + side > top


class SceneExtrapolation(DrawnTask):
    """An image is extended by half a window, as `ShowoPipeline.extrapolate` does, to a canvas of one and a half.

    The prompt is a caption of the window that covers the new half and the adjacent half of the given image. Every
    thing of the canvas lies in one half of a window, so that none is cut off at an edge of one. Both windows are read:
    the given one must be as before, and the new one must be what its caption says.
    """

    name = "scenes_extrapolation"
    kinds = {"canvas": CHANGED_SPLITS}
    parts = (CHANGED, KEPT, *DIRECTIONS)  # a direction: what is right of the canvases that were extended there

    def items_of(self, kind, split, number) -> list[Item]:
        rng = generator(self.name, kind, split, self._seed, self.cells, number)
        direction = DIRECTIONS[number % len(DIRECTIONS)]
        while True:
            scene = sample_scene(rng, self.cells, split, (1, 2, 2, 3))
            halves = [half_of(scene, thing, direction) for thing in scene.things]
            if None in halves or True not in halves:
                continue
            shared = [thing for thing, new in zip(scene.things, halves, strict=True) if not new]
            given = replace(scene, things=tuple(moved(thing, direction, self.cells // 2) for thing in shared))
            outer = add_thing(rng, given.things, *_any_kind(rng), self.cells, overlapping=False)
            if outer is None or half_of(given, outer, direction) is not False:
                continue
            given = replace(given, things=(*given.things, outer))
            if held_out(given.things) <= held_out(scene.things):
                rest = replace(scene, things=tuple(shared))
                facts = {"given": given, "rest": rest, "direction": direction}
                item = _item(kind, split, number, scene, caption(scene, rng), **facts)
                return [replace(item, expected=f"{described(given)} | {described(scene)}")]

    def generated_by(self, model, items, generator) -> list[Image.Image]:
        given = self._codes(model, items, "given")
        blank = torch.full_like(given, UNKNOWN)
        windows = torch.stack(
            [new_window(own, new, item.facts["direction"]) for own, new, item in zip(given, blank, items, strict=True)]
        )
        prompts = [item.prompt for item in items]
        new = model.generate_codes(prompts, windows.flatten(1), generator=generator, **self.generation)
        return self._decoded(model, items, given, new.view_as(given))

    def reconstructed(self, model, items) -> list[Image.Image]:
        """With the codes of the given image and, beyond it, those of the true window: what can be generated at best."""
        given, new = (self._codes(model, items, name) for name in ("given", "scene"))
        return self._decoded(model, items, given, new)

    def _codes(self, model, items: Sequence[Item], name: str) -> torch.Tensor:
        codes = model.encode([image_of(item.facts[name]) for item in items])
        return codes.view(-1, model.window, model.window)

    def _decoded(self, model, items: Sequence[Item], given: torch.Tensor, new: torch.Tensor) -> list[Image.Image]:
        canvases = [
            extended(own, window, item.facts["direction"]) for own, window, item in zip(given, new, items, strict=True)
        ]
        return [model.decode(canvas[None])[0] for canvas in canvases]

    def true_image(self, item) -> Image.Image:
        given, new = (torch.from_numpy(render(item.facts[name])) for name in ("given", "scene"))
        return Image.fromarray(extended(given, new, item.facts["direction"]).numpy())

    def windows(self, item, image) -> list[Image.Image]:
        """The window that was given, and the new one."""
        size = CELL * self.cells
        boxes = [(0, 0, size, size), (image.width - size, image.height - size, image.width, image.height)]
        return [image.crop(box) for box in (boxes if _is_at_end(item.facts["direction"]) else boxes[::-1])]

    def rate(self, item, scenes) -> dict[str, bool]:
        (given, new), facts = scenes, item.facts

        def is_inside(thing: Thing) -> bool:
            middle = new.centre(thing)[_axis(facts["direction"]) == 0]
            return (middle > new.cells) == _is_at_end(facts["direction"])

        found, before = rate_change(new, facts["rest"], facts["claims"], is_inside), facts["given"]
        as_before = given.ground == before.ground and set(given.things) == set(before.things)
        found |= {} if as_before else {RIGHT: False, KEPT: False}
        return found | {facts["direction"]: found[RIGHT]}


def _axis(direction: str) -> int:
    """Of rows 0, of columns 1."""
    return int(direction in DIRECTIONS[:2])


def _is_at_end(direction: str) -> bool:
    return direction in ("right", "down")


def half_of(window: Scene, thing: Thing, direction: str) -> bool | None:
    """Whether a thing lies in the half of a window that is towards a direction; None if it lies in neither."""
    start, half = (thing.y, thing.x)[_axis(direction)], window.cells // 2
    if start < half < start + window.side(thing):
        return None
    return (start >= half) == _is_at_end(direction)


def moved(thing: Thing, direction: str, cells: int) -> Thing:
    """By so many cells towards a direction."""
    step = cells if _is_at_end(direction) else -cells
    return replace(thing, x=thing.x + step) if _axis(direction) else replace(thing, y=thing.y + step)


def new_window(given: torch.Tensor, new: torch.Tensor, direction: str) -> torch.Tensor:
    """The window half a window further on, (W, W, …): the half that is in `given`, and the other half of `new`."""
    axis, half = _axis(direction), len(given) // 2
    first, last = (0, half), (half, half)
    if _is_at_end(direction):
        return torch.cat((given.narrow(axis, *last), new.narrow(axis, *last)), axis)
    return torch.cat((new.narrow(axis, *first), given.narrow(axis, *first)), axis)


def extended(given: torch.Tensor, new: torch.Tensor, direction: str) -> torch.Tensor:
    """The canvas of a given window, (W, W, …), and beyond it one half of the window half a window further on."""
    axis, half = _axis(direction), len(given) // 2
    if _is_at_end(direction):
        return torch.cat((given, new.narrow(axis, half, half)), axis)
    return torch.cat((new.narrow(axis, 0, half), given), axis)


# ---- answers ----


class SceneAnswers(SceneTask, QuestionTask):
    """The world's questions about true images; an answer must be exactly the right one."""

    name = "scenes_answers"
    kinds = dict.fromkeys(("what", "colour", "place", "count", "yes-no", "compare"), (SEEN, *OTHERS))
    parts = ("answered yes",)
    max_new_tokens = 24

    def read_items(self) -> list[Item]:
        return [
            item
            for split in (SEEN, *OTHERS)
            for number in range(self.config.scenes_samples)
            for item in self._asked(split, number)
        ]

    def _asked(self, split: str, number: int) -> Iterator[Item]:
        """All questions about one scene, which are resampled together."""
        one = sample("questions", number, self._seed, split, self.cells)
        (scene,) = one.scenes
        for index, asked in enumerate(one.said["questions"]):
            yield Item(
                f"{one.key}-{index}",
                asked["question"],
                lambda: image_of(scene),
                one.key,
                one.key,
                split,
                {"kind": asked["kind"], "split": split},
                asked["answer"],
            )

    def judge(self, items, answers) -> list[Verdict]:
        verdicts = []
        for item, answer in zip(items, answers, strict=True):
            facts = {RIGHT: answer == item.expected}
            if item.facts["kind"] == "yes-no":
                facts["answered yes"] = answer == "yes"
            verdicts.append(Verdict(answer, float(facts[RIGHT]), facts))
        return verdicts

    def notes(self) -> list[str]:
        return ["exact match; of the questions of kind yes-no half are to be answered yes"]


# ---- reconstruction ----


class SceneReconstruction(SceneTask, TokenizerTask):
    """True images through the image tokenizer: their PSNR, and the things that are still read right."""

    name = "scenes_reconstruction"
    headline = "things right, held out"
    ceilings = (TRUE,)
    kinds = {"": (SEEN, *OTHERS)}
    answers_are_files = True
    of_things = ("right", "icon", "colour", "size", "place", "invented")

    def items_of(self, kind, split, number) -> list[Item]:
        scene = sample_scene(generator(self.name, split, self._seed, self.cells, number), self.cells, split)
        key = f"{split}-{number:04d}"
        facts = {"file": key, "split": split, "scene": scene}
        return [Item(key, "", lambda: image_of(scene), key, "", split, facts, described(scene))]

    def judge(self, items, answers) -> list[Verdict]:
        verdicts = []
        with progress(total=len(items), desc=f"{self.name}, reading") as bar:
            for start in range(0, len(items), READ_AT_ONCE):
                part = slice(start, start + READ_AT_ONCE)
                verdicts += self._judge(items[part], answers[part])
                bar.update(len(items[part]))
        self.output.write_json(SET_FILE, self.codes_used(answers))
        return verdicts

    def _judge(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        true, size = [item.open_image() for item in items], CELL * self.cells
        restored = [load_image(self.folder / answer) for answer in answers]
        pixels = (
            torch.stack([as_bytes(image, size).flatten() for image in images]).double() / 255
            for images in (restored, true)
        )
        verdicts = []
        for item, quality, found, ideal in zip(
            items, psnr(*pixels).tolist(), read(self.cells, restored), read(self.cells, true), strict=True
        ):
            counted, own = (compare(item.facts["scene"], scene) for scene in (found, ideal))
            facts = {name: float(value) for name, value in counted.items()} | {"PSNR": quality}
            facts |= {f"{name}: {TRUE}": float(value) for name, value in own.items()}
            verdicts.append(Verdict(described(found), quality, facts))
        return verdicts

    def counts(self, items, verdicts) -> dict[str, float]:
        found = Counter()
        for item, verdict in zip(items, verdicts, strict=True):
            for where in places(item.facts["split"]):
                found.update({f"{where} {name}": value for name, value in verdict.facts.items()})
        return found

    def figures(self, sums) -> dict[str, np.ndarray]:
        found = {}
        for where in (where for where in (SEEN, HELD_OUT, *OTHERS) if f"{where} scenes" in sums):
            scenes, things = sums[f"{where} scenes"], sums[f"{where} things"]
            for end in ("", f": {TRUE}"):
                for name in self.of_things:
                    found[f"things {name}, {where}{end}"] = 100 * ratio(sums[f"{where} {name}{end}"], things)
                found[f"scenes all right, {where}{end}"] = 100 * ratio(sums[f"{where} all{end}"], scenes)
            found[f"PSNR, dB, {where}"] = ratio(sums[f"{where} PSNR"], scenes)
        return found
