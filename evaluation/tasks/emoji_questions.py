"""What a model says about the images of the emoji world: names, yes or no, styles.

The questions are those of training (`examples/emoji_world/text.py`); a held-out image's name was seen in other styles.
"""

import random
from functools import partial

import numpy as np

from evaluation.emoji import KINDS, SPLITS, Picture, read_world, world_settings
from evaluation.task import Item, QuestionTask, Verdict, ratio
from evaluation.tasks.pope import YesNoRule, yes_no_figures
from examples.emoji_world.text import GROUP_QUESTIONS, GROUPS, NAME_QUESTION, STYLE_QUESTION
from models.images import load_image


class EmojiQuestions(QuestionTask):
    """One question about every image, of which the answer must be exactly the right one."""

    headline = "held-out"
    asked_by = ("emoji_manifest",)

    @property
    def settings(self):
        return super().settings | world_settings(self.root / self.config.emoji_world)

    def read_items(self) -> list[Item]:
        pictures = read_world(self.root / self.config.emoji_world)
        return [item for picture in pictures for item in self.items_of(picture)]

    def items_of(self, picture: Picture) -> list[Item]:
        raise NotImplementedError

    def judge(self, items, answers) -> list[Verdict]:
        return [Verdict(text, float(text == item.expected)) for item, text in zip(items, answers, strict=True)]

    def counts(self, items, verdicts) -> dict[str, float]:
        found = {}
        for kind in items[0].facts["kinds"]:
            found |= {kind: len(items), f"{kind} right": sum(verdict.score for verdict in verdicts)}
        return found

    def figures(self, sums) -> dict[str, np.ndarray]:
        return {kind: 100 * ratio(sums[f"{kind} right"], sums[kind]) for kind in KINDS if kind in sums}


class EmojiNaming(EmojiQuestions):
    name = "emoji_naming"

    def items_of(self, picture):
        return [ask(picture, NAME_QUESTION, picture.name)]


class EmojiStyle(EmojiQuestions):
    name = "emoji_style"

    def items_of(self, picture):
        return [ask(picture, STYLE_QUESTION, picture.style)]


class EmojiYesNo(YesNoRule, EmojiQuestions):
    """POPE's form: about every image one question to be answered yes and one to be answered no."""

    name = "emoji_yes_no"
    headline = "held-out accuracy"
    asked_by = ("emoji_manifest", "questions")

    def items_of(self, picture):
        others = [group for group in GROUPS.values() if group != picture.group]
        other = random.Random(f"{self.config.seed} {picture.key}").choice(others)
        pairs = ((picture.group, "yes"), (other, "no"))
        return [ask(picture, GROUP_QUESTIONS[group], right, f"-{right}") for group, right in pairs]

    @property
    def settings(self):
        return super().settings | {"questions": f"seed {self.config.seed}"}

    def figures(self, sums) -> dict[str, np.ndarray]:
        asked = [split for split in SPLITS if any(f"{split} {kind}" in sums for kind in ("tp", "fp", "tn", "fn"))]
        return yes_no_figures(sums, asked)

    def notes(self) -> list[str]:
        return ["read by POPE's rule; half of the questions are to be answered yes"]


def ask(picture: Picture, question: str, right: str, end: str = "") -> Item:
    """A question about an image; all about one are resampled together, within its split and style."""
    return Item(
        f"{picture.key}{end}",
        question,
        partial(load_image, picture.path),
        picture.path.name,
        picture.key,
        picture.kinds[1],
        {"split": picture.split, "kinds": picture.kinds},
        right,
    )
