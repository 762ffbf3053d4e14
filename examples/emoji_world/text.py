"""Everything the emoji world says in words: captions, questions with answers, and sentences about each name.

All texts are short and lower-case where the names are, because the tiny model reads a few dozen tokens at most.
"""

import random
from dataclasses import dataclass, field

STYLES = ("fluent 3d", "fluent flat", "noto", "twemoji")

# Emojibase's group number -> our words for it, and how a question asks for it.
GROUPS = {3: "animals & nature", 4: "food & drink", 5: "travel & places", 6: "activities", 7: "objects"}
GROUP_QUESTIONS = {
    "animals & nature": "Is this an animal or a plant?",
    "food & drink": "Is this a food or a drink?",
    "travel & places": "Is this a place or travel?",
    "activities": "Is this an activity?",
    "objects": "Is this an object?",
}
NAME_QUESTION = "What is this?"
CAPTION_QUESTION = "Describe the picture."
STYLE_QUESTION = "Which style is it drawn in?"


@dataclass
class Name:
    """One emoji: its name, its group, and the style (if any) that is held out."""

    name: str
    group: str
    subgroup: str
    hexcode: str
    order: int
    tags: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    held_out_style: str | None = None

    @property
    def wnid(self) -> str:
        """A class id shaped like ImageNet's, the same whatever selection of names it is in."""
        return f"n{self.order:08d}"


def slug(text: str) -> str:
    """File-name form: letters and digits, everything else one `-`."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def picture_key(name: str, style: str) -> str:
    """Sample key of an image, without dots (WebDataset splits keys at the first one)."""
    return f"{slug(name)}_{slug(style)}"


def caption(name: str, style: str) -> str:
    return f"{name} in {style} style"


def conversations(names: list[Name], held_out: bool, seed: int) -> list[dict]:
    """LLaVA records (spec §9), four for each image of the split: name, group (yes or no), style, caption.

    Every second group question, in a shuffled order, is about the image's own group, so "yes" and "no" are equally
    frequent. The extra key `task` says which of the four questions a record is.
    """
    rng = random.Random(f"questions {held_out} {seed}")
    pairs = [(n, s) for n in names for s in n.styles if (s == n.held_out_style) == held_out]
    says_yes = [i % 2 == 0 for i in range(len(pairs))]
    rng.shuffle(says_yes)
    records = []
    for (name, style), yes in zip(pairs, says_yes, strict=True):
        asked = name.group if yes else rng.choice([g for g in GROUPS.values() if g != name.group])
        turns = {
            "name": (NAME_QUESTION, name.name),
            "group": (GROUP_QUESTIONS[asked], "yes" if yes else "no"),
            "style": (STYLE_QUESTION, style),
            "caption": (CAPTION_QUESTION, caption(name.name, style)),
        }
        records += [_record(picture_key(name.name, style), task, *turn) for task, turn in turns.items()]
    return records


def _record(key: str, task: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"{key}_{task}", "image": f"{key}.png", "task": task, "conversations": turns}


def sentences(names: list[Name], seed: int) -> list[str]:
    """Text for the language-modelling flow, shuffled: each name's group, relatives and look-alikes.

    Held-out styles are not mentioned together with their name.
    """
    rng = random.Random(f"sentences {seed}")
    families: dict[str, list[Name]] = {}
    for name in names:
        families.setdefault(name.subgroup, []).append(name)
    lines = []
    for name in names:
        relatives = [n.name for n in families[name.subgroup] if n is not name]
        lines += _about(name, rng.sample(relatives, min(2, len(relatives))))
    rng.shuffle(lines)
    return lines


def _about(name: Name, relatives: list[str]) -> list[str]:
    tags = [t for t in name.tags if t != name.name]
    styles = [s for s in name.styles if s != name.held_out_style]
    lines = [f"{name.name} belongs to {name.group}.", f"there are pictures of {name.name} in {_listed(styles)} style."]
    if tags:
        lines.append(f"{name.name} makes us think of {_listed(tags)}.")
    lines += [f"one thing to do with {tag} is {name.name}." for tag in tags]
    lines += [f"{name.name} and {other} are both {name.subgroup}." for other in relatives]
    return lines


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def tokenizer_lines(names: list[Name], records: list[dict], lines: list[str]) -> list[str]:
    """Every text of training in the form the model reads it, for training a BPE tokenizer."""
    captions = [caption(n.name, s) for n in names for s in n.styles if s != n.held_out_style]
    turns = [[turn["value"].replace("<image>\n", "") for turn in r["conversations"]] for r in records]
    return captions + [f"USER: {question} ASSISTANT: {answer}" for question, answer in turns] + lines
