"""MMMU: college questions of thirty subjects, most with four options, some open.

`mmmu/{Subject}/{split}-*.parquet` as the official data set is distributed; the images are inside. Prompt and parsing
are those of the official repository's LLaVA example; every question is asked with its first image.
"""

import ast
import io
import random
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.errors import UserError
from evaluation.mmmu_parsing import open_is_right, parse_letter, parse_open
from evaluation.official_files import check_filled, existing, field, unique_keys, write_json
from evaluation.task import Item, Paper, QuestionTask, Verdict, ratio, right_by

CHOICE, OPEN = "multiple-choice", "open"
SUFFIXES = {
    CHOICE: "Answer with the option's letter from the given choices directly.",
    OPEN: "Answer the question using a single word or phrase.",
}
SIZES = {"dev": 150, "validation": 900, "test": 10500}
FIELDS = ("id", "question", "options", "answer", "question_type", "image_1")


class MMMU(QuestionTask):
    name = "mmmu"
    headline = "accuracy"
    paper = Paper(
        26.7,
        27.4,
        "the validation split is assumed; only the first image of a question is shown, also where its options are "
        "pictures (the official example draws the answer there)",
    )

    @property
    def official_size(self) -> int:
        return SIZES[self.config.mmmu_split]

    @property
    def has_answers(self) -> bool:
        return self.config.mmmu_split != "test"

    @property
    def settings(self) -> dict:
        return super().settings | {"split": self.config.mmmu_split}

    def read_items(self) -> list[Item]:
        what = f"MMMU's subjects, each a folder with {self.config.mmmu_split}-*.parquet"
        root = existing(self.root / "mmmu", what)
        files = sorted(root.glob(f"*/{self.config.mmmu_split}-*.parquet"))
        if not files:
            raise UserError(f"{root} holds no {self.config.mmmu_split}-*.parquet in its folders; expected {what}")
        items = [item for file in files for item in self._read_subject(file)]
        unique_keys([item.key for item in items], root, "id")
        return items

    def _read_subject(self, file: Path) -> list[Item]:
        try:
            table = pq.ParquetFile(file)
            rows = table.read([name for name in FIELDS if name in table.schema_arrow.names and name != "image_1"])
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as parquet ({error}); expected MMMU's questions") from None
        if "image_1" not in table.schema_arrow.names:
            raise UserError(f"{file}: field 'image_1' is missing; expected an image as a struct of bytes and path")
        check_filled(rows, file, f"MMMU's questions about {file.parent.name}")
        return [self._item(f"{file}, row {n}", file, n, row) for n, row in enumerate(rows.to_pylist())]

    def _item(self, place: str, file: Path, number: int, row: dict) -> Item:
        key, question, answer = (field(place, row, name, str) for name in ("id", "question", "answer"))
        kind = field(place, row, "question_type", str, (CHOICE, OPEN))
        options = read_list(place, "options", field(place, row, "options", str))
        letters = {chr(ord("A") + index): text for index, text in enumerate(options)}
        if self.has_answers and kind == CHOICE and answer not in letters:
            raise UserError(f"{place}: field 'answer' is {answer!r}; expected one of the letters {list(letters)}")
        subject = file.parent.name
        facts = {"kind": kind, "options": letters, "subject": subject, "answer": answer}
        if kind == OPEN and answer.startswith("["):
            facts["answer"] = read_list(place, "answer", answer)
        return Item(
            key,
            prompt_of(question, letters, kind),
            partial(open_picture, file, number),
            f"{subject}/{file.stem}/{number}",
            stratum=subject,
            facts=facts,
            expected=answer,
        )

    def _rng(self, key: str) -> random.Random:
        """The official code draws from one generator; ours is the question's own, whatever else is asked."""
        return random.Random(f"{self.config.seed} {key}")

    def _parsed(self, item: Item, answer: str) -> str | list[str | float]:
        if item.facts["kind"] == OPEN:
            return parse_open(answer)
        return parse_letter(answer, item.facts["options"], self._rng(item.key))

    def judge(self, items, answers) -> list[Verdict]:
        verdicts = []
        for item, answer in zip(items, answers, strict=True):
            parsed, expected = self._parsed(item, answer), item.facts["answer"]
            right = parsed == expected if item.facts["kind"] == CHOICE else open_is_right(expected, parsed)
            verdicts.append(Verdict(str(parsed), float(right)))
        return verdicts

    def counts(self, items, verdicts) -> dict[str, float]:
        both = [right_by([item.facts[what] for item in items], verdicts) for what in ("kind", "subject")]
        return both[0] | both[1]

    def figures(self, sums) -> dict[str, np.ndarray]:
        right, total = (sum(sums[f"{kind}{end}"] for kind in (CHOICE, OPEN)) for end in (" right", ""))
        parts = [CHOICE, OPEN, *sorted(name for name in sums if f"{name} right" in sums and name not in (CHOICE, OPEN))]
        return {"accuracy": 100 * ratio(right, total)} | {p: 100 * ratio(sums[f"{p} right"], sums[p]) for p in parts}

    def write_submission(self, folder, items, answers):
        """`{split}_predictions.json`: by id letters, and open answers as they are, as the official code wants."""
        file = folder / f"{self.config.mmmu_split}_predictions.json"
        pairs = zip(items, answers, strict=True)
        write_json(file, {i.key: answer if i.facts["kind"] == OPEN else self._parsed(i, answer) for i, answer in pairs})


def prompt_of(question: str, options: dict[str, str], kind: str) -> str:
    """The official example's prompt; marks such as `<image 1>` stay in the text."""
    listed = "".join(f"({letter}) {text}\n" for letter, text in options.items())
    return f"{question}\n{listed}\n{SUFFIXES[kind]}" if kind == CHOICE else f"{question}\n{SUFFIXES[kind]}"


def read_list(place: str, name: str, text: str) -> list[str]:
    """A list that the official files hold as Python writes it."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        values = None
    if not isinstance(values, list):
        raise UserError(f"{place}: field {name!r} is {text[:60]!r}; expected a list of texts, as ['one', 'two']")
    return [str(value) for value in values]


@lru_cache(maxsize=2)
def images_of(file: Path) -> pa.ChunkedArray:
    """The first image of every question of a subject; of two subjects they stay in memory."""
    return pq.read_table(file, columns=["image_1"]).column("image_1")


def open_picture(file: Path, number: int) -> Image.Image:
    """The first image of a question, read when its turn comes."""
    value = images_of(file)[number].as_py()
    try:
        return Image.open(io.BytesIO(value["bytes"])).convert("RGB")
    except (TypeError, KeyError, OSError) as error:
        raise UserError(
            f"{file}, row {number}: field 'image_1' is no image ({error}); expected a struct with its bytes"
        ) from None
