"""MME: fourteen subtasks of yes/no questions, two about each image, one of which is to be answered no.

`mme/{subtask}/`, or `mme/MME_Benchmark_release_version/{subtask}/` as the official archive unpacks. A subtask's folder
holds `{name}.txt` beside the image `{name}.jpg` (or png), or both apart, in `questions_answers_YN/` and `images/`.
"""

from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError
from evaluation.official_files import existing
from evaluation.task import Item, Paper, QuestionTask, Verdict, cell, ratio
from models.images import load_image

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
SUBTASKS = (*PERCEPTION, *COGNITION)
ROOTS = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")
PICTURES = (".jpg", ".png", ".jpeg")
FORM = "two lines 'question<tab>Yes' or 'question<tab>No'"


class MME(QuestionTask):
    name = "mme"
    headline = "perception"
    unit = "points"
    official_size = 2374
    paper = Paper(1097.2, 1232.9, "the paper's figure is perception; questions as distributed, no further suffix")

    def read_items(self) -> list[Item]:
        folders = [self.root / "mme" / part for part in ROOTS]
        root = next((folder for folder in folders if (folder / SUBTASKS[0]).is_dir()), folders[0])
        items = []
        for subtask in SUBTASKS:
            folder = existing(root / subtask, f"the folder of MME's subtask {subtask}, one of {len(SUBTASKS)}")
            questions = folder / "questions_answers_YN"
            files = sorted((questions if questions.is_dir() else folder).glob("*.txt"))
            if not files:
                raise UserError(f"{folder} holds no .txt file; expected MME's questions, one file per image")
            for file in files:
                items += _read_pair(subtask, file, folder / "images" if questions.is_dir() else folder)
        return items

    def judge(self, items, answers) -> list[Verdict]:
        parsed = [parse_yes_no_other(answer) for answer in answers]
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

    def write_submission(self, folder, items, answers):
        """`{subtask}.txt` as the official `calculation.py` reads them: image, question, answer, prediction."""
        for subtask in SUBTASKS:
            lines = [
                "\t".join((Path(item.image).name, item.prompt, item.expected, cell(answer))) + "\n"
                for item, answer in zip(items, answers, strict=True)
                if item.stratum == subtask
            ]
            (folder / f"{subtask}.txt").write_text("".join(lines), encoding="utf-8")


def _read_pair(subtask: str, file: Path, pictures: Path) -> list[Item]:
    """The two questions of one image."""
    image = next((path for end in PICTURES if (path := pictures / f"{file.stem}{end}").is_file()), None)
    if image is None:
        raise UserError(f"{file} has no image; expected {pictures / file.stem}{' or '.join(PICTURES)}")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}); expected {FORM}") from None
    if len(lines) != 2:
        raise UserError(f"{file} has {len(lines)} lines; expected {FORM}")
    items = []
    for number, line in enumerate(lines, 1):
        question, _, label = (part.strip() for part in line.partition("\t"))
        if label not in ("Yes", "No"):
            raise UserError(f"{file}, line {number}: the answer is {label!r}; expected {FORM}")
        group, opened = f"{subtask}/{file.stem}", partial(load_image, image)
        name = f"{subtask}/{image.name}"
        items.append(Item(f"{group}/{number}", question, opened, name, group, stratum=subtask, expected=label))
    return items


def parse_yes_no_other(answer: str) -> str:
    """The official rule: `yes`, or else `no`, within the first four characters, in any case."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")
