"""The parts of the scene world: samples of each, number by number, as endless streams.

Sample n of a part depends on nothing but the part, the split, the seed, the image's size and n, so any process can make
any of them, in any order.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from examples.scenes.words import (
    at,
    caption,
    described,
    may_be_said,
    named,
    noun,
    questions,
    sentence,
    with_article,
    wrong_answer,
)
from examples.scenes.world import (
    COLOURS,
    GROUNDS,
    ICONS,
    MAX_THINGS,
    PLACES,
    SIZES,
    Scene,
    Thing,
    add_thing,
    colour_held_out,
    generator,
    held_out,
    holds,
    is_possible,
    is_reserved,
    sample_scene,
    side_of,
)

ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Sample:
    """Scenes, to be drawn as images, and what is said about them; the keys of `said` are each part's own."""

    key: str
    scenes: tuple[Scene, ...] = ()
    said: dict = field(default_factory=dict)


def sample(part: str, number: int, seed: int = 0, split: str = "train", cells: int = 12) -> Sample:
    """One sample of a part; see `PARTS`."""
    rng = generator(part, split, seed, cells, number)
    scenes, said = PARTS[part](rng, split, cells, number)
    return Sample(f"{split}-{number:07d}", tuple(scenes), said)


def stream(part: str, seed: int = 0, split: str = "train", cells: int = 12, start: int = 0) -> Iterator[Sample]:
    """The samples of a part without end, from number `start` on."""
    return (sample(part, number, seed, split, cells) for number in count(start))


# ---- images with texts ----


def _class(rng: random.Random, split: str, cells: int, number: int):
    """One large icon; `class` is its name. The classes come in turn."""
    icon = ICONS[number % len(ICONS)]
    while True:
        colour = rng.choice([colour for colour in COLOURS if not colour_held_out(icon, colour)])
        thing = add_thing(rng, (), icon, colour, "large", cells)
        scene = Scene(rng.choice(tuple(GROUNDS)), (thing,), cells)
        if is_reserved(scene) == (split == "seen"):
            return [scene], {"class": icon}


def _caption(rng: random.Random, split: str, cells: int, number: int):
    """`caption`, and its `claims` (`world.holds`)."""
    scene = sample_scene(rng, cells, split, counts=(1, 1, 2, 2, 2, 3, 3, 4))
    said = caption(scene, rng)
    return [scene], {"caption": said.text, "claims": said.claims}


def _questions(rng: random.Random, split: str, cells: int, number: int):
    """`questions`: a list of `{"kind", "question", "answer"}`, with a yes for every no; and a `caption`."""
    scene = sample_scene(rng, cells, split)
    found = questions(scene, rng)
    records = [{"kind": one.kind, "question": one.text, "answer": one.answer} for one in found]
    return [scene], {"questions": records, "caption": caption(scene, rng).text}


def _crowd(rng: random.Random, split: str, cells: int, number: int):
    """More things than a scene that is spoken of has, so that an image tokenizer sees many in each image."""
    return [sample_scene(rng, cells, split, counts=(6, 7, 8) if cells >= 12 else (4, 5))], {}


def _text(rng: random.Random, split: str, cells: int, number: int):
    """`content`: a sentence."""
    return [], {"content": sentence(sample_scene(rng, cells, split), rng)}


# ---- changes of a scene ----


@dataclass(frozen=True)
class Change:
    """What happens to a scene, as an instruction, as an event of a story, and as the answer to what changed."""

    kind: str
    scene: Scene
    instruction: str
    event: str
    answer: str


def change(scene: Scene, rng: random.Random, split: str = "train", kinds: tuple[str, ...] = ()) -> Change:
    """A change after which the scene is possible, and broken in no other rule than before; the rest stays as it is.

    Args:
        kinds: of `CHANGES`, from which one that is possible is drawn; empty: all.
    """
    allowed = set() if split in ("train", "seen") else {split}
    while True:
        kind = rng.choice(kinds or tuple(CHANGES))
        found = CHANGES[kind](scene, rng)
        if not found or found[0] == scene or (split == "train" and is_reserved(found[0])):
            continue
        if is_possible(found[0]) and held_out(found[0].things) <= allowed:
            return Change(kind, *found)


def _any_named(scene: Scene, rng: random.Random) -> tuple[Thing, str] | None:
    """A thing that can be told apart, and its name."""
    known = list(named(scene).items())
    return rng.choice(known) if known else None


def _exchange(scene: Scene, old: Thing, *new: Thing) -> Scene:
    index = scene.things.index(old)
    return replace(scene, things=scene.things[:index] + new + scene.things[index + 1 :])


def _recolour(scene: Scene, rng: random.Random):
    if not (found := _any_named(scene, rng)):
        return None
    thing, name = found
    colour = rng.choice(tuple(COLOURS))
    after = _exchange(scene, thing, replace(thing, colour=colour))
    return after, f"make the {name} {colour}", f"the {name} turns {colour}", f"the {name} became {colour}"


def _resize(scene: Scene, rng: random.Random):
    """Around the same middle, as far as the grid and the border allow."""
    if not (found := _any_named(scene, rng)):
        return None
    thing, name = found
    small = thing.size == SIZES[0]
    size = SIZES[small]
    side, new = scene.side(thing), side_of(size, scene.cells)
    x, y = (min(max(0, start + (side - new) // 2), scene.cells - new) for start in (thing.x, thing.y))
    after = _exchange(scene, thing, replace(thing, size=size, x=x, y=y))
    word, event = ("larger", "grows") if small else ("smaller", "shrinks")
    return after, f"make the {name} {word}", f"the {name} {event}", f"the {name} became {word}"


def _remove(scene: Scene, rng: random.Random):
    if len(scene.things) == 1 or not (found := _any_named(scene, rng)):
        return None
    thing, name = found
    return _exchange(scene, thing), f"remove the {name}", f"the {name} goes away", f"the {name} is gone"


def _add(scene: Scene, rng: random.Random):
    if len(scene.things) == MAX_THINGS:
        return None
    icon, colour, size = rng.choice(ICONS), rng.choice(tuple(COLOURS)), rng.choice(SIZES)
    thing = add_thing(rng, scene.things, icon, colour, size, scene.cells)
    if thing is None:
        return None
    words, where = with_article(noun({"icon": icon, "colour": colour, "size": size})), at(scene.place(thing))
    after = replace(scene, things=(*scene.things, thing))
    return after, f"add {words} {where}", f"{words} comes {where}", f"{words} was added {where}"


def _move(scene: Scene, rng: random.Random):
    """To another of the nine places, as a whole number of cells; it stays before or behind what it was."""
    if not (found := _any_named(scene, rng)):
        return None
    thing, name = found
    place, span = rng.choice(PLACES), range(scene.cells - scene.side(thing) + 1)
    spots = [replace(thing, x=x, y=y) for y in span for x in span]
    spots = [spot for spot in spots if scene.place(spot) == place != scene.place(thing)]
    if not spots:
        return None
    after = _exchange(scene, thing, rng.choice(spots))
    where = f"to the {place}"
    return after, f"move the {name} {where}", f"the {name} moves {where}", f"the {name} moved {where}"


def _swap(scene: Scene, rng: random.Random):
    """Two things of one size change places."""
    known = named(scene)
    pairs = [(a, b) for a in known for b in known if a != b and a.size == b.size]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    things = {one: replace(one, x=other.x, y=other.y), other: replace(other, x=one.x, y=one.y)}
    after = replace(scene, things=tuple(things.get(thing, thing) for thing in scene.things))
    both = f"the {known[one]} and the {known[other]}"
    return after, f"swap {both}", f"{both} change places", f"{both} changed places"


def _replace(scene: Scene, rng: random.Random):
    """Another icon in the same colour at the same place."""
    if not (found := _any_named(scene, rng)):
        return None
    thing, name = found
    icon = rng.choice(ICONS)
    if not may_be_said(scene, icon, thing.colour):
        return None
    new, after = with_article(icon), _exchange(scene, thing, replace(thing, icon=icon))
    return after, f"replace the {name} with {new}", f"the {name} turns into {new}", f"the {name} became {new}"


def _reground(scene: Scene, rng: random.Random):
    ground = rng.choice(tuple(GROUNDS))
    words = f"the ground {{}} {ground}"
    return replace(scene, ground=ground), f"on a {ground} ground", words.format("turns"), words.format("became")


CHANGES: dict[str, Callable] = {
    "colour": _recolour,
    "size": _resize,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "swap": _swap,
    "replace": _replace,
    "ground": _reground,
}


def _edit(rng: random.Random, split: str, cells: int, number: int):
    """The scenes before and after; `instruction`, and the `kind` of change."""
    scene = sample_scene(rng, cells, split, counts=(1, 2, 2, 3, 3, 4))
    done = change(scene, rng, split)
    return [scene, done.scene], {"instruction": done.instruction, "kind": done.kind}


def _story(rng: random.Random, split: str, cells: int, number: int):
    """Two to four scenes, each with one of `texts`; after the first, a text tells what happens and nothing else."""
    scenes = [sample_scene(rng, cells, split, counts=(2,) if split == "pairs" else (1, 1, 2))]
    texts, kinds = [described(scenes[0])], ["opening"]
    for _ in range(rng.randint(1, 3)):
        done = change(scenes[-1], rng, split, ("colour", "size", "remove", "add", "add", "move", "ground"))
        scenes.append(done.scene)
        texts.append(done.event)
        kinds.append(done.kind)
    return scenes, {"texts": texts, "kinds": kinds}


# ---- several images ----


def _several(rng: random.Random, split: str, cells: int, number: int):
    """Two or three scenes, a `question` about them and its `answer`; `kind`: change, find or count."""
    kind = ("change", "find", "count")[number % 3]
    if kind == "change":
        scene = sample_scene(rng, cells, split, counts=(1, 2, 2, 3, 3, 4))
        done = change(scene, rng, split)
        question, answer, scenes = "what changed from the first image to the second?", done.answer, [scene, done.scene]
    elif kind == "find":
        scenes, question, answer = _find(rng, split, cells)
    else:
        scenes = [sample_scene(rng, cells, split) for _ in range(2)]
        while len(scenes[0].things) == len(scenes[1].things):
            scenes[1] = sample_scene(rng, cells, split)
        question = "in which image are more things?"
        answer = f"the {ORDINALS[len(scenes[0].things) < len(scenes[1].things)]}"
    return scenes, {"question": question, "answer": answer, "kind": kind}


def _find(rng: random.Random, split: str, cells: int):
    """Scenes of which one has a thing of an icon and colour; another may have the icon in another colour."""
    while True:
        scenes = [sample_scene(rng, cells, split) for _ in range(rng.choice((2, 3)))]
        index = rng.randrange(len(scenes))
        icon, colour = rng.choice(scenes[index].things).kind
        others = [scene for scene in scenes if scene is not scenes[index]]
        if any(thing.icon == icon for scene in others for thing in scene.things):
            continue
        if all(may_be_said(scene, icon, colour) for scene in others):
            words = with_article(f"{colour} {icon}")
            return scenes, f"in which image is {words}?", f"the {ORDINALS[index]}"


# ---- better and worse ----


def _pair(rng: random.Random, split: str, cells: int, number: int):
    """In turn `kind` image, a `caption` with the scene it describes and one that is wrong in one respect (`wrong`),
    and `kind` answer, a scene with a `question`, the answer that is right (`chosen`) and one that is not (`rejected`).
    """
    if number % 2:
        scene = sample_scene(rng, cells, split)
        asked = rng.choice(questions(scene, rng))
        said = {"kind": "answer", "question": asked.text, "chosen": asked.answer}
        return [scene], said | {"rejected": wrong_answer(asked, scene, rng), "wrong": asked.kind}
    while True:
        scene = sample_scene(rng, cells, split, counts=(1, 2, 2, 3, 3, 4))
        said = caption(scene, rng)
        for _ in range(8):
            done = change(scene, rng, split)
            if not holds(said.claims, done.scene):
                claims = {"caption": said.text, "claims": said.claims}
                return [scene, done.scene], {"kind": "image", **claims, "wrong": done.kind}


PARTS: dict[str, Callable] = {
    "classes": _class,
    "captions": _caption,
    "questions": _questions,
    "crowds": _crowd,
    "edits": _edit,
    "stories": _story,
    "several": _several,
    "texts": _text,
    "pairs": _pair,
}
