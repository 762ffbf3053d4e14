"""GQA: questions made from scene graphs, one right answer each.

`gqa/testdev_balanced_questions.json` and `gqa/images/` of the official site.
"""

from functools import partial
from pathlib import Path

import numpy as np

from evaluation.official_files import check_filled, check_images, field, read_json, write_json
from evaluation.task import SHORT_ANSWER, Item, Paper, QuestionTask, Verdict, accuracies, right_by
from models.images import load_image

FILE = "testdev_balanced_questions.json"
KINDS = ("binary", "open")


class GQA(QuestionTask):
    name = "gqa"
    headline = "accuracy"
    official_size = 12578
    paper = Paper(58.0, 61.0, "testdev-balanced; compared in lower case without a final full stop, as LLaVA's script")

    def read_items(self) -> list[Item]:
        file, what = self.root / "gqa" / FILE, "GQA's questions by their ids"
        records = read_json(file, dict, what)
        check_filled(records, file, what)
        items = [self._item(f"{file}, question {key}", key, record) for key, record in records.items()]
        named = {item.image: item.key for item in reversed(items)}
        check_images(
            [self._folder / item.image for item in items],
            lambda path: f"field 'imageId' of question {named[path.name]} in {FILE}",
            f"GQA's images in {self._folder}",
        )
        return items

    @property
    def _folder(self) -> Path:
        return self.root / "gqa/images"

    def _item(self, place: str, key: str, record: dict) -> Item:
        question, image, answer = (field(place, record, name, str) for name in ("question", "imageId", "answer"))
        types = field(place, record, "types", dict)
        structural = field(f"{place}, field 'types'", types, "structural", str)
        facts = {"kind": "open" if structural == "query" else "binary"}
        image = f"{image}.jpg"
        opened = partial(load_image, self._folder / image)
        return Item(key, question + SHORT_ANSWER, opened, image, image, facts=facts, expected=answer)

    def judge(self, items, answers) -> list[Verdict]:
        parsed = [answer.rstrip(".").lower() for answer in answers]
        return [Verdict(p, float(p == item.expected)) for item, p in zip(items, parsed, strict=True)]

    def counts(self, items, verdicts) -> dict[str, float]:
        return right_by([item.facts["kind"] for item in items], verdicts)

    def figures(self, sums) -> dict[str, np.ndarray]:
        return accuracies(sums, KINDS)

    def write_submission(self, folder, items, answers):
        """`testdev_balanced_predictions.json`, as the official `eval.py` reads it."""
        file = folder / "testdev_balanced_predictions.json"
        pairs = zip(items, self.judge(items, answers), strict=True)
        write_json(file, [{"questionId": item.key, "prediction": verdict.parsed} for item, verdict in pairs])
