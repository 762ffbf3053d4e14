"""VQAv2: open questions about COCO's images, with ten people's answers each.

`vqav2/v2_OpenEnded_mscoco_{split}_questions.json`, `vqav2/v2_mscoco_val2014_annotations.json` and COCO's images in
`coco/val2014/` or `coco/test2015/`. The answers of test-dev and test are not public: there the server scores.
"""

from functools import partial

import numpy as np

from common.errors import UserError
from evaluation.official_files import check_filled, check_images, field, read_json, unique_keys, write_json
from evaluation.task import SHORT_ANSWER, Item, Paper, QuestionTask, Verdict, accuracies, ratio, right_by
from evaluation.vqa_normalization import normalize, one_line, vqa_accuracy
from models.images import load_image

SPLITS = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
SIZES = {"val": 214354, "test-dev": 107394, "test": 447793}
KINDS = ("yes/no", "number", "other")
BARE = "accuracy of answers as they came"


class VQAv2(QuestionTask):
    name = "vqav2"
    headline = "accuracy"
    paper = Paper(
        69.4,
        74.7,
        "the paper's is presumably test-dev, which only the server scores; val has public answers; answers normalised "
        f"first, as LLaVA's script does ({BARE}: the official rule alone)",
    )

    @property
    def official_size(self) -> int:
        return SIZES[self.config.vqav2_split]

    @property
    def has_answers(self) -> bool:
        return self.config.vqav2_split == "val"

    @property
    def settings(self) -> dict:
        return super().settings | {"split": self.config.vqav2_split}

    def read_items(self) -> list[Item]:
        split = SPLITS[self.config.vqav2_split]
        file = self.root / "vqav2" / f"v2_OpenEnded_mscoco_{split}_questions.json"
        records = field(str(file), read_json(file, dict, "VQAv2's questions"), "questions", list)
        check_filled(records, f"{file}: field 'questions'", f"VQAv2's questions of {split}")
        annotations = self._read_annotations() if self.has_answers else {}
        pictures = "val2014" if self.has_answers else "test2015"
        items = [self._item(f"{file}, question {n}", record, pictures, annotations) for n, record in enumerate(records)]
        unique_keys([item.key for item in items], file, "question_id")
        named = {item.image: item.key for item in reversed(items)}
        check_images(
            [self.root / "coco" / item.image for item in items],
            lambda path: f"field 'image_id' of question_id {named[f'{pictures}/{path.name}']} in {file.name}",
            f"COCO's {pictures} images in {self.root / 'coco' / pictures}",
        )
        return items

    def _read_annotations(self) -> dict[int, dict]:
        """Answers and kind of every question, by its id."""
        file = self.root / "vqav2/v2_mscoco_val2014_annotations.json"
        found = {}
        records = field(str(file), read_json(file, dict, "VQAv2's annotations"), "annotations", list)
        for number, record in enumerate(records):
            place = f"{file}, annotation {number}"
            answers = field(place, record, "answers", list)
            if len(answers) != 10:
                raise UserError(f"{place}: field 'answers' has {len(answers)} answers; expected 10")
            texts = [field(f"{place}, field 'answers'", answer, "answer", str) for answer in answers]
            kind = field(place, record, "answer_type", str, KINDS)
            most = field(place, record, "multiple_choice_answer", str)
            found[field(place, record, "question_id", int)] = {"answers": texts, "kind": kind, "most": most}
        return found

    def _item(self, place: str, record: dict, pictures: str, annotations: dict[int, dict]) -> Item:
        key, image_id = (field(place, record, name, int) for name in ("question_id", "image_id"))
        question = field(place, record, "question", str)
        if self.has_answers and key not in annotations:
            raise UserError(
                f"{place}: field 'question_id' is {key}, which v2_mscoco_val2014_annotations.json does not have; "
                "expected annotations of the same split"
            )
        facts = annotations.get(key, {"most": ""})
        image = f"{pictures}/COCO_{pictures}_{image_id:012d}.jpg"
        opened = partial(load_image, self.root / "coco" / image)
        return Item(str(key), question + SHORT_ANSWER, opened, image, image, facts=facts, expected=facts["most"])

    def judge(self, items, answers) -> list[Verdict]:
        """The official rule for normalised answers, which it would not normalise where all ten people agree."""
        verdicts = []
        for item, answer in zip(items, answers, strict=True):
            _, bare = vqa_accuracy(answer, item.facts["answers"])
            verdicts.append(Verdict(*vqa_accuracy(submitted(answer), item.facts["answers"]), {BARE: bare}))
        return verdicts

    def counts(self, items, verdicts) -> dict[str, float]:
        bare = sum(verdict.facts[BARE] for verdict in verdicts)
        return right_by([item.facts["kind"] for item in items], verdicts) | {"questions": len(items), BARE: bare}

    def figures(self, sums) -> dict[str, np.ndarray]:
        return accuracies(sums, KINDS) | {BARE: 100 * ratio(sums[BARE], sums["questions"])}

    def write_submission(self, folder, items, answers):
        """`v2_OpenEnded_mscoco_{split}_showo_results.json`, as the official code and the server read it."""
        file = folder / f"v2_OpenEnded_mscoco_{SPLITS[self.config.vqav2_split]}_showo_results.json"
        pairs = zip(items, answers, strict=True)
        write_json(file, [{"question_id": int(item.key), "answer": submitted(answer)} for item, answer in pairs])


def submitted(answer: str) -> str:
    """The answer as LLaVA's conversion script and lmms-eval hand it in: normalised, whatever people say."""
    return normalize(one_line(answer))
