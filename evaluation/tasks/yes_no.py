"""Benchmarks whose questions are answered yes or no: POPE and MME.

POPE: is a thing in the image, where the wrong things are random, frequent, or likely in such images.
`pope/coco_pope_{random,popular,adversarial}.json` of the official repository and COCO's `coco/val2014/`.

MME: fourteen subtasks, two questions about each image, one of which is to be answered no. `mme/{subtask}/`, or
`mme/MME_Benchmark_release_version/{subtask}/` as the official archive unpacks. A subtask's folder holds `{name}.txt`
beside the image `{name}.jpg` (or png), or both apart, in `questions_answers_YN/` and `images/`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, shown
from common.files import field, read_text, visible_in
from evaluation.official_files import check_filled, choice, read_json_lines, unique_keys
from evaluation.task import SHORT_ANSWER, Item, Paper, QuestionTask, Verdict, cell, ratio

POPE_SPLITS = ("random", "popular", "adversarial")
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
SUBTASKS = (*PERCEPTION, *COGNITION)
MME_ROOTS = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
MME_FORM = "two lines 'question<tab>Yes' or 'question<tab>No'"


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
    images_expected = "COCO's images in coco/val2014"
    paper = Paper(80.0, 84.5, "which figure the paper means is not said; this is the one LLaVA-1.5 reports")

    def read_items(self) -> list[Item]:
        return [item for split in POPE_SPLITS for item in self._read_split(split)]

    def named_images(self, items):
        return ((self._folder / item.image, f"field 'image' of coco_pope_{item.facts['split']}.json") for item in items)

    @property
    def _folder(self) -> Path:
        return self.root / "coco/val2014"

    def _read_split(self, split: str) -> list[Item]:
        file, what = self.root / f"pope/coco_pope_{split}.json", f"POPE's {split} questions, one JSON object a line"
        items = []
        for place, record in read_json_lines(file, what):
            number = field(record, "question_id", int, place)
            image, text = (field(record, name, str, place) for name in ("image", "text"))
            label = choice(record, "label", ("yes", "no"), place)
            opened, facts = self.image(self._folder / image), {"split": split, "question": text}
            # The splits share their images, so images are resampled, not questions.
            items.append(
                Item(f"{split}-{number}", text + SHORT_ANSWER, opened, image, image, facts=facts, expected=label)
            )
        check_filled(items, file, what)
        unique_keys([item.key for item in items], file, "question_id")
        return items

    def figures(self, sums) -> dict[str, np.ndarray]:
        found = yes_no_figures(sums, POPE_SPLITS)
        means = {
            f"{what}, mean of splits": sum(found[f"{s} {what}"] for s in POPE_SPLITS) / 3 for what in ("F1", "accuracy")
        }
        return means | found

    def write_submission(self, items, answers):
        """The answer files that the official `evaluate.py` reads, one a split, in the order of the questions."""
        for split in POPE_SPLITS:
            pairs = [pair for pair in zip(items, answers, strict=True) if pair[0].facts["split"] == split]
            records = [{"question": item.facts["question"], "answer": text} for item, text in pairs]
            self.output.write_json_lines(f"submission/coco_pope_{split}_answers.json", records)


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

    Faithful: "NO", "Not" and "no!" are read as yes, and an empty answer too (test_yes_no.py pins it).
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


class MME(QuestionTask):
    name = "mme"
    headline = "perception"
    unit = "points"
    official_size = 2374
    paper = Paper(1097.2, 1232.9, "the paper's figure is perception; questions as distributed, no further suffix")

    def read_items(self) -> list[Item]:
        folders = [self.root / "mme" / part for part in MME_ROOTS]
        root = next((folder for folder in folders if (folder / SUBTASKS[0]).is_dir()), folders[0])
        items = []
        for subtask in SUBTASKS:
            folder = root / subtask
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder; expected those of MME's {len(SUBTASKS)} subtasks")
            apart = (folder / "questions_answers_YN").is_dir()
            texts, images = (folder / part if apart else folder for part in ("questions_answers_YN", "images"))
            files = [path for path in visible_in(texts) if path.suffix.lower() == ".txt"]
            if not files:
                raise UserError(f"{texts} holds no .txt file; expected MME's questions, one file per image")
            shown_in = {p.stem: p for p in visible_in(images)[::-1] if p.suffix.lower() in IMAGE_SUFFIXES}
            for file in files:
                if file.stem not in shown_in:
                    path = images / file.stem
                    raise UserError(f"{file} has no image; expected {path}{' or '.join(IMAGE_SUFFIXES)}")
                items += self._pair(subtask, file, shown_in[file.stem])
        return items

    def _pair(self, subtask: str, file: Path, image: Path) -> list[Item]:
        """The two questions of one image."""
        lines = [line for line in read_text(file).split("\n") if line.strip()]
        if len(lines) != 2:
            raise UserError(f"{file} has {len(lines)} lines; expected {MME_FORM}")
        items, group, name = [], f"{subtask}/{shown(file.stem)}", f"{subtask}/{shown(image.name)}"
        for number, line in enumerate(lines, 1):
            question, _, label = (part.strip() for part in line.partition("\t"))
            if label not in ("Yes", "No"):
                raise UserError(f"{file}, line {number}: the answer is {label!r}; expected {MME_FORM}")
            opened = self.image(image)
            items.append(Item(f"{group}/{number}", question, opened, name, group, stratum=subtask, expected=label))
        return items

    def judge(self, items, answers) -> list[Verdict]:
        """The official rule for the submission's text, in which line breaks are blanks."""
        parsed = [parse_yes_no_other(cell(answer)) for answer in answers]
        return [Verdict(p, float(p == item.expected.lower())) for item, p in zip(items, parsed, strict=True)]

    def counts(self, items, verdicts) -> dict[str, float]:
        """Of one image: it counts for acc+ when both its questions are answered rightly."""
        subtask, right = items[0].stratum, sum(verdict.score for verdict in verdicts)
        other = sum(verdict.parsed == "other" for verdict in verdicts)
        counted = {"pictures": 1, "questions": len(items), "right": right, "pairs": right == 2, "other": other}
        return {f"{subtask} {name}": float(value) for name, value in counted.items()}

    def figures(self, sums) -> dict[str, np.ndarray]:
        found = {}
        for subtask in SUBTASKS:
            acc = 100 * ratio(sums[f"{subtask} right"], sums[f"{subtask} questions"])
            acc_plus = 100 * ratio(sums[f"{subtask} pairs"], sums[f"{subtask} pictures"])
            found |= {subtask: acc + acc_plus, f"{subtask} acc": acc, f"{subtask} acc+": acc_plus}
        other, asked = (sum(sums[f"{subtask} {what}"] for subtask in SUBTASKS) for what in ("other", "questions"))
        return {
            "perception": sum(found[subtask] for subtask in PERCEPTION),
            "cognition": sum(found[subtask] for subtask in COGNITION),
            "neither yes nor no, %": 100 * ratio(other, asked),
        } | found

    def write_submission(self, items, answers):
        """`{subtask}.txt` as the official `calculation.py` reads them: image, question, answer, prediction."""
        for subtask in SUBTASKS:
            lines = [
                "\t".join((Path(item.image).name, item.prompt, item.expected, cell(answer))) + "\n"
                for item, answer in zip(items, answers, strict=True)
                if item.stratum == subtask
            ]
            self.output.write_text(f"submission/{subtask}.txt", "".join(lines))


def parse_yes_no_other(answer: str) -> str:
    """The official rule: `yes`, or else `no`, within the first four characters, in any case."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")
