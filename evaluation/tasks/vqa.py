"""Open questions about images: VQAv2 and GQA.

VQAv2: ten people's answers each. `vqav2/v2_OpenEnded_mscoco_{split}_questions.json`,
`vqav2/v2_mscoco_val2014_annotations.json` and COCO's images in `coco/val2014/` or `coco/test2015/`. The answers of
test-dev and test are not public: there the server scores.

GQA: questions made from scene graphs, one right answer each. `gqa/testdev_balanced_questions.json` and `gqa/images/` of
the official site.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import field
from evaluation.official_files import check_filled, choice, read_official, records_of, unique_keys
from evaluation.task import SHORT_ANSWER, Item, Paper, QuestionTask, Verdict, accuracies, ratio, right_by

VQA_SPLITS = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
VQA_SIZES = {"val": 214354, "test-dev": 107394, "test": 447793}
VQA_KINDS = ("yes/no", "number", "other")
BARE = "accuracy of answers as they came"
GQA_FILE = "testdev_balanced_questions.json"
GQA_KINDS = ("binary", "open")

# How VQAv2's official evaluation compares an answer with ten people's (VQA/PythonEvaluationTools/vqaEval.py)
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
BETWEEN_DIGITS = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # Faithful: the official look-behind is misspelt, so "3." loses its period too
MAX_PERIODS = 32  # Faithful: the official code passes a flag in the place of the count
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}
# Faithful: the official table, with its slips ("somebody'd"); the keys with capitals never match lower-cased words.
CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll
    whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
    """.split()
)


class VQAv2(QuestionTask):
    name = "vqav2"
    headline = "accuracy"
    images_expected = "COCO's images in coco/val2014, of test and test-dev in coco/test2015"
    paper = Paper(
        69.4,
        74.7,
        "the paper's is presumably test-dev, which only the server scores; val has public answers; answers normalised "
        f"first, as LLaVA's script does ({BARE}: the official rule alone)",
    )

    @property
    def official_size(self) -> int:
        return VQA_SIZES[self.config.vqav2_split]

    @property
    def has_answers(self) -> bool:
        return self.config.vqav2_split == "val"

    @property
    def settings(self) -> dict:
        return super().settings | {"split": self.config.vqav2_split}

    def read_items(self) -> list[Item]:
        split = VQA_SPLITS[self.config.vqav2_split]
        file = self.root / "vqav2" / f"v2_OpenEnded_mscoco_{split}_questions.json"
        records = list(records_of(file, read_official(file, "VQAv2's questions"), "questions"))
        check_filled(records, f"{file}: field 'questions'", f"VQAv2's questions of {split}")
        annotations = self._read_annotations() if self.has_answers else {}
        folder = "val2014" if self.has_answers else "test2015"
        items = [self._item(place, record, folder, annotations) for place, record in records]
        unique_keys([item.key for item in items], file, "question_id")
        return items

    def named_images(self, items):
        coco = self.root / "coco"
        return ((coco / item.image, f"field 'image_id' of question_id {item.key}") for item in items)

    def _read_annotations(self) -> dict[int, dict]:
        """Answers and kind of every question, by its id."""
        file = self.root / "vqav2/v2_mscoco_val2014_annotations.json"
        found = {}
        for place, record in records_of(file, read_official(file, "VQAv2's annotations"), "annotations"):
            answers = field(record, "answers", list, place)
            if len(answers) != 10:
                raise UserError(f"{place}: field 'answers' has {len(answers)} answers; expected 10")
            texts = [field(answer, "answer", str, f"{place}, field 'answers'") for answer in answers]
            kind = choice(record, "answer_type", VQA_KINDS, place)
            most = field(record, "multiple_choice_answer", str, place)
            found[field(record, "question_id", int, place)] = {"answers": texts, "kind": kind, "most": most}
        return found

    def _item(self, place: str, record: dict, folder: str, annotations: dict[int, dict]) -> Item:
        key, image_id = (field(record, name, int, place) for name in ("question_id", "image_id"))
        question = field(record, "question", str, place)
        if self.has_answers and key not in annotations:
            raise UserError(
                f"{place}: field 'question_id' is {key}, which v2_mscoco_val2014_annotations.json does not have; "
                "expected annotations of the same split"
            )
        facts = annotations.get(key, {"most": ""})
        image = f"{folder}/COCO_{folder}_{image_id:012d}.jpg"
        opened = self.image(self.root / "coco" / image)
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
        return accuracies(sums, VQA_KINDS) | {BARE: 100 * ratio(sums[BARE], sums["questions"])}

    def write_submission(self, items, answers):
        """`v2_OpenEnded_mscoco_{split}_showo_results.json`, as the official code and the server read it."""
        file = f"submission/v2_OpenEnded_mscoco_{VQA_SPLITS[self.config.vqav2_split]}_showo_results.json"
        pairs = zip(items, answers, strict=True)
        self.output.write_json(
            file, [{"question_id": int(item.key), "answer": submitted(answer)} for item, answer in pairs]
        )


def submitted(answer: str) -> str:
    """The answer as LLaVA's conversion script and lmms-eval hand it in: normalised, whatever people say."""
    return normalize(one_line(answer))


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> tuple[str, float]:
    """The answer as it was compared, and its accuracy in [0, 1].

    For each of the ten people the answer is compared with the nine others: three that agree make it fully right. The
    mean over the ten counts. Where all people say the same, the official code normalises nothing.
    """
    answer, humans = one_line(answer), [one_line(human) for human in human_answers]
    if len(set(humans)) > 1:
        answer, humans = normalize(answer), [normalize(human) for human in humans]
    agree = [human == answer for human in humans]
    scores = [min(1.0, (sum(agree) - own) / 3) for own in agree]
    return answer, sum(scores) / len(scores)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """Punctuation, case, number words, articles and contractions."""
    return _words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    """A mark that touches a blank anywhere in the text, or any mark if a comma stands between digits, is removed;
    others become blanks."""
    out = text
    for mark in PUNCTUATION:
        removed = f"{mark} " in text or f" {mark}" in text or BETWEEN_DIGITS.search(text)
        out = out.replace(mark, "" if removed else " ")
    return PERIOD.sub("", out, count=MAX_PERIODS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class GQA(QuestionTask):
    name = "gqa"
    headline = "accuracy"
    official_size = 12578
    images_expected = "GQA's images in gqa/images"
    paper = Paper(58.0, 61.0, "testdev-balanced; compared in lower case without a final full stop, as LLaVA's script")

    def read_items(self) -> list[Item]:
        file, what = self.root / "gqa" / GQA_FILE, "GQA's questions by their ids"
        records = read_official(file, what)
        check_filled(records, file, what)
        return [self._item(f"{file}, question {key}", key, record) for key, record in records.items()]

    def named_images(self, items):
        return ((self._folder / item.image, f"field 'imageId' of question {item.key} in {GQA_FILE}") for item in items)

    @property
    def _folder(self) -> Path:
        return self.root / "gqa/images"

    def _item(self, place: str, key: str, record: dict) -> Item:
        question, image, answer = (field(record, name, str, place) for name in ("question", "imageId", "answer"))
        structural = field(field(record, "types", dict, place), "structural", str, f"{place}, field 'types'")
        facts = {"kind": "open" if structural == "query" else "binary"}
        image = f"{image}.jpg"
        opened = self.image(self._folder / image)
        return Item(key, question + SHORT_ANSWER, opened, image, image, facts=facts, expected=answer)

    def judge(self, items, answers) -> list[Verdict]:
        parsed = [answer.rstrip(".").lower() for answer in answers]
        return [Verdict(p, float(p == item.expected)) for item, p in zip(items, parsed, strict=True)]

    def counts(self, items, verdicts) -> dict[str, float]:
        return right_by([item.facts["kind"] for item in items], verdicts)

    def figures(self, sums) -> dict[str, np.ndarray]:
        return accuracies(sums, GQA_KINDS)

    def write_submission(self, items, answers):
        """`testdev_balanced_predictions.json`, as the official `eval.py` reads it."""
        file = "submission/testdev_balanced_predictions.json"
        pairs = zip(items, self.judge(items, answers), strict=True)
        self.output.write_json(
            file, [{"questionId": item.key, "prediction": verdict.parsed} for item, verdict in pairs]
        )
