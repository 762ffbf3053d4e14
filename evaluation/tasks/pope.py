"""POPE: is a thing in the image, yes or no, where the wrong things are random, frequent, or likely in such images.

`pope/coco_pope_{random,popular,adversarial}.json` of the official repository and COCO's `coco/val2014/`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.official_files import (
    check_filled,
    check_images,
    field,
    read_json_lines,
    unique_keys,
    write_json_lines,
)
from evaluation.task import SHORT_ANSWER, Item, Paper, QuestionTask, Verdict, ratio
from models.images import load_image

SPLITS = ("random", "popular", "adversarial")


class YesNoRule:
    """How questions to be answered yes or no are read and counted."""

    def judge(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        parsed = [parse_yes_no(answer) for answer in answers]
        return [Verdict(p, float(p == item.expected)) for item, p in zip(items, parsed, strict=True)]

    def counts(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Of true and false positives and negatives in each split (the items' fact `split`)."""
        pairs = zip(items, verdicts, strict=True)
        return Counter(
            f"{item.facts['split']} {'t' if verdict.score else 'f'}{'p' if verdict.parsed == 'yes' else 'n'}"
            for item, verdict in pairs
        )


class POPE(YesNoRule, QuestionTask):
    name = "pope"
    headline = "F1, mean of splits"
    official_size = 9000
    paper = Paper(80.0, 84.5, "which figure the paper means is not said; this is the one LLaVA-1.5 reports")

    def read_items(self) -> list[Item]:
        items = [item for split in SPLITS for item in self._read_split(split)]
        named = {item.image: item.facts["split"] for item in reversed(items)}
        check_images(
            [self._folder / item.image for item in items],
            lambda path: f"field 'image' of coco_pope_{named[path.name]}.json",
            f"COCO's val2014 images in {self._folder}",
        )
        return items

    @property
    def _folder(self) -> Path:
        return self.root / "coco/val2014"

    def _read_split(self, split: str) -> list[Item]:
        file, what = self.root / f"pope/coco_pope_{split}.json", f"POPE's {split} questions, one JSON object a line"
        items = []
        for place, record in read_json_lines(file, what):
            number = field(place, record, "question_id", int)
            image, text = (field(place, record, name, str) for name in ("image", "text"))
            label = field(place, record, "label", str, ("yes", "no"))
            opened, facts = partial(load_image, self._folder / image), {"split": split, "question": text}
            # The splits share their images, so images are resampled, not questions.
            items.append(
                Item(f"{split}-{number}", text + SHORT_ANSWER, opened, image, image, facts=facts, expected=label)
            )
        check_filled(items, file, what)
        unique_keys([item.key for item in items], file, "question_id")
        return items

    def figures(self, sums) -> dict[str, np.ndarray]:
        found = yes_no_figures(sums, SPLITS)
        means = {
            f"{what}, mean of splits": sum(found[f"{s} {what}"] for s in SPLITS) / 3 for what in ("F1", "accuracy")
        }
        return means | found

    def write_submission(self, folder, items, answers):
        """The answer files that the official `evaluate.py` reads, one a split, in the order of the questions."""
        for split in SPLITS:
            pairs = [pair for pair in zip(items, answers, strict=True) if pair[0].facts["split"] == split]
            records = [{"question": item.facts["question"], "answer": text} for item, text in pairs]
            write_json_lines(folder / f"coco_pope_{split}_answers.json", records)


def yes_no_figures(sums: Mapping[str, np.ndarray], splits: Sequence[str]) -> dict[str, np.ndarray]:
    """POPE's figures of each split in percent, from the sums of `YesNoRule.counts`."""
    found = {}
    for split in splits:
        tp, fp, tn, fn = (sums[f"{split} {kind}"] for kind in ("tp", "fp", "tn", "fn"))
        total = tp + fp + tn + fn
        found |= {
            f"{split} accuracy": 100 * ratio(tp + tn, total),
            f"{split} precision": 100 * ratio(tp, tp + fp),
            f"{split} recall": 100 * ratio(tp, tp + fn),
            f"{split} F1": 100 * ratio(2 * tp, 2 * tp + fp + fn),
            f"{split} yes-ratio": 100 * ratio(tp + fp, total),
        }
    return found


def parse_yes_no(answer: str) -> str:
    """The official rule: of the first sentence, without commas, `No`, `no` and `not` mean no; all else is yes.

    Faithful: "NO", "Not" and "no!" are read as yes, and an empty answer too (test_pope.py pins it).
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"
