"""MMMU: college questions of thirty subjects, most with four options, some open.

`mmmu/{Subject}/{split}-*.parquet` as the official data set is distributed; the images are inside. Prompt and parsing
are those of the official repository's LLaVA example; every question is asked with its first image. The functions at
the end read free text as a letter, or as words and numbers, as the official evaluation does (mmmu/utils/eval_utils.py).
"""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common.errors import UserError, shown
from common.files import field, visible_folders, visible_in
from evaluation.official_files import check_filled, choice, unique_keys
from evaluation.task import Item, Paper, QuestionTask, Verdict, ratio, right_by
from models.images import DEFAULT, ImageOptions, open_image

CHOICE, OPEN = "multiple-choice", "open"
SUFFIXES = {
    CHOICE: "Answer with the option's letter from the given choices directly.",
    OPEN: "Answer the question using a single word or phrase.",
}
SIZES = {"dev": 150, "validation": 900, "test": 10500}
FIELDS = ("id", "question", "options", "answer", "question_type", "image_1")
ENDS = ",.!?;:'"  # stripped from both ends of a response, one kind after the other
TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.5, .5
)


class MMMU(QuestionTask):
    name = "mmmu"
    headline = "accuracy"
    paper = Paper(
        26.7,
        27.4,
        "the validation split is assumed; only the first image of a question is shown, as in the official example",
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
        root, form = self.root / "mmmu", f"{self.config.mmmu_split}-*.parquet"
        subjects = visible_folders(root) if root.is_dir() else []
        files = [file for folder in subjects for file in visible_in(folder) if file.match(form)]
        if not files:
            raise UserError(f"{root} holds no {form} in its folders; expected MMMU's subjects, a folder each")
        items = [item for file in files for item in self._read_subject(file)]
        unique_keys([item.key for item in items], root, "id")
        return items

    def _read_subject(self, file: Path) -> list[Item]:
        try:
            table = pq.ParquetFile(file)
            rows = table.read([name for name in FIELDS if name in table.schema_arrow.names and name != "image_1"])
            rows = rows.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read as parquet ({error}); expected MMMU's questions") from None
        if "image_1" not in table.schema_arrow.names:
            raise UserError(f"{file}: field 'image_1' is missing; expected an image as a struct of bytes and path")
        check_filled(rows, file, "MMMU's questions about a subject")
        return [self._item(f"{file}, row {n}", file, n, row) for n, row in enumerate(rows)]

    def _item(self, place: str, file: Path, number: int, row: dict) -> Item:
        key, question, answer = (field(row, name, str, place) for name in ("id", "question", "answer"))
        kind = choice(row, "question_type", (CHOICE, OPEN), place)
        options = read_list(place, "options", field(row, "options", str, place))
        letters = {chr(ord("A") + index): text for index, text in enumerate(options)}
        if kind == CHOICE and not letters:
            raise UserError(f"{place}: field 'options' is empty; expected the answers to choose from")
        if self.has_answers and kind == CHOICE and answer not in letters:
            raise UserError(f"{place}: field 'answer' is {answer!r}; expected one of the letters {list(letters)}")
        subject = shown(file.parent.name)
        facts = {"kind": kind, "options": letters, "subject": subject, "answer": answer}
        if kind == OPEN and answer.startswith("["):
            facts["answer"] = read_list(place, "answer", answer)
        return Item(
            key,
            prompt_of(question, letters, kind),
            partial(first_image, file, number, self.image_options),
            f"{subject}/{shown(file.stem)}/{number}",
            stratum=subject,
            facts=facts,
            expected=answer,
        )

    def _rng(self, key: str) -> random.Random:
        """For the random letter: the question's own, whatever else is asked; the official code has one for all."""
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

    def write_submission(self, items, answers):
        """`{split}_predictions.json`: by id letters, and open answers as they are, as the official code wants."""
        pairs = zip(items, answers, strict=True)
        found = {i.key: answer if i.facts["kind"] == OPEN else self._parsed(i, answer) for i, answer in pairs}
        self.output.write_json(f"submission/{self.config.mmmu_split}_predictions.json", found)


def prompt_of(question: str, options: dict[str, str], kind: str) -> str:
    """The official example's prompt; marks such as `<image 1>` stay in the text."""
    listed = "".join(f"({letter}) {text}\n" for letter, text in options.items())
    return f"{question}\n{listed}\n{SUFFIXES[kind]}" if kind == CHOICE else f"{question}\n{SUFFIXES[kind]}"


def read_list(place: str, name: str, text: str) -> list[str]:
    """A list that the official files hold as Python writes it."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, list):
        raise UserError(f"{place}: field {name!r} is {text[:60]!r}; expected a list of texts, as ['one', 'two']")
    return [str(value) for value in values]


@lru_cache(maxsize=2)
def first_images(file: Path) -> pa.ChunkedArray:
    """The first image of every question of a subject; of two subjects they stay in memory."""
    return pq.read_table(file, columns=["image_1"]).column("image_1")


def first_image(file: Path, number: int, options: ImageOptions = DEFAULT) -> Image.Image:
    """The first image of a question, read when its turn comes."""
    place = f"{file}, row {number}, field 'image_1'"
    try:
        value = first_images(file)[number].as_py()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{place} cannot be read ({error}); fetch the file again") from None
    if not isinstance(value, dict) or not isinstance(value.get("bytes"), bytes):
        raise UserError(f"{place} is no image; expected a struct with its bytes")
    return open_image(value["bytes"], place, options)


def parse_letter(response: str, options: Mapping[str, str], rng: random.Random) -> str:
    """The letter a response chooses.

    First bracketed letters count, then letters between blanks, then, in responses of more than five words, the options'
    own texts; of several the last one. If there is none, the official code picks one at random.

    Args:
        options: letter → text, in order.
        rng: for that draw.
    """
    for mark in ENDS:
        response = response.strip(mark)
    response = f" {response} "
    for form in ("({})", " {} "):
        if found := [letter for letter in options if form.format(letter) in response]:
            return max(found, key=lambda letter: response.rfind(form.format(letter)))
    lower = response.lower()
    if len(response.split()) > 5:
        if found := [letter for letter, text in options.items() if text.lower() in lower]:
            return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return rng.choice(list(options))


def parse_open(response: str) -> list[str | float]:
    """Candidate answers in a response: the ends of its sentences after words such as "is", and the numbers in them."""
    tails = _key_parts(response)
    numbers = [number for tail in tails for pattern in NUMBERS for number in pattern.findall(tail)]
    parsed = [value for text in (*tails, *numbers) for value in normalize(text)]
    return list(dict.fromkeys(parsed))


def open_is_right(expected: str | Sequence[str], parsed: Sequence[str | float]) -> bool:
    """Whether a right text is part of a parsed one, or a right number equals one."""
    answers = [expected] if isinstance(expected, str) else expected
    right = [value for answer in answers for value in normalize(answer)]
    texts = [value for value in right if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in right for value in parsed)


def normalize(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-cased text; a single letter must have a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_parts(response: str) -> list[str]:
    """The shortest text after an indicator in each line; the whole response if there is none."""
    response = response.strip().strip(".").lower()
    # Faithful: the official pattern also splits before capitals, of which the lower-cased text has none.
    lines, tails = response.split("\n"), []
    for number, line in enumerate(lines, 1):
        indicators = (*INDICATORS, "=") if number == len(lines) else INDICATORS
        found = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        shortest = ""
        for tail in found:  # Faithful: an empty tail gives way to the next one
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in TRIVIAL:
            tails.append(shortest)
    return tails or [response]
