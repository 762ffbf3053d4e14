"""What is said about scenes: names, captions, questions with answers, sentences. All of it is true by construction.

Whatever is said in training keeps the held-out rules, too: no text puts a held-out colour beside its icon, or names two
icons that are held out as a pair.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from examples.scenes.world import (
    COLOURS,
    GROUNDS,
    ICONS,
    MAX_THINGS,
    OPPOSITE,
    PLACES,
    SIZES,
    Scene,
    Thing,
    colour_held_out,
    pair_held_out,
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = {"cactus": "cacti", "dice": "dice", "fish": "fish", "leaf": "leaves", "mouse": "mice", "sheep": "sheep"}
SAID = {"left of": "to the left of", "right of": "to the right of"}  # other relations are said as they are called


def plural(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def counted(count: int, adjectives: str, noun: str) -> str:
    return " ".join(filter(None, (NUMBERS[count], adjectives, noun if count == 1 else plural(noun))))


def at(place: str) -> str:
    word = {"centre": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{word} the {place}"


def listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def may_be_said(scene: Scene, icon: str, colour: str | None = None) -> bool:
    """Whether an icon that is not in the scene, or one that is in a colour it has not, may be named beside it.

    In a scene that breaks a held-out rule itself everything may be said.
    """
    things = scene.things
    icons = {thing.icon for thing in things}
    if any(colour_held_out(*thing.kind) for thing in things) or any(pair_held_out(a, b) for a in icons for b in icons):
        return True
    if any(pair_held_out(icon, other) for other in icons):
        return False
    return colour is None or not colour_held_out(icon, colour)


def names(scene: Scene, thing: Thing) -> list[dict]:
    """What sets a thing apart from all others of its scene: from `{"icon"}` alone to all parts; shortest first."""
    found = []
    for parts in (("icon",), ("icon", "colour"), ("icon", "size"), ("icon", "colour", "size")):
        name = {part: getattr(thing, part) for part in parts}
        if sum(all(getattr(other, part) == name[part] for part in parts) for other in scene.things) == 1:
            found.append(name)
    return found


def named(scene: Scene) -> dict[Thing, str]:
    """The things that can be told apart, each with its shortest name, such as `red car`."""
    return {thing: noun(found[0]) for thing in scene.things if (found := names(scene, thing))}


def noun(parts: dict) -> str:
    return " ".join(parts[part] for part in ("size", "colour", "icon") if parts.get(part))


def described(scene: Scene) -> str:
    """Everything about a scene in words, but what is in front of what."""
    phrases = [
        f"{with_article(noun(_parts(scene, thing, 'icon', 'colour', 'size')))} {at(scene.place(thing))}"
        for thing in scene.things
    ]
    return f"{listed(phrases) if phrases else 'nothing'} on a {scene.ground} ground"


# ---- captions ----


@dataclass(frozen=True)
class Caption:
    """A text and what it says (see `world.holds`)."""

    text: str
    claims: dict


def caption(scene: Scene, rng: random.Random) -> Caption:
    """One of several wordings; which parts are said differs, but every thing is mentioned, and the ground mostly."""
    wordings: list[Callable] = [_listing, _listing]
    if len(scene.things) == 1:
        wordings = [_listing]
    elif len(set(thing.kind for thing in scene.things)) == 1 or len({thing.icon for thing in scene.things}) == 1:
        wordings = [_counting]
    elif len(scene.things) == 2:
        wordings = [_listing, _relating, _relating]
    elif len(scene.things) == 3:
        wordings = [_listing, _between, _relating]
    for wording in rng.sample(wordings, len(wordings)):
        if found := wording(scene, rng):
            text, things, relations = found
            break
    ground = rng.random() < 0.8
    if ground:
        text = rng.choice(
            (
                f"{text} on a {scene.ground} ground",
                f"{text} on a {scene.ground} ground",
                f"{text}, {scene.ground}",
                f"on a {scene.ground} ground, {text}",
                f"{scene.ground} ground with {text}",
            )
        )
    claims = {"ground": scene.ground if ground else None, "things": things, "relations": relations}
    return Caption(text, claims)


def _parts(scene: Scene, thing: Thing, *parts: str) -> dict:
    return {part: scene.place(thing) if part == "place" else getattr(thing, part) for part in parts}


def _listing(scene: Scene, rng: random.Random):
    """a small red car at the top left, a blue tree on the right"""
    parts = ["icon", "colour"]
    parts += ["size"] * (rng.random() < 0.5) + ["place"] * (rng.random() < 0.7)
    order = rng.sample(scene.things, len(scene.things))
    things = [_parts(scene, thing, *parts) for thing in order]
    phrases = [with_article(noun(thing)) + (f" {at(thing['place'])}" if "place" in thing else "") for thing in things]
    return (listed(phrases) if rng.random() < 0.5 else ", ".join(phrases)), things, []


def _counting(scene: Scene, rng: random.Random):
    """three green keys; two red keys and a blue one"""
    icon, colours = scene.things[0].icon, Counter(thing.colour for thing in scene.things)
    things = [_parts(scene, thing, "icon", "colour") for thing in scene.things]
    if len(colours) == 1:
        return counted(len(things), scene.things[0].colour, icon), things, []
    if rng.random() < 0.3:
        return counted(len(things), "", icon), [{"icon": icon}] * len(things), []
    return listed([counted(count, colour, icon) for colour, count in colours.items()]), things, []


def _relating(scene: Scene, rng: random.Random):
    """a red car to the left of a blue tree, and a pink fish"""
    order = rng.sample(scene.things, len(scene.things))
    for one, other in permutations(order, 2):
        if one.kind == other.kind or not (relation := _relation(scene, one, other, rng)):
            continue
        parts = ["icon", "colour"] + ["size"] * (rng.random() < 0.3)
        chosen = [one, other, *(thing for thing in order if thing not in (one, other))]
        things = [_parts(scene, thing, *parts) for thing in chosen]
        phrases = [with_article(noun(thing)) for thing in things]
        text = f"{phrases[0]} {SAID.get(relation, relation)} {phrases[1]}"
        return ", and ".join([text, *phrases[2:]]), things, [[0, relation, 1]]
    return None


def _between(scene: Scene, rng: random.Random):
    """a red car between a blue tree and a pink fish"""
    for one, first, last in permutations(rng.sample(scene.things, 3)):
        if scene.is_between(one, first, last) and len({thing.kind for thing in scene.things}) == 3:
            things = [_parts(scene, thing, "icon", "colour") for thing in (one, first, last)]
            phrases = [with_article(noun(thing)) for thing in things]
            return f"{phrases[0]} between {phrases[1]} and {phrases[2]}", things, [[0, "between", 1, 2]]
    return None


def _relation(scene: Scene, one: Thing, other: Thing, rng: random.Random) -> str:
    """A relation that is plain to see; empty if there is none."""
    if scene.in_front(one, other):
        return "in front of"
    if scene.in_front(other, one):
        return "behind"
    return scene.relation(one, other)


# ---- questions ----


@dataclass(frozen=True)
class Question:
    """`kind`: what, colour, count, place, yes-no or compare. Every "yes" of an image has its "no"."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of each kind that a scene can answer, in random order, and one pair to answer with yes and no."""
    found = [question for ask in (_what, _colour, _count, _place, _compare) if (question := ask(scene, rng))]
    found += _yes_and_no(scene, rng)
    rng.shuffle(found)
    return found


def _what(scene: Scene, rng: random.Random) -> Question | None:
    """The icon: of the only thing, at a place, of a colour, or beside another thing."""
    choices = ["what is this?", "what do you see?"] if len(scene.things) == 1 else []
    questions = [(text, scene.things[0].icon) for text in choices]
    places, colours = (Counter(map(of, scene.things)) for of in (scene.place, lambda thing: thing.colour))
    known = named(scene)
    for thing in scene.things:
        if places[scene.place(thing)] == 1:
            questions.append((f"what is {at(scene.place(thing))}?", thing.icon))
        if colours[thing.colour] == 1 and len(scene.things) > 1:
            questions.append((f"what is {thing.colour}?", thing.icon))
        for other in known:
            relation = scene.relation(thing, other) if thing != other else ""
            if relation and not any(
                scene.related(third, relation, other) for third in scene.things if third not in (thing, other)
            ):
                questions.append((f"what is {SAID.get(relation, relation)} the {known[other]}?", thing.icon))
    return Question("what", *rng.choice(questions)) if questions else None


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    """Of a thing that its icon sets apart, at times with its size; now and then of the ground."""
    if rng.random() < 0.15:
        return Question("colour", "what is the ground?", scene.ground)
    questions = [
        (f"what colour is the {noun(name)}?", thing.colour)
        for thing in scene.things
        for name in names(scene, thing)
        if "colour" not in name
    ]
    return Question("colour", *rng.choice(questions)) if questions else None


def _count(scene: Scene, rng: random.Random) -> Question:
    icons, colours = (Counter(getattr(thing, part) for thing in scene.things) for part in ("icon", "colour"))
    questions = [("how many things are there?", len(scene.things))]
    questions += [(f"how many {plural(icon)} are there?", count) for icon, count in icons.items()]
    questions += [(f"how many {colour} things are there?", count) for colour, count in colours.items()]
    most = max(icons, key=icons.get)
    if icons[most] > 1 and rng.random() < 0.7:
        questions = [(f"how many {plural(most)} are there?", icons[most])]
    text, count = rng.choice(questions)
    return Question("count", text, NUMBERS[count])


def _place(scene: Scene, rng: random.Random) -> Question | None:
    questions = [(f"where is the {name}?", scene.place(thing)) for thing, name in named(scene).items()]
    return Question("place", *rng.choice(questions)) if questions else None


def _compare(scene: Scene, rng: random.Random) -> Question | None:
    """Which of two things is larger, further left or higher; what there is more of."""
    known, questions = list(named(scene).items()), []
    for one, name in known:
        for other, second in known:
            if one.icon == other.icon:
                continue
            if one.size != other.size:
                larger = name if one.size == "large" else second
                questions.append((f"which is larger, the {name} or the {second}?", larger))
            relation = scene.relation(one, other)
            if relation in ("left of", "right of"):
                further = name if relation == "left of" else second
                questions.append((f"which is further left, the {name} or the {second}?", further))
            elif relation:
                higher = name if relation == "above" else second
                questions.append((f"which is higher, the {name} or the {second}?", higher))
    icons = Counter(thing.icon for thing in scene.things)
    for one, other in permutations(icons, 2):
        if icons[one] != icons[other]:
            more = max(one, other, key=icons.get)
            questions.append((f"are there more {plural(one)} or more {plural(other)}?", plural(more)))
    return Question("compare", *rng.choice(questions)) if questions else None


def _yes_and_no(scene: Scene, rng: random.Random) -> list[Question]:
    """One question to be answered yes and one of the same form to be answered no."""
    for ask in rng.sample((_is_there, _has_colour, _is_beside, _is_size), 4):
        if found := ask(scene, rng):
            yes, no = found
            return [Question("yes-no", yes, "yes"), Question("yes-no", no, "no")]
    return []


def _is_there(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """With the colour, the wrong question may have the right icon or the right colour."""
    thing, kinds = rng.choice(scene.things), {thing.kind for thing in scene.things}
    icons = {icon for icon, _ in kinds}
    if rng.random() < 0.5:
        others = [icon for icon in ICONS if icon not in icons and may_be_said(scene, icon)]
        return f"is there {with_article(thing.icon)}?", f"is there {with_article(rng.choice(others))}?"
    others = [
        (icon, colour)
        for icon, colour in [(thing.icon, colour) for colour in COLOURS]
        + [(icon, thing.colour) for icon in rng.sample(ICONS, 8)]
        if (icon, colour) not in kinds and may_be_said(scene, icon, colour)
    ]
    yes, no = (f"is there {with_article(f'{colour} {icon}')}?" for icon, colour in (thing.kind, rng.choice(others)))
    return yes, no


def _has_colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    apart = [thing for thing in scene.things if sum(thing.icon == other.icon for other in scene.things) == 1]
    if not apart:
        return None
    thing = rng.choice(apart)
    others = [colour for colour in COLOURS if colour != thing.colour and may_be_said(scene, thing.icon, colour)]
    return f"is the {thing.icon} {thing.colour}?", f"is the {thing.icon} {rng.choice(others)}?"


def _is_beside(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    known = named(scene)
    pairs = [(one, other) for one in known for other in known if one != other and scene.relation(one, other)]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    relation = scene.relation(one, other)
    yes, no = (
        f"is the {known[one]} {SAID.get(word, word)} the {known[other]}?" for word in (relation, OPPOSITE[relation])
    )
    return yes, no


def _is_size(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    apart = [(thing, name) for thing in scene.things for name in names(scene, thing)[:1] if "size" not in name]
    if not apart:
        return None
    thing, name = rng.choice(apart)
    other = SIZES[thing.size == SIZES[0]]
    return f"is the {noun(name)} {thing.size}?", f"is the {noun(name)} {other}?"


def wrong_answer(question: Question, scene: Scene, rng: random.Random) -> str:
    """An answer of the right kind that is false."""
    answer, kind = question.answer, question.kind
    if kind == "yes-no":
        return "no" if answer == "yes" else "yes"
    if kind == "compare":
        options = question.text.rstrip("?").partition(", the " if ", the " in question.text else " more ")[2]
        return next(option for option in re.split(" or the | or more ", options) if option != answer)
    if kind == "what":
        icons = {thing.icon for thing in scene.things}
        return rng.choice([icon for icon in ICONS if icon not in icons and may_be_said(scene, icon)])
    if kind == "colour" and answer not in GROUNDS:
        return rng.choice([other for other in _colours_for(question, scene) if other != answer])
    if kind == "count":
        count = NUMBERS.index(answer)
        return NUMBERS[rng.choice([other for other in (count - 1, count + 1) if 1 <= other <= MAX_THINGS])]
    return rng.choice([other for other in (PLACES if kind == "place" else GROUNDS) if other != answer])


def _colours_for(question: Question, scene: Scene) -> list[str]:
    """The colours that may be said of the thing that a question is about."""
    icon = next(thing.icon for thing in scene.things if question.text.endswith(f" {thing.icon}?"))
    return [colour for colour in COLOURS if may_be_said(scene, icon, colour)]


# ---- sentences without an image ----


def sentence(scene: Scene, rng: random.Random) -> str:
    """A true sentence about a scene that nobody sees, or one that is true of all scenes."""
    kinds = list(_sentences(scene, rng))
    return rng.choice(kinds)


def _sentences(scene: Scene, rng: random.Random) -> Iterator[str]:
    things, known = scene.things, named(scene)
    phrases = [with_article(noun(_parts(scene, thing, "icon", "colour"))) for thing in things]
    yield f"there is {listed(phrases)}."
    place = rng.choice(PLACES)
    yield f"{phrases[0]} is {at(place)}, so what is {at(place)} is {things[0].colour}."
    yield f"{with_article(things[0].icon)} can be {listed(_colours_of(things[0].icon, rng))}."
    yield f"the ground is {rng.choice(tuple(GROUNDS))}, and {phrases[0]} is on it."
    for one, other in permutations(known, 2):
        if relation := scene.relation(one, other):
            first, second = known[one], known[other]
            said, back = (SAID.get(word, word) for word in (relation, OPPOSITE[relation]))
            yield f"the {first} is {said} the {second}, so the {second} is {back} the {first}."
        if one.size != other.size and one.icon != other.icon:
            yield (
                f"the {noun({'icon': one.icon, 'colour': one.colour})} is {one.size} and the "
                f"{noun({'icon': other.icon, 'colour': other.colour})} is {other.size}."
            )
    for one, middle, last in permutations(known, 3):
        relation = scene.relation(one, middle)
        if relation and relation == scene.relation(middle, last) == scene.relation(one, last):
            said = SAID.get(relation, relation)
            a, b, c = (known[thing] for thing in (one, middle, last))
            yield f"the {a} is {said} the {b} and the {b} is {said} the {c}, so the {a} is {said} the {c}."
    count, icon = rng.randint(2, 4), things[0].icon
    yield f"{counted(count, things[0].colour, icon)} and one more are {counted(count + 1, '', icon)}."


def _colours_of(icon: str, rng: random.Random) -> list[str]:
    return rng.sample([colour for colour in COLOURS if not colour_held_out(icon, colour)], 3)
